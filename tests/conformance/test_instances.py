"""Our objects in a program that was written for torch, and torch's objects where ours are expected.

torch is loaded here. The other half, a process without torch, is in ``test_without_torch.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs, workers
from tests.conformance.implementations import OURS, TORCH, Implementation
from tests.conformance.samples import SAMPLES, Store
from tests.support.torch_versions import has

if TYPE_CHECKING:
    from pathlib import Path

torchs, ours = Implementation(TORCH), Implementation(OURS)

# Made here and used here: what is given to an agent, and what nobody gets from one.
OWN_CLASSES = {
    "_RoleInstanceInfo",
    "ErrorHandler",
    "HealthCheckServer",
    "LaunchConfig",
    "MetricData",
    "MetricStream",
    "MetricsConfig",
    "NumaOptions",
    "RendezvousHandlerRegistry",
    "RendezvousParameters",
    "SubprocessHandler",
    "TailLog",
    "elastic_launch",
}


def classes_of(name: str) -> tuple[Any, Any]:
    path, _, cls = name.partition(":")
    return getattr(torchs(path), cls), getattr(ours(path), cls)


@pytest.mark.parametrize("name", SAMPLES)
def test_is_of_torchs_class_too(name: str, impl: Implementation) -> None:
    theirs, own = classes_of(name)
    made = SAMPLES[name](impl)
    assert isinstance(made, impl(name.partition(":")[0]).__dict__.get(own.__name__, own))
    if own.__name__ in OWN_CLASSES:
        assert isinstance(made, theirs) == impl.expect("own-classes", torch=True, ours=False)
    else:
        assert isinstance(made, theirs)


@pytest.mark.parametrize("name", SAMPLES)
def test_looks_like_its_own_class(name: str) -> None:
    _, own = classes_of(name)
    made = SAMPLES[name](ours)
    kind = type(made)
    assert isinstance(made, own)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == (own.__name__, own.__qualname__, own.__module__)
    assert kind.__module__.startswith("ferroelastic.")


@pytest.mark.parametrize("name", SAMPLES)
def test_looks_like_torchs(name: str) -> None:
    theirs, own = classes_of(name)
    has_more = own.__name__ in {"RunProcsResult", "LaunchConfig"}  # a field
    has_more |= own.__name__ in {"WorkerSpec", "LogsDest"} and not has("filtered-files")
    is_laid_out_otherwise = own.__name__ == "ChildFailedError"  # "tidy-report"
    if theirs.__repr__ is not object.__repr__ and not has_more and not is_laid_out_otherwise:
        assert repr(SAMPLES[name](ours)) == repr(SAMPLES[name](torchs))


NOT_PICKLED = {"SubprocessContext", "MultiprocessContext", "SubprocessHandler"}


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.partition(":")[2] not in NOT_PICKLED])
@pytest.mark.parametrize("how", ["pickle", "copy", "deepcopy"])
def test_copies(name: str, how: str) -> None:
    ways = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "copy": copy.copy, "deepcopy": copy.deepcopy}
    theirs, own = classes_of(name)
    made = SAMPLES[name](ours)
    again = ways[how](made)
    assert type(again) is type(made)
    assert isinstance(again, theirs) == isinstance(made, theirs)
    if own.__eq__ is not object.__eq__:
        assert again == made
    if isinstance(made, BaseException):
        assert (again.args, str(again)) == (made.args, str(made))
        assert vars(again).keys() == vars(made).keys()


def test_dataclasses_stay_usable() -> None:
    result = SAMPLES["agent.server.api:RunResult"](ours)
    assert dataclasses.replace(result, return_values={1: 2}).return_values == {1: 2}
    assert isinstance(dataclasses.replace(result), torchs.agent.RunResult)
    assert list(dataclasses.asdict(result)) == ["state", "return_values", "failures"]


# ---- ours, caught and recorded by code for torch


def test_a_failed_launch_is_caught_as_torchs(tmp_path: Path) -> None:
    config = ours.launcher.api.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=1,
        run_id="run",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
        logs_specs=ours.mp.DefaultLogsSpecs(str(tmp_path)),
    )
    with pytest.raises(torchs.errors.ChildFailedError) as raised:
        ours.launcher.api.elastic_launch(config, workers.raise_error)("boom")
    rank, failure = raised.value.get_first_failure()
    assert isinstance(raised.value, ours.errors.ChildFailedError)
    assert isinstance(failure, torchs.errors.ProcessFailure)
    assert (rank, failure.message["message"]) == (0, "ValueError: boom")


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.endswith(("Error", "Exception"))])
def test_errors_are_caught_as_torchs(name: str) -> None:
    theirs, own = classes_of(name)
    made = SAMPLES[name](ours)
    with pytest.raises(theirs) as raised:
        raise made
    assert raised.value is made
    assert isinstance(made, own)


def test_an_error_that_is_raised_as_a_class() -> None:
    with pytest.raises(torchs.rendezvous.RendezvousError):
        raise ours.rendezvous.RendezvousClosedError


def test_a_users_error_that_is_derived_from_ours() -> None:
    class TooSlowError(ours.rendezvous.RendezvousTimeoutError):  # type: ignore[misc,name-defined]  # the class is not known to mypy
        def __init__(self, seconds: int) -> None:
            super().__init__(f"after {seconds} s")
            self.seconds = seconds

    with pytest.raises(torchs.rendezvous.RendezvousTimeoutError, match="after 5 s"):
        raise TooSlowError(5)


@pytest.mark.parametrize("recorder", [torchs, ours], ids=repr)
@pytest.mark.parametrize("raiser", [torchs, ours], ids=repr)
def test_each_records_the_failures_of_the_other(
    recorder: Implementation, raiser: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child.json").write_text('{"message": {"message": "boom", "extraInfo": {"timestamp": "1"}}}')
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "mine.json"))
    failure = raiser.errors.ProcessFailure(0, 1, 9, str(tmp_path / "child.json"))

    def main() -> None:
        raise raiser.errors.ChildFailedError("x", {0: failure})

    with pytest.raises(raiser.errors.ChildFailedError):
        recorder.errors.record(main)()
    assert json.loads((tmp_path / "mine.json").read_text())["message"]["errorCode"] == 9


@pytest.mark.parametrize("reader", [torchs, ours], ids=repr)
@pytest.mark.parametrize("writer", [torchs, ours], ids=repr)
def test_each_reads_the_records_of_the_other(
    reader: Implementation, writer: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(ZeroDivisionError):
        writer.errors.record(divmod)(1, 0)
    failure = reader.errors.ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))
    assert failure.message["message"].startswith("ZeroDivisionError")


@pytest.mark.parametrize("receiver", [torchs, ours], ids=repr)
@pytest.mark.parametrize("sender", [torchs, ours], ids=repr)
def test_each_reads_the_events_of_the_other(receiver: Implementation, sender: Implementation) -> None:
    event = receiver("events").Event.deserialize(SAMPLES["events.api:Event"](sender).serialize())
    assert (event.name, event.source, event.metadata) == ("x", "AGENT", {"a": 1})


def test_a_report_of_torchs_error_with_our_failures() -> None:
    failures = {rank: ours.errors.ProcessFailure(rank, 1, -9, "") for rank in range(2)}
    error = torchs.errors.ChildFailedError("train.py", failures)
    assert error.get_first_failure()[0] == 0
    assert "Signal 9 (SIGKILL) received by PID 1" in str(error)


# ---- torch's objects, given to ours


def test_torchs_values_are_understood() -> None:
    std = torchs.mp.Std
    assert ours.mp.to_map(std.OUT, 2) == {0: std.OUT, 1: std.OUT}
    assert ours.agent.RunResult(torchs.agent.WorkerState.FAILED).is_failed()
    assert ours.agent.WorkerState.is_running(torchs.agent.WorkerState.HEALTHY)
    event = torchs("events").Event("x", torchs("events").EventSource.AGENT)
    assert ours("events").Event.deserialize(event) is event


def test_torchs_specification_and_logs(tmp_path: Path, store: Any) -> None:
    """A program that makes everything but the agent with torch."""
    std = torchs.mp.Std
    specs = torchs.mp.DefaultLogsSpecs(str(tmp_path / "logs"), std.ALL)
    spec = stubs.spec(torchs, stubs.rendezvous(torchs, store), entrypoint="/bin/sh", args=("-c", "echo hi"))
    result = ours("agent.server.local_elastic_agent").LocalElasticAgent(spec, specs).run()
    assert isinstance(result, torchs.agent.RunResult)
    assert (result.state, result.return_values) == (torchs.agent.WorkerState.SUCCEEDED, {0: None})
    (log,) = tmp_path.glob("logs/*/attempt_0/0/stdout.log")
    assert log.read_text() == "hi\n"


def test_torchs_rendezvous(tmp_path: Path) -> None:
    """torch's own handler with its keep-alives, under our agent."""
    params = torchs.rendezvous.RendezvousParameters("c10d", "localhost:0", "run", 1, 1)
    handler = torchs("rendezvous.registry").get_rendezvous_handler(params)
    spec = stubs.spec(ours, handler, entrypoint="/bin/sh", args=("-c", "exit $RANK"))
    module = ours("agent.server.local_elastic_agent")
    try:
        result = module.LocalElasticAgent(spec, ours.mp.DefaultLogsSpecs(str(tmp_path))).run()
        assert not result.is_failed()
    finally:
        handler.shutdown()


