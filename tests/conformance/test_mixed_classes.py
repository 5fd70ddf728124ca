"""Objects of torch's own classes, and of older ones, within our agent: code that is written for torch makes them."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs, workers
from tests.conformance.implementations import OURS, TORCH, Implementation

from ferroelastic._exit_codes import exit_code
from ferroelastic.agent.server import _watchdog
from ferroelastic.agent.server._activity import cause_of, exit_code_of, failed_first_at_ns
from ferroelastic.multiprocessing.errors._failures import exit_of, failed_at_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.uses_torch, pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")]
torchs, ours = Implementation(TORCH), Implementation(OURS)


@pytest.fixture
def impl() -> Implementation:
    return ours


@pytest.fixture
def torchs_workers(tmp_path: Path, store: Any) -> Iterator[Callable[..., Any]]:
    """Build an agent of ours that starts its workers through torch, as agents derived from torch's do."""
    agents: list[Any] = []
    local_agent: Any = ours("agent.server.local_elastic_agent").LocalElasticAgent

    class DerivedAgent(local_agent):  # type: ignore[misc]  # any class
        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            spec = worker_group.spec
            self._pcontext = torchs.mp.start_processes(
                name=spec.role,
                entrypoint=spec.entrypoint,
                args={worker.local_rank: spec.args for worker in worker_group.workers},
                envs={worker.local_rank: self._worker_env(worker_group, worker) for worker in worker_group.workers},
                logs_specs=self._logs_specs,
                start_method="fork",
            )
            return dict(self._pcontext.pids())

    def build(entrypoint: Any, *args: Any, spec_class: Any = None, **fields: Any) -> Any:
        options = {"max_restarts": 0, "monitor_interval": 0.02, **fields}
        spec = (spec_class or torchs.agent.WorkerSpec)(
            "trainer", 2, stubs.rendezvous(ours, store), entrypoint=entrypoint, args=args, **options
        )
        logs = torchs.mp.DefaultLogsSpecs(str(tmp_path / "logs"))
        agents.append(DerivedAgent(spec, logs, exit_barrier_timeout=60))
        return agents[-1]

    yield build
    for one in agents:
        one._shutdown(9, 5)
        one._pcontext = None


def test_failures_of_torchs_class_are_restarted_and_returned(
    torchs_workers: Callable[..., Any], tmp_path: Path
) -> None:
    counts = tmp_path / "counts"
    agent = torchs_workers(
        "/bin/sh",
        "-c",
        f"echo $TORCHELASTIC_RESTART_COUNT >> {counts}; if [ $RANK = 1 ]; then exit 42; fi; exec sleep 1000",
        max_restarts=1,
    )
    result = agent.run()
    failure = result.failures[1]
    assert type(failure) is torchs.errors.ProcessFailure
    assert failure.exitcode == 42
    assert result.is_failed()
    assert sorted(counts.read_text().split()) == ["0", "0", "1", "1"]
    error = ours.errors.ChildFailedError("train.py", {1: failure})
    assert "exitcode  : 42" in str(error)
    assert exit_code(error.get_first_failure()[1].exitcode) == 42


def test_workers_of_torchs_contexts_succeed(torchs_workers: Callable[..., Any]) -> None:
    assert torchs_workers(workers.give, 7).run().return_values == {0: 7, 1: 7}


def test_a_monitor_that_returns_torchs_result(impl: Implementation, store: Any) -> None:
    failure = torchs.errors.ProcessFailure(local_rank=0, pid=999, exitcode=-9, error_file="none")
    result = torchs.agent.RunResult(torchs.agent.WorkerState.FAILED, failures={0: failure})
    spec = stubs.spec(impl, stubs.rendezvous(impl, store), max_restarts=0, local_world_size=1)
    agent = stubs.agent_class(impl)(spec, [result])
    assert agent.run() is result
    assert cause_of(result) == "rank 0 (pid 999) was ended by SIGKILL"
    assert exit_code_of(result) == 128 + 9
    assert abs((failed_first_at_ns(result) or 0) - time.time_ns()) < 60e9


