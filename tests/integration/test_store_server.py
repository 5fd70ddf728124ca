"""The store server and its client, as Python has them."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
from tests.support.raw_store import CHECK, GET, LIST_KEYS, MULTI_SET, SET, RawClient, i64, keys, request, sized

from ferroelastic._rust import RendezvousClient, StoreClient, StoreServer
from ferroelastic.rendezvous._agent_store import AgentStore
from ferroelastic.utils.store import DistStoreError

CHECK_NONE = request(CHECK, keys(b"none"))


def serve(**options: Any) -> closing[StoreServer]:
    return closing(StoreServer("127.0.0.1", **options))


@pytest.mark.parametrize(
    ("limit", "within", "beyond"),
    [
        ({"max_key_bytes": 4}, request(CHECK, keys(b"1234")), request(CHECK, keys(b"12345"))),
        (
            {"max_value_bytes": 6},
            request(SET, sized(b"k"), sized(b"123456")) + CHECK_NONE,
            request(SET, sized(b"k"), sized(b"1234567")),
        ),
        ({"max_keys": 2}, request(CHECK, keys(b"a", b"b")), request(CHECK, keys(b"a", b"b", b"c"))),
        (
            {"max_request_bytes": 7},
            request(MULTI_SET, i64(1), sized(b"k"), sized(b"123456")) + CHECK_NONE,
            request(MULTI_SET, i64(2), sized(b"k"), sized(b"123456"), sized(b"1"), sized(b"")),
        ),
        ({"max_reply_bytes": 8 + 5}, CHECK_NONE, request(GET, sized(b"k"))),
        # How many there are, and the length of each, besides the one byte of its name.
        ({"max_reply_bytes": 8 + 8}, CHECK_NONE, request(LIST_KEYS)),
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
        StoreServer("127.0.0.1", max_keys=-1)


def test_seconds_may_be_infinite() -> None:
    with serve() as server:
        client = StoreClient("127.0.0.1", server.port, float("inf"))
        client.set(b"k", b"v")
        assert client.get([b"k"], float("inf")) == [b"v"]
    server = StoreServer("127.0.0.1", run_id="job", silence_s=float("inf"), last_call_s=float("inf"))
    agent = RendezvousClient("127.0.0.1", server.port, "job")
    agent.join("default", 1, float("inf"))
    generation = agent.generation
    while agent.membership().state == "joining":
        assert agent.wait(generation, 20) == "event"
        generation = agent.generation
    assert agent.membership().state == "placed"
    agent.close()
    server.close(float("inf"))


def test_an_agents_store_gives_up_a_server_that_is_stopped() -> None:
    # The kernel takes connections and requests for a process that does not run.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = AgentStore("127.0.0.1", listener.getsockname()[1], "prefix", timedelta(seconds=60))
        store.set("k", "v")
        store.set_timeout(timedelta(milliseconds=200))
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match=r"did not answer within 0\.2s"):
            store.get("k")
        with pytest.raises(ConnectionError, match="closed after an earlier error"):
            store.add("k", 1)
        assert time.monotonic() - begin < 20
        assert store.clone().timeout == timedelta(milliseconds=200)


def test_an_agents_store_goes_on_after_a_timeout() -> None:
    with serve() as server:
        store = AgentStore("127.0.0.1", server.port, "prefix", timedelta(milliseconds=50))
        with pytest.raises(DistStoreError, match="wait timeout after 50ms, keys: /prefix/k"):
            store.get("k")
        assert store.add("k", 3) == 3
        assert store.get("k") == b"3"
