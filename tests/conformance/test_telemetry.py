"""``events`` and ``metrics``."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
import warnings
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.implementations import Implementation
    from tests.conformance.stubs import EventLog, MetricLog


# ---- events


class TestEvent:
    def test_as_text(self, impl: Implementation) -> None:
        api = impl("events")
        event = api.Event("an event", api.EventSource.WORKER, metadata={"a": 1, "b": None, "c": True, "d": 0.5})
        text = event.serialize()
        assert text == str(event)
        assert json.loads(text) == {
            "name": "an event",
            "source": "WORKER",
            "timestamp": 0,
            "metadata": {"a": 1, "b": None, "c": True, "d": 0.5},
        }
        assert list(json.loads(text)) == ["name", "source", "timestamp", "metadata"]

    def test_round_trip(self, impl: Implementation) -> None:
        api = impl("events")
        event = api.Event("an event", api.EventSource.AGENT, timestamp=17, metadata={"key": "value"})
        again = api.Event.deserialize(event.serialize())
        assert again == event
        assert isinstance(again.source, api.EventSource)
        assert api.Event.deserialize(event) is event

    @pytest.mark.parametrize(
        ("text", "error"),
        [("{", ValueError), ('{"name": "x"}', KeyError), ('{"name": "x", "source": "NOBODY"}', KeyError)],
    )
    def test_text_that_is_not_an_event(self, impl: Implementation, text: str, error: type[Exception]) -> None:
        with pytest.raises(error):
            impl("events").Event.deserialize(text)

    def test_unknown_fields(self, impl: Implementation) -> None:
        with pytest.raises(TypeError, match="unexpected"):
            impl("events").Event.deserialize('{"name": "x", "source": "AGENT", "more": 1}')


class TestRdzvEvent:
    def test_round_trip(self, impl: Implementation) -> None:
        api = impl("events")
        event = api.RdzvEvent("n", "run", "message", "host", 17, api.NodeState.RUNNING, rank=2, error_trace="t")
        assert json.loads(event.serialize()) == {
            "name": "n",
            "run_id": "run",
            "message": "message",
            "hostname": "host",
            "pid": 17,
            "node_state": "RUNNING",
            "master_endpoint": "",
            "rank": 2,
            "local_id": None,
            "error_trace": "t",
        }
        assert str(event) == event.serialize()
        again = api.RdzvEvent.deserialize(event.serialize())
        assert again == event
        assert isinstance(again.node_state, api.NodeState)
        assert api.RdzvEvent.deserialize(event) is event


class TestDestinations:
    def test_known_ones(self, impl: Implementation) -> None:
        get = impl("events").get_logging_handler
        assert isinstance(get(), logging.NullHandler)
        assert isinstance(get("null"), logging.NullHandler)
        assert isinstance(get("dynamic_rendezvous"), logging.NullHandler)
        assert isinstance(get("console"), logging.StreamHandler)
        with pytest.raises(KeyError):
            get("nobody knows")

    def test_one_of_ones_own(self, impl: Implementation, event_log: EventLog) -> None:
        api = impl("events")
        assert api.get_logging_handler(event_log.name) is event_log
        event = api.Event("e", api.EventSource.AGENT)
        api.record(event, event_log.name)
        api.record(event)
        assert event_log.lines == [event.serialize()]

    def test_an_unknown_one(self, impl: Implementation) -> None:
        api = impl("events")
        with pytest.raises(KeyError):
            api.record(api.Event("e", api.EventSource.AGENT), "nobody knows")

    def test_loggers(self, impl: Implementation, event_log: EventLog) -> None:
        logger = impl("events")._get_or_create_logger(event_log.name)
        assert logger is logging.getLogger(f"torchelastic-events-{event_log.name}")
        assert logger is impl("events")._get_or_create_logger(event_log.name)
        assert (logger.handlers, logger.propagate, logger.level) == ([event_log], False, logging.INFO)

    def test_the_level(self, impl: Implementation, event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOGLEVEL", "ERROR")
        api = impl("events")
        api.record(api.Event("e", api.EventSource.AGENT), event_log.name)
        assert event_log.lines == []

    def test_a_handler_that_was_registered_with_torch(
        self, impl: Implementation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torch.distributed.elastic.events import handlers

        handler, name = logging.NullHandler(), f"probe-{uuid.uuid4()}"
        monkeypatch.setitem(handlers._log_handlers, name, handler)
        assert impl("events").get_logging_handler(name) is handler


def test_events_that_nobody_reads(impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    api, serialize = impl("events"), mock.Mock(return_value="text")
    monkeypatch.setattr(api.Event, "serialize", serialize)
    with mock.patch.object(
        api._get_or_create_logger("null"), "handlers", [logging.NullHandler()]
    ):  # pytest listens to all loggers
        api.record(api.Event("e", api.EventSource.AGENT))
    assert serialize.call_count == impl.expect("unheard-events", torch=1, ours=0)


class TestRendezvousEvents:
    @pytest.fixture
    def lines(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """What goes to the destination ``dynamic_rendezvous``."""
        found: list[str] = []

        class Keep(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                found.append(record.getMessage())

        handler, api = Keep(), impl("events")
        logger = logging.getLogger("torchelastic-events-dynamic_rendezvous")
        before = logger.handlers[:]
        logger.handlers[:] = []
        monkeypatch.setitem(impl("events.handlers")._log_handlers, "dynamic_rendezvous", handler)
        api._events_loggers.pop("dynamic_rendezvous", None)
        yield found
        api._events_loggers.pop("dynamic_rendezvous", None)
        logger.handlers[:] = before

    def test_recorded_fields(self, impl: Implementation, lines: list[str]) -> None:
        api = impl("events")
        api.construct_and_record_rdzv_event("run", "joined", api.NodeState.RUNNING, rank=1, master_endpoint="m:1")
        (event,) = map(api.RdzvEvent.deserialize, lines)
        assert event == api.RdzvEvent(
            name="test_telemetry.py:test_recorded_fields",
            run_id="run",
            message="joined",
            hostname=socket.getfqdn(),
            pid=os.getpid(),
            node_state=api.NodeState.RUNNING,
            master_endpoint="m:1",
            rank=1,
        )

    def test_fields_from_the_caller(self, impl: Implementation, lines: list[str]) -> None:
        api = impl("events")
        try:
            raise ValueError("lost")
        except ValueError:
            api.construct_and_record_rdzv_event(
                "run", "m", api.NodeState.FAILED, name="Handler.join", hostname="h", pid=3, local_id=4
            )
        (event,) = map(api.RdzvEvent.deserialize, lines)
        assert (event.name, event.hostname, event.pid, event.local_id) == ("test_telemetry.py:Handler.join", "h", 3, 4)
        assert "ValueError: lost" in event.error_trace

    def test_an_event_as_it_is(self, impl: Implementation, lines: list[str]) -> None:
        api = impl("events")
        event = api.RdzvEvent("n", "run", "message", "host", 17, api.NodeState.INIT)
        api.record_rdzv_event(event)
        assert lines == [event.serialize()]

    def test_nobody_listens(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        api = impl("events")
        monkeypatch.setattr(api, "record_rdzv_event", lambda _event: pytest.fail("somebody was told"))
        api.construct_and_record_rdzv_event("run", "m", api.NodeState.RUNNING)


# ---- metrics


class TestStreams:
    def test_a_data_point(self, impl: Implementation, metric_log: MetricLog) -> None:
        before = time.time()
        impl("metrics").put_metric("name", 42)
        (point,) = metric_log.data
        assert isinstance(point, impl("metrics").MetricData)
        assert point == (point.timestamp, "torchelastic", "name", 42)
        assert before <= point.timestamp <= time.time()
        assert point._fields == ("timestamp", "group_name", "name", "value")

    def test_groups_have_handlers_of_their_own(self, impl: Implementation, metric_log: MetricLog) -> None:
        api = impl("metrics")
        other: list[Any] = []

        class Other(api.MetricHandler):  # type: ignore[misc,name-defined]  # whose class is known when the test runs
            def emit(self, metric_data: Any) -> None:
                other.append(metric_data)

        api.configure(Other(), "mine")
        api.put_metric("one", 1, "mine")
        api.put_metric("two", 2, metric_group="yours")
        assert [(point.group_name, point.name) for point in other] == [("mine", "one")]
        assert [(point.group_name, point.name) for point in metric_log.data] == [("yours", "two")]
        stream = api.getStream("mine")
        assert isinstance(stream, impl("metrics.api").MetricStream)
        assert isinstance(stream.handler, Other)
        assert stream.group_name == "mine"
        stream.add_value("three", 3)
        assert other[-1].value == 3

    def test_console(self, impl: Implementation, capsys: pytest.CaptureFixture[str]) -> None:
        api = impl("metrics")
        api.ConsoleMetricHandler().emit(api.MetricData(1.5, "group", "name", 3))
        assert capsys.readouterr().out == "[1.5][group]: name=3\n"

    def test_null(self, impl: Implementation, capsys: pytest.CaptureFixture[str]) -> None:
        api = impl("metrics")
        assert api.NullMetricHandler().emit(api.MetricData(1.5, "group", "name", 3)) is None
        assert capsys.readouterr().out == ""

    def test_handlers_are_abstract(self, impl: Implementation) -> None:
        with pytest.raises(TypeError, match="abstract"):
            impl("metrics").MetricHandler()

    def test_configuration(self, impl: Implementation) -> None:
        api = impl("metrics")
        assert api.MetricsConfig().params == {}
        assert api.MetricsConfig({"a": "b"}).params == {"a": "b"}
        assert api.initialize_metrics() is None
        assert api.initialize_metrics(api.MetricsConfig()) is None

    def test_elapsed_time(self, impl: Implementation) -> None:
        elapsed = impl("metrics").get_elapsed_time_ms(time.time() - 2)
        assert 2000 <= elapsed < 10_000
        assert isinstance(elapsed, int)

    def test_a_handler_that_was_configured_through_torch(
        self, impl: Implementation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torch.distributed.elastic.metrics import NullMetricHandler, api

        handler = NullMetricHandler()
        monkeypatch.setattr(api, "_default_metrics_handler", handler)
        assert impl("metrics").getStream("any").handler is handler


class TestProf:
    def test_a_function(self, impl: Implementation, metric_log: MetricLog) -> None:
        @impl("metrics").prof  # type: ignore[untyped-decorator]  # whichever implementation it is
        def work(value: int) -> int:
            """What it does."""
            return value + 1

        assert work(1) == 2
        name = "TestProf.test_a_function.<locals>.work"
        assert metric_log.names() == [f"{name}.success", f"{name}.duration.ms"]
        assert metric_log.data[0].value == 1
        assert all(isinstance(point.value, int) and point.group_name == "torchelastic" for point in metric_log.data)
        assert (work.__name__, work.__doc__) == ("work", "What it does.")

    def test_a_function_of_a_module(self, impl: Implementation, metric_log: MetricLog) -> None:
        assert impl("metrics").prof(function_of_module)() == "done"
        name = "test_telemetry.function_of_module"
        assert metric_log.names() == [f"{name}.success", f"{name}.duration.ms"]

    def test_failure(self, impl: Implementation, metric_log: MetricLog) -> None:
        with pytest.raises(KeyError):
            impl("metrics").prof(fail)()
        assert metric_log.names() == ["test_telemetry.fail.failure", "test_telemetry.fail.duration.ms"]

    def test_a_group(self, impl: Implementation, metric_log: MetricLog) -> None:
        assert impl("metrics").prof(group="mine")(function_of_module)() == "done"
        assert {point.group_name for point in metric_log.data} == {"mine"}

    def test_names(self, impl: Implementation) -> None:
        get = impl("metrics.api")._get_metric_name
        assert get(function_of_module) == "test_telemetry.function_of_module"
        assert get(TestProf.test_names) == "TestProf.test_names"
        assert get(len) == "builtins.len"


def function_of_module() -> str:
    return "done"


def fail() -> None:
    raise KeyError


class TestDeprecated:
    def test_publish_metric(self, impl: Implementation, metric_log: MetricLog) -> None:
        with pytest.warns(FutureWarning, match="Deprecated"):
            impl("metrics").publish_metric("group", "name", 5)
        assert [(point.group_name, point.name, point.value) for point in metric_log.data] == [("group", "name", 5)]

    def test_profile(self, impl: Implementation, metric_log: MetricLog) -> None:
        with pytest.warns(FutureWarning, match="Deprecated"):
            decorate = impl("metrics").profile("group")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert decorate(function_of_module)() == "done"
            with pytest.raises(KeyError):
                decorate(fail)()
        assert len(caught) == impl.expect("one-warning", torch=4, ours=0)
        assert metric_log.names() == [
            "function_of_module.success",
            "function_of_module.duration.ms",
            "fail.failure",
            "fail.duration.ms",
        ]