@pytest.mark.parametrize("name", ["RendezvousGracefulExitError", "RendezvousClosedError"])
def test_torchs_errors_of_a_rendezvous(name: str, store: Any) -> None:
    handler = stubs.rendezvous(torchs, store)
    handler.errors.append(getattr(torchs.rendezvous, name)("from torch"))
    agent = stubs.agent_class(ours)(stubs.spec(ours, handler))
    if name == "RendezvousGracefulExitError":
        assert agent.run().state == "SUCCEEDED"
    else:
        with pytest.raises(torchs.rendezvous.RendezvousClosedError):
            agent.run()


def test_torchs_signal_exception(store: Any) -> None:
    error = torchs.mp.SignalException("told to end", signal.SIGINT)
    agent = stubs.agent_class(ours)(stubs.spec(ours, stubs.rendezvous(ours, store)), [error])
    with pytest.raises(torchs.mp.SignalException) as raised:
        agent.run()
    assert raised.value is error
    assert agent.calls == ["start", ("shutdown", signal.SIGINT, 30)]


def test_a_subclass_that_was_written_for_torch(store: Any) -> None:
    """Only the base class is ours; what it returns is torch's, as its imports say."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    class RemoteAgent(ours.agent.SimpleElasticAgent):  # type: ignore[misc,name-defined]  # the class is not known to mypy
        attempts = 0

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            type(self).attempts += 1
            return {worker.local_rank: f"host:{worker.global_rank}" for worker in worker_group.workers}

        def _stop_workers(self, worker_group: Any, is_restart: bool = False) -> None:
            assert worker_group.state in {WorkerState.FAILED, WorkerState.HEALTHY}

        def _monitor_workers(self, worker_group: Any) -> RunResult:
            if self.attempts == 1:
                failure = ProcessFailure(local_rank=0, pid=7, exitcode=1, error_file="")
                return RunResult(state=WorkerState.FAILED, failures={0: failure})
            return RunResult(state=WorkerState.SUCCEEDED, return_values={0: "value"})

        def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
            pass

    agent = RemoteAgent(spec=stubs.spec(torchs, stubs.rendezvous(torchs, store)), exit_barrier_timeout=1)
    assert isinstance(agent, torchs.agent.SimpleElasticAgent)
    assert issubclass(RemoteAgent, torchs.agent.ElasticAgent)
    result = agent.run()
    assert isinstance(result, RunResult)
    assert result.return_values == {0: "value"}
    assert agent.get_worker_group().state == WorkerState.SUCCEEDED
    assert isinstance(agent.get_worker_group(), torchs.agent.WorkerGroup)
    assert all(isinstance(worker, torchs.agent.Worker) for worker in agent.get_worker_group().workers)
    assert agent._remaining_restarts == 2


def test_a_running_context_is_torchs(tmp_path: Path) -> None:
    context = ours.mp.start_processes(
        "x", "/bin/true", {0: ()}, {0: {}}, torchs.mp.DefaultLogsSpecs(str(tmp_path), torchs.mp.Std.OUT)
    )
    assert isinstance(context, torchs.mp.SubprocessContext)
    result = context.wait(60)
    assert isinstance(result, torchs.mp.RunProcsResult)
    assert not result.is_failed()


# ---- between processes with and without torch


@pytest.mark.parametrize("name", ["agent.server.api:RunResult", "multiprocessing.errors:ChildFailedError"])
def test_objects_pickled_beside_torch_are_read_without_torch(name: str, tmp_path: Path) -> None:
    made = SAMPLES[name](ours)
    (tmp_path / "pickle").write_bytes(pickle.dumps(made))
    code = (
        "import pickle, sys\n"
        f"made = pickle.load(open({str(tmp_path / 'pickle')!r}, 'rb'))\n"
        "assert 'torch' not in sys.modules\n"
        "print(repr(made))\n"
        "sys.stdout.flush()\n"
        "pickle.dump(made, sys.stderr.buffer)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, timeout=60, check=True
    )
    assert ended.stdout.decode() == repr(made) + "\n"
    assert isinstance(pickle.loads(ended.stderr), classes_of(name)[0])


def test_a_store_that_is_only_a_store() -> None:
    """What an agent asks of a store is a protocol, not a class."""
    info = ours.rendezvous.RendezvousInfo(Store(), 0, 1, ours.rendezvous.RendezvousStoreInfo("h", 1))
    assert info.store == Store()
