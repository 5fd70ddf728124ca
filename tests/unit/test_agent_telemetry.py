"""The events and metrics of an agent."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.support.fake_agent import Agent, S, spec

from ferroelastic import events
from ferroelastic.agent.server import RunResult, Worker, WorkerState, api
from ferroelastic.agent.server.api import _get_fq_hostname

if TYPE_CHECKING:
    from collections.abc import Iterator


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append(json.loads(record.getMessage()))


@pytest.fixture
def collector() -> Iterator[Collector]:
    """The handler of the destination ``"test"``."""
    collector = Collector()
    with (
        mock.patch.dict("ferroelastic.events.handlers._log_handlers", test=collector),
        mock.patch.dict(events._events_loggers),
    ):
        yield collector
    logging.getLogger("torchelastic-events-test").handlers.clear()


def torchs(collector: Collector) -> list[dict[str, Any]]:
    """The events that torch has too."""
    return [event for event in collector.events if event["name"].startswith("torchelastic.")]


class TestEvents:
    def test_a_run_is_recorded(self, collector: Collector) -> None:
        Agent(spec(event_log_handler="test"), S.SUCCEEDED).run()
        assert [event["metadata"]["state"] for event in torchs(collector)] == [
            "RENDEZVOUS",
            "ASSIGN_WORKER_RANKS",
            "START",
            "START",
            "SUCCEEDED",
            "SUCCEEDED",
        ]
        phases = [event["metadata"] for event in collector.events if event["name"] == "ferroelastic.phase"]
        assert [phase["phase"] for phase in phases] == ["rendezvous", "spawn", "exit_barrier", "total"]
        assert all(phase["duration_ms"] >= 0 and phase["round"] == 1 for phase in phases)
        worker = torchs(collector)[-1]
        assert (worker["name"], worker["source"]) == ("torchelastic.worker.status.SUCCEEDED", "WORKER")
        assert worker["metadata"] | {"total_run_time": 0} == {
            "run_id": "run",
            "global_rank": 1,
            "group_rank": 0,
            "worker_id": "1001",
            "role": "trainer",
            "hostname": _get_fq_hostname(),
            "state": "SUCCEEDED",
            "total_run_time": 0,
            "rdzv_backend": "memory",
            "raw_error": None,
            "metadata": worker["metadata"]["metadata"],
            "agent_restarts": 0,
            "duration_ms": None,
        }
        assert json.loads(worker["metadata"]["metadata"]) == {
            "group_world_size": 1,
            "entry_point": "true",
            "local_rank": [1],
            "role_rank": [1],
            "role_world_size": [2],
            "exit_code": [None],
            "worker_pid": [None],
        }
        assert collector.events[0]["metadata"]["duration_ms"] >= 0

    def test_failed_and_terminated_workers_are_distinguished(self, collector: Collector) -> None:
        Agent(spec(event_log_handler="test", max_restarts=0), S.FAILED).run()
        failed, terminated = torchs(collector)[-2:]
        assert (failed["metadata"]["state"], terminated["metadata"]["state"]) == ("FAILED", "TERMINATED")
        assert json.loads(failed["metadata"]["metadata"])["exit_code"] == [1]
        assert json.loads(failed["metadata"]["metadata"])["worker_pid"] == [999]
        assert json.loads(failed["metadata"]["raw_error"])["message"] == "<NONE>"

    def test_a_worker_of_unknown_fate_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="Unknown worker: 7"):
            Agent(spec())._get_worker_state(Worker(0, 7), RunResult(S.SUCCEEDED))

    def test_the_agents_own_events(self) -> None:
        agent = Agent(spec(max_restarts=4))
        agent._remaining_restarts = 2
        succeeded = agent.get_event_succeeded()
        assert (succeeded.source, succeeded.metadata["state"]) == ("AGENT", "SUCCEEDED")
        assert succeeded.metadata["agent_restarts"] == 2
        try:
            raise ValueError("reason")
        except ValueError:
            failed = agent.get_event_failed()
        assert failed.metadata["state"] == "FAILED"
        assert "ValueError: reason" in str(failed.metadata["raw_error"])

    def test_nobody_waits_for_dns_for_an_event_that_nobody_reads(self, collector: Collector) -> None:
        null = events._get_or_create_logger("null")
        with mock.patch.object(api, "_get_fq_hostname", return_value="from.dns") as lookup:
            with mock.patch.object(null, "handlers", [logging.NullHandler()]):  # the test's own log capture listens too
                Agent(spec(), S.SUCCEEDED).run()
            lookup.assert_not_called()
            assert Agent(spec(event_log_handler="test")).get_event_succeeded().metadata["hostname"] == "from.dns"
            assert Agent(spec(event_log_handler="none")).get_event_succeeded().metadata["hostname"] == "from.dns"


class TestMetrics:
    @staticmethod
    def published(agent: Agent, result: RunResult) -> dict[str, int]:
        with mock.patch.object(api, "put_metric") as put:
            agent._record_metrics(result)
        return {call.args[0].removeprefix("workers.trainer."): call.args[1] for call in put.call_args_list}

    @pytest.mark.parametrize(
        ("state", "remaining", "counted"),
        [
            (S.SUCCEEDED, 10, "run_success_no_retries"),
            (S.SUCCEEDED, 2, "run_success_with_retries"),
            (S.FAILED, 10, "run_failed_no_retries"),
            (S.FAILED, 2, "run_failed_with_retries"),
        ],
    )
    def test_runs_are_counted(self, state: WorkerState, remaining: int, counted: str) -> None:
        agent = Agent(spec(max_restarts=10))
        agent._remaining_restarts = remaining
        found = self.published(agent, RunResult(state))
        assert found.pop("run_total") == 1
        found.pop("flakiness")
        assert {name for name, value in found.items() if value} == {counted}
        assert len(found) == 4

    @pytest.mark.parametrize(
        ("maximum", "remaining", "failed", "flakiness"),
        [(1, 1, False, 0), (10, 3, False, 63), (0, 0, False, 0), (1, 1, True, 100)],
    )
    def test_flakiness(self, maximum: int, remaining: int, failed: bool, flakiness: int) -> None:
        agent = Agent(spec(max_restarts=maximum))
        agent._remaining_restarts = remaining
        with mock.patch.object(api, "put_metric") as put:
            agent._record_flakiness_metric(failed)
        put.assert_called_once_with("workers.trainer.flakiness", flakiness)
