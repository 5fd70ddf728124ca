from __future__ import annotations

import json
import linecache
import logging
import socket
import sys
import threading
import types
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from ferroelastic import events
from ferroelastic.events import Event, EventSource, NodeState, RdzvEvent, handlers
from ferroelastic.events._record import has_listener
from ferroelastic.utils import _hostname

if TYPE_CHECKING:
    from collections.abc import Iterator


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def destination(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name for a destination that is forgotten afterwards."""
    name = request.node.name
    yield name
    handlers._log_handlers.pop(name, None)
    events._events_loggers.pop(name, None)
    logging.getLogger(f"torchelastic-events-{name}").handlers.clear()


def rdzv_event() -> RdzvEvent:
    return RdzvEvent(
        name="name",
        run_id="run",
        message="text",
        hostname="host",
        pid=1,
        node_state=NodeState.RUNNING,
        master_endpoint="host:1",
        rank=3,
        local_id=4,
        error_trace="trace",
    )


def test_an_event_survives_its_serialisation() -> None:
    event = Event("name", EventSource.AGENT, 7, {"key": "value", "number": 1.5, "nothing": None})
    assert Event.deserialize(event.serialize()) == event
    assert Event.deserialize(event) is event
    assert json.loads(str(event)) == asdict(event)


def test_a_rendezvous_event_survives_its_serialisation() -> None:
    event = rdzv_event()
    assert RdzvEvent.deserialize(str(event)) == event
    assert RdzvEvent.deserialize(event) is event


@pytest.mark.parametrize("data", ["{", '{"source": "NOBODY"}', '{"source": "AGENT"}', 3])
def test_text_that_is_not_an_event_is_an_error(data: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Event.deserialize(data)


def test_an_event_goes_once_to_the_handler_of_its_destination(destination: str) -> None:
    handlers._log_handlers[destination] = collector = Collector()
    event = Event("name", EventSource.WORKER)
    events.record(event, destination)
    events.record(event, destination)
    assert collector.lines == [event.serialize()] * 2
    logger = events._get_or_create_logger(destination)
    assert collector in logger.handlers
    assert not logger.propagate


def test_a_logger_that_torch_gave_its_handler_gets_no_second_one(
    destination: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers._log_handlers[destination] = ours = Collector()
    logger = logging.getLogger(f"torchelastic-events-{destination}")
    logger.addHandler(torchs := Collector())
    module: Any = types.ModuleType("torch.distributed.elastic.events")
    module._events_loggers = {destination: logger}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    events.record(Event("name", EventSource.WORKER), destination)
    assert (len(torchs.lines), len(ours.lines)) == (1, 0)


def test_an_event_without_a_reader_is_not_serialised() -> None:
    null = events._get_or_create_logger("null")
    with (
        mock.patch.object(null, "handlers", [logging.NullHandler()]),  # the test's own log capture listens as well
        mock.patch.object(Event, "serialize") as serialize,
    ):
        events.record(Event("name", EventSource.AGENT))
        assert not has_listener("null")
    serialize.assert_not_called()
    assert has_listener("console")


def test_an_unknown_destination_is_named() -> None:
    with pytest.raises(KeyError, match=r"no event handler 'nowhere'.*'console'"):
        events.record(Event("name", EventSource.AGENT), "nowhere")


def test_a_handler_replaced_on_the_package_is_used(destination: str) -> None:
    with mock.patch("ferroelastic.events.get_logging_handler", return_value=logging.NullHandler()):
        logger = events._get_or_create_logger(destination)
    assert logging.NullHandler in map(type, logger.handlers)


def test_a_handler_registered_with_torch_is_found(destination: str) -> None:
    theirs = pytest.importorskip("torch.distributed.elastic.events.handlers")
    with mock.patch.dict(theirs._log_handlers, {destination: Collector(), "null": Collector()}):
        assert handlers.get_logging_handler(destination) is theirs._log_handlers[destination]
        assert handlers.get_logging_handler("null") is theirs._log_handlers["null"]
        with mock.patch.dict(handlers._log_handlers, {"null": (ours := Collector())}):
            assert handlers.get_logging_handler("null") is ours


def test_a_rendezvous_event_is_made_only_for_a_reader() -> None:
    with (
        mock.patch("ferroelastic.events.record_rdzv_event") as record,
        mock.patch("ferroelastic.events.get_logging_handler", return_value=logging.NullHandler()),
    ):
        events.construct_and_record_rdzv_event("run", "text", NodeState.RUNNING)
        record.assert_not_called()


def test_a_rendezvous_event_names_the_node_and_the_step() -> None:
    with (
        mock.patch("ferroelastic.events.record_rdzv_event") as record,
        mock.patch("ferroelastic.events.get_logging_handler", return_value=logging.StreamHandler()),
    ):
        events.construct_and_record_rdzv_event("run", "text", NodeState.RUNNING, hostname="host")
        try:
            raise ValueError("reason")
        except ValueError:
            events.construct_and_record_rdzv_event("run", "text", NodeState.FAILED, name="step", hostname="host")
    running, failed = (call.args[0] for call in record.call_args_list)
    assert running.name == f"test_events.py:{test_a_rendezvous_event_names_the_node_and_the_step.__name__}"
    assert running.error_trace == ""
    assert failed.name == "test_events.py:step"
    assert "ValueError: reason" in failed.error_trace


def test_a_warning_that_is_an_error_does_not_lose_the_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.15 warns while it formats the traceback of a spawned process, which may be an agent."""
    lazycache = linecache.lazycache

    def warn_and_go_on(*arguments: Any) -> Any:
        warnings.warn("Module globals have no loader", DeprecationWarning, stacklevel=1)
        return lazycache(*arguments)

    monkeypatch.setattr(linecache, "lazycache", warn_and_go_on)
    with (
        mock.patch("ferroelastic.events.record_rdzv_event") as record,
        mock.patch("ferroelastic.events.get_logging_handler", return_value=logging.StreamHandler()),
    ):
        try:
            raise ValueError("reason")
        except ValueError:
            events.construct_and_record_rdzv_event("run", "text", NodeState.FAILED, hostname="host")
    (failed,) = (call.args[0] for call in record.call_args_list)
    assert failed.error_trace.endswith("ValueError: reason\n")


def test_the_host_name_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hostname, "_look_up", None)
    with mock.patch("socket.gethostbyaddr", return_value=("host", ["alias", "host.domain"], [])) as look_up:
        assert [_hostname.fq_hostname() for _ in range(3)] == ["host.domain"] * 3
    look_up.assert_called_once()


def test_a_resolver_that_does_not_answer_is_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(_hostname, "_look_up", None)
    monkeypatch.setattr(_hostname, "_RESOLVER_TIMEOUT_S", 0.01)
    monkeypatch.setattr("socket.gethostbyaddr", lambda _name: (str(answers.wait(60)), [], []))
    try:
        assert _hostname.fq_hostname() == socket.gethostname()
        # It was asked before: a report does not wait at all, and never asks again.
        monkeypatch.setattr(_hostname, "_RESOLVER_TIMEOUT_S", 600)
        assert _hostname.hostname_for_report() == socket.gethostname()
    finally:
        answers.set()
