"""What ``--rdzv-conf``, or ``LaunchConfig.rdzv_configs``, says to the native rendezvous."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from ferroelastic.rendezvous import RendezvousParameters, registry
from ferroelastic.rendezvous._native import NativeRendezvous
from ferroelastic.rendezvous._native_settings import NativeSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMES = (
    *("join_timeout", "last_call_timeout", "close_timeout", "read_timeout", "heartbeat_timeout", "heartbeat"),
    "keep_alive_interval",
)


def parameters(
    endpoint: str = "localhost:0", nodes: tuple[int, int] = (1, 1), backend: str = "c10d", **config: Any
) -> RendezvousParameters:
    return RendezvousParameters(backend, endpoint, "job", *nodes, **config)


@pytest.fixture
def made() -> Iterator[list[NativeRendezvous]]:
    """Handlers to be shut down after the test."""
    handlers: list[NativeRendezvous] = []
    yield handlers
    for handler in handlers:
        handler.shutdown()
    handlers.clear()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {},
            {
                "join_timeout_s": 600,
                "connect_timeout_s": 60,
                "last_call_s": 30,
                "heartbeat_timeout_s": 15,
                "is_host": None,
            },
        ),
        ({"join_timeout": "7"}, {"join_timeout_s": 7}),
        ({"join_timeout": None}, {"join_timeout_s": 600}),
        ({"read_timeout": " 8 "}, {"connect_timeout_s": 8}),
        ({"last_call_timeout": 9}, {"last_call_s": 9}),
        ({"last_call_timeout": 1.9}, {"last_call_s": 1}),
        ({"close_timeout": "10"}, {}),
        ({"heartbeat_timeout": "11"}, {"heartbeat_timeout_s": 11}),
        ({"keep_alive_interval": "2"}, {"heartbeat_timeout_s": 6}),
        ({"keep_alive_max_attempt": "4"}, {"heartbeat_timeout_s": 20}),
        ({"heartbeat": "12"}, {"heartbeat_timeout_s": 12}),
        ({"keep_alive_interval": "2", "keep_alive_max_attempt": "4"}, {"heartbeat_timeout_s": 8}),
        ({"keep_alive_interval": "2", "heartbeat_timeout": 1, "heartbeat": 3}, {"heartbeat_timeout_s": 1}),
        ({"is_host": "1"}, {"is_host": True, "may_host": True}),
        ({"is_host": "false"}, {"is_host": False, "may_host": False}),
        ({}, {"node_rank": None}),
        ({"node_rank": "3"}, {"node_rank": 3}),
        ({"rank": "3"}, {"node_rank": None}),  # of static
        ({}, {"max_membership_changes": None, "may_host": True}),
        ({"max_membership_changes": "0"}, {"max_membership_changes": 0}),
        ({"max_membership_changes": 3}, {"max_membership_changes": 3}),
        ({"timeout": 900}, {"join_timeout_s": 600}),  # the launcher's, for static
    ],
)
def test_parameters_and_their_settings(config: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = NativeSettings(parameters(**config))
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("rank", "timeout", "expected"), [("0", "7", (0, True, 7, 7)), (1, None, (1, False, 900, 900))]
)
def test_of_static(rank: object, timeout: object, expected: tuple[int, bool, int, int]) -> None:
    made = NativeSettings(parameters("host:1", (2, 2), backend="static", rank=rank, timeout=timeout))
    assert (made.node_rank, made.may_host, made.join_timeout_s, made.connect_timeout_s) == expected


@pytest.mark.parametrize("key", TIMES)
@pytest.mark.parametrize("value", ["x", "", "1.5", 0, "-1", float("inf"), []])
def test_invalid_times(key: str, value: object) -> None:
    text = re.escape(f"the rendezvous option {key}={value!r} is not a valid time; give whole seconds from 1")
    with pytest.raises(ValueError, match=f"^{text}$"):
        NativeRendezvous(RendezvousParameters("c10d", "localhost:0", "job", 1, 1, None, **{key: value}))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"keep_alive_max_attempt": 0},
            "keep_alive_max_attempt=0 is not a valid number of attempts; give a whole number from 1",
        ),
        ({"max_membership_changes": -1}, "max_membership_changes=-1 is not a valid number of membership changes; give"),
        (
            {"max_membership_changes": "x"},
            "max_membership_changes='x' is not a valid number of membership changes; give",
        ),
        ({"is_host": "maybe"}, "is_host='maybe' is neither true nor false; give 1 or 0"),
        ({"node_rank": "x"}, "node_rank='x' is not a valid node rank; give a whole number from 0"),
        ({"node_rank": -1}, "node_rank=-1 is not a valid node rank; give a whole number from 0"),
        ({"is_host": 2}, "is_host=2 is neither true nor false; give 1 or 0"),
        ({"backend": "static"}, "the static rendezvous has no rank of this node; give --node-rank"),
        ({"backend": "static", "rank": "x"}, "rank='x' is not a valid node rank; give --node-rank from 0 to 0"),
        ({"backend": "static", "rank": -1}, "rank=-1 is not a valid node rank; give --node-rank from 0 to 0"),
        ({"backend": "static", "rank": 1}, "rank=1 is not a rank of 1 nodes; give --node-rank from 0 to 0"),
        (
            {"backend": "static", "rank": 0, "timeout": "x"},
            "timeout='x' is not a valid time; give whole seconds from 1",
        ),
        (
            {"backend": "static", "rank": 0, "endpoint": " "},
            "has no endpoint; give --master-addr and --master-port",
        ),
        (
            {"backend": "static", "rank": 0, "endpoint": "host"},
            "the endpoint 'host' has no port; give --master-port",
        ),
        ({"endpoint": "host:x"}, "The port number of the rendezvous endpoint 'host:x' must be an integer"),
        ({"endpoint": "192.0.2.1:0"}, "the endpoint '192.0.2.1:0' has port 0, .*; give the port of the host"),
        ({"is_host": "0"}, "the endpoint 'localhost:0' has port 0, .*; give the port of the host"),
    ],
)
def test_other_invalid_parameters(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        NativeRendezvous(parameters(**config))


@pytest.mark.parametrize("value", [10**9, 10**18, 10**30])
def test_a_time_may_be_as_long_as_you_like(made: list[NativeRendezvous], value: int) -> None:
    times = dict.fromkeys(TIMES, value)
    handler = NativeRendezvous(RendezvousParameters("c10d", "localhost:0", "job", 1, 1, None, **times))
    made.append(handler)
    assert handler.next_rendezvous().world_size == 1


@pytest.mark.parametrize("value", ["x", None, "nan", "inf", -0.5, "-1"])
def test_an_invalid_backoff_is_refused(value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"cas_backoff_max_seconds={value!r} is not a valid time; give finite seconds"
    ):
        NativeRendezvous(parameters(cas_backoff_max_seconds=value))


@pytest.mark.parametrize(("value", "reports"), [("0.5", 1), (3, 1), (0, 0), ("0.0", 0)])
def test_a_backoff_has_no_effect_which_is_reported_once(
    made: list[NativeRendezvous], caplog: pytest.LogCaptureFixture, value: Any, reports: int
) -> None:
    made.append(NativeRendezvous(parameters(cas_backoff_max_seconds=value)))
    assert made[0].next_rendezvous().world_size == 1
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == reports
    assert all(f"cas_backoff_max_seconds={value} has no effect" in text for text in found)


def test_of_an_unknown_option_it_is_warned(made: list[NativeRendezvous], caplog: pytest.LogCaptureFixture) -> None:
    made.append(NativeRendezvous(parameters(join_timeot="3", timeout=900, store_type="tcp")))
    (record,) = caplog.records
    assert "ignoring unknown rendezvous option join_timeot='3'" in record.getMessage()
    assert "known options: join_timeout, " in record.getMessage()


def test_a_file_as_the_store_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RendezvousParameters] = []
    monkeypatch.setattr("ferroelastic.rendezvous._torch_handlers.create_handler", asked.append)
    params = parameters("/some/file", store_type="file")
    registry._create_native_handler(params)
    assert asked == [params]
