"""The explanation of a run, without processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from ferroelastic._failure.model import FirstFailure, encode_detail
from ferroelastic.agent.server._activity import Activity
from ferroelastic.agent.server._explaining import Explainer
from ferroelastic.agent.server._workers import RunResult, WorkerState
from ferroelastic.multiprocessing.errors import ProcessFailure
from ferroelastic.rendezvous import JobFailedError, RendezvousConnectionError, RendezvousTimeoutError
from ferroelastic.rendezvous._notifying import Interruption

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXT = 'Traceback (most recent call last):\n  File "train.py", line {line}, in f\n    f()\nValueError: rank {rank}\n'


class Context:
    """The processes of a node, all of which have ended."""

    native_group = None

    def __init__(self, stderrs: dict[int, str]) -> None:
        self.stderrs = stderrs

    def pids(self) -> dict[int, int]:
        return {rank: 100 + rank for rank in self.stderrs}

    def stderr_tail(self, local_rank: int) -> bytes:
        return self.stderrs[local_rank].encode()


class Agent:
    def __init__(self, folder: Path, max_restarts: int = 0) -> None:
        handler = SimpleNamespace(get_run_id=lambda: "run")
        spec = SimpleNamespace(
            rdzv_handler=handler, entrypoint="train.py", args=(), role="default", max_restarts=max_restarts
        )
        group: Any = SimpleNamespace(spec=spec, group_rank=0)
        self.activity = Activity()
        self.explainer = Explainer(cast("Any", group), self.activity)
        self.job_exit_code: int | None = None
        self.job_failure: Any = None
        self._logs_specs = SimpleNamespace(_run_log_dir=str(folder))
        self.context = Context({rank: TEXT.format(line=7 if rank == 2 else 3, rank=rank) for rank in range(4)})

    def run(self, end: Callable[[], RunResult]) -> Any:
        def run() -> RunResult:
            self.explainer.started(self.context, None, None)  # type: ignore[arg-type]  # has all that is needed
            return end()

        self.explainer.explained(self, run)
        return self.job_failure


def failed(*ranks: int, code: int = 1) -> RunResult:
    # The time of a failure without a native exit is that of its creation.
    failures = {rank: ProcessFailure(rank, 100 + rank, code, error_file="") for rank in ranks}
    for rank, failure in failures.items():
        failure._failed_at_ns = rank  # type: ignore[attr-defined]
    return RunResult(WorkerState.FAILED, failures=failures)


def raising(error: Exception) -> Callable[[], RunResult]:
    def end() -> RunResult:
        raise error

    return end


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


def test_the_first_failure_and_those_like_it(agent: Agent) -> None:
    failure = agent.run(lambda: failed(3, 1, 2))
    assert (failure.first.rank, failure.first.exception.message) == (1, "rank 1")
    assert (failure.others.failed, failure.others.same_failure) == (2, [3])  # rank 2 failed on another line
    assert (failure.job.name, failure.job.exit_code, failure.decision) == (
        "train.py",
        1,
        "no restart is allowed (--max-restarts=0)",
    )
    assert failure.advice is None


def test_a_success_has_no_explanation(agent: Agent) -> None:
    assert agent.run(lambda: RunResult(WorkerState.SUCCEEDED)) is None


def test_restarts_are_listed_and_forgotten_with_the_next_run(agent: Agent) -> None:
    def end() -> RunResult:
        agent.activity.restarting("failure", "rank 1 exited with code 1")
        return failed(1)

    assert [restart.cause for restart in agent.run(end).restarts] == ["rank 1 exited with code 1"]
    assert agent.run(lambda: failed(1)).restarts == []


def test_a_worker_of_another_node_failed_first(agent: Agent) -> None:
    other = FirstFailure(rank=9, host="node2", pid=7, kind="exit", exit_code=5)

    def end() -> RunResult:
        agent.job_exit_code = 5
        agent.explainer.judged(Interruption(True, True, "text", 5, None, encode_detail(other)))
        return failed(1, 3)

    failure = agent.run(end)
    assert (failure.first, failure.job.exit_code) == (other, 5)
    assert (failure.others.failed, failure.others.same_failure) == (2, [])


def test_the_end_of_the_job_on_another_node(agent: Agent) -> None:
    first = FirstFailure(rank=9, host="node2", pid=7, kind="exit", exit_code=5)
    error = JobFailedError("the job has ended: rank 9", 5, detail=encode_detail(first))
    with pytest.raises(JobFailedError) as raised:
        agent.run(raising(error))
    assert raised.value.job_failure is agent.job_failure  # type: ignore[attr-defined]
    assert (agent.job_failure.first, agent.job_failure.job.exit_code) == (first, 5)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (JobFailedError("the job has ended: it left", 1), "agent"),
        (JobFailedError("the job has ended: broken", 1, detail="{"), "agent"),
        (JobFailedError("the job has ended: node1 was lost", 1, is_loss=True), "lost_node"),
        (RendezvousTimeoutError("at least 2 nodes must join"), "lost_node"),
        (RendezvousConnectionError("the host was not reached"), "lost_node"),
    ],
)
def test_ends_without_a_failed_worker(agent: Agent, error: Exception, kind: str) -> None:
    with pytest.raises(type(error)):
        agent.run(raising(error))
    first = agent.job_failure.first
    assert (first.kind, first.rank, first.reason) == (kind, None, str(error))


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("no disk")])
def test_other_errors_are_not_failures_of_the_job(agent: Agent, error: Exception) -> None:
    with pytest.raises(type(error)):
        agent.run(raising(error))
    assert agent.job_failure is None


def test_an_error_before_the_workers_started_is_not_a_failure_of_the_job(agent: Agent) -> None:
    with pytest.raises(RendezvousTimeoutError):
        agent.explainer.explained(agent, raising(RendezvousTimeoutError("nobody came")))
    assert agent.job_failure is None


def test_a_fault_of_the_collection_hides_nothing(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferroelastic._failure.collect.find_exception", lambda *_: 1 / 0)
    failure = agent.run(lambda: failed(1, code=3))
    assert (failure.first.rank, failure.first.exit_code, failure.first.pid) == (1, 3, 101)
    monkeypatch.setattr(Context, "stderr_tail", lambda *_: 1 / 0)
    assert agent.run(lambda: failed(1, code=3)).first.exit_code == 3
    monkeypatch.setattr("ferroelastic._failure.save.save", lambda *_: 1 / 0)
    assert agent.run(lambda: failed(1)) is None


def test_a_stuck_worker_and_a_line_that_fails_the_job(agent: Agent) -> None:
    result = failed(1)
    result.state = WorkerState.UNHEALTHY
    result.failures[1].message = "Worker pid=101 stuck"
    failure = agent.run(lambda: result)
    assert (failure.first.kind, failure.first.reason) == ("stuck", "Worker pid=101 stuck")
    agent.context.log_failures = {1: "NaN in the loss"}  # type: ignore[attr-defined]
    first = agent.run(lambda: failed(1)).first
    assert (first.kind, first.reason) == ("log_pattern", "NaN in the loss")