def test_a_failure_without_a_time_has_happened_by_now() -> None:
    """torch's class has 0 where an error file tells no time: no failure is of 1970."""
    failure = torchs.errors.ProcessFailure(local_rank=0, pid=999, exitcode=1, error_file="none")
    failure.timestamp = 0
    before = time.time_ns()
    assert before <= failed_at_ns(failure) <= time.time_ns()


def test_a_failure_of_a_class_with_slots() -> None:
    class Failure:
        __slots__ = ("message", "timestamp")

    failure: Any = Failure()
    failure.message, failure.timestamp = "text", 17
    assert exit_of(failure) is None
    assert failed_at_ns(failure) == 18 * 10**9 - 1


def test_the_report_of_a_hang_does_not_change_the_data_that_torchs_failures_share() -> None:
    failure = torchs.errors.ProcessFailure(local_rank=0, pid=999, exitcode=-9, error_file="none")
    expiry: Any = SimpleNamespace(
        pid=999, scope="step", expiration_time=17.0, late_ns=0, signal=9, outcome="signalled", evidence=()
    )
    _watchdog.explain(failure, expiry)
    assert "timer 'step' expired" in failure.message
    assert failure.error_file_data["message"] == failure.message
    another = torchs.errors.ProcessFailure(local_rank=0, pid=1000, exitcode=1, error_file="none")
    assert another.error_file_data["message"] == "<NONE>"


@dataclasses.dataclass
class OlderSpec:
    """What torch 2.6 has of a specification."""

    role: str
    local_world_size: int
    rdzv_handler: Any
    entrypoint: Any = None
    args: tuple[Any, ...] = ()
    max_restarts: int = 0
    monitor_interval: float = 0.02
    master_port: int | None = None
    master_addr: str | None = None
    local_addr: str | None = None

    def get_entrypoint_name(self) -> str:
        return "older"


def test_a_specification_of_an_older_torch(impl: Implementation, store: Any, tmp_path: Path) -> None:
    spec = OlderSpec("trainer", 1, stubs.rendezvous(impl, store), entrypoint=workers.give_rank)
    agent = ours("agent.server.local_elastic_agent").LocalElasticAgent(
        spec, ours.mp.DefaultLogsSpecs(str(tmp_path)), start_method="fork", exit_barrier_timeout=60
    )
    assert agent.run().return_values == {0: 0}


def test_log_files_of_an_older_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before torch 2.10 there were no filtered files."""

    class OlderLogs(torchs.mp.LogsSpecs):  # type: ignore[misc,name-defined]  # any class
        @property
        def root_log_dir(self) -> str:
            return str(tmp_path)

        def reify(self, envs: dict[int, dict[str, str]]) -> Any:
            dest = ours.mp.DefaultLogsSpecs(str(tmp_path)).reify(envs)
            names = ("stdouts", "stderrs", "tee_stdouts", "tee_stderrs", "error_files")
            return SimpleNamespace(**{name: getattr(dest, name) for name in names})

    context = ours.mp.start_processes(
        name="trainer",
        entrypoint="/bin/true",
        args={0: ()},
        envs={0: {}},
        logs_specs=OlderLogs(),
        duplicate_stdout_filters=["loss"],
    )
    assert context.wait().return_values == {0: None}
    assert "ignoring duplicate_stdout_filters: OlderLogs.reify() returned no filtered_stdout path" in caplog.text


def test_a_handler_of_a_process_without_numa_options() -> None:
    """Code written for torch before 2.9 gives six arguments."""
    handler = ours("multiprocessing.api").SubprocessHandler("/bin/sh", ("-c", "exit 3"), {}, None, None, 0)
    assert handler.proc.wait() == 3
