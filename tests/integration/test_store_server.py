"""The store server and its client, as Python has them."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
from tests.conformance.raw_store import CHECK, GET, LIST_KEYS, MULTI_SET, SET, RawClient, i64, keys, request, sized

from ferroelastic._rust import StoreServer

CHECK_NONE = request(CHECK, keys(b"none"))


def serve(**options: Any) -> closing[StoreServer]:
    return closing(StoreServer("127.0.0.1", **options))


@pytest.mark.parametrize(
    ("limit", "within", "beyond"),
    [
        ({"most_key_bytes": 4}, request(CHECK, keys(b"1234")), request(CHECK, keys(b"12345"))),
        (
            {"most_value_bytes": 6},
            request(SET, sized(b"k"), sized(b"123456")) + CHECK_NONE,
            request(SET, sized(b"k"), sized(b"1234567")),
        ),
        ({"most_keys": 2}, request(CHECK, keys(b"a", b"b")), request(CHECK, keys(b"a", b"b", b"c"))),
        (
            {"most_request_bytes": 7},
            request(MULTI_SET, i64(1), sized(b"k"), sized(b"123456")) + CHECK_NONE,
            request(MULTI_SET, i64(2), sized(b"k"), sized(b"123456"), sized(b"1"), sized(b"")),
        ),
        ({"most_reply_bytes": 8 + 5}, CHECK_NONE, request(GET, sized(b"k"))),
        # How many there are, and the length of each, besides the one byte of its name.
        ({"most_reply_bytes": 8 + 8}, CHECK_NONE, request(LIST_KEYS)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_limits_can_be_chosen(limit: dict[str, int], within: bytes, beyond: bytes) -> None:
    value = request(SET, sized(b"k"), sized(b"123456"))
    with serve(**limit) as server, RawClient(server.port) as client, RawClient(server.port) as other:
        assert client.ask(value + within, 1) == b"\1"
        client.send(beyond)
        assert client.is_closed()
        assert other.is_open()


def test_a_limit_is_no_negative_number() -> None:
    with pytest.raises(OverflowError):
        StoreServer("127.0.0.1", most_keys=-1)
