"""Parts of an agent that need no processes: a rendezvous, an agent that is told what to see, and two recorders."""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tests.conformance.implementations import Implementation

RUN_ID = "the-run"
MASTER = ("127.0.0.1", 4242)


def rendezvous(impl: Implementation, store: Any, rank: int = 0, world_size: int = 1, **members: Any) -> Any:
    """A handler whose every round completes at once with ``store``.

    Attributes: ``rounds``, ``waiting`` (what ``num_nodes_waiting`` says), ``is_shut_down``, ``errors`` (raised by the next rounds).
    """
    api = impl("rendezvous")

    class Handler(api.RendezvousHandler):  # type: ignore[misc,name-defined]  # whose class is known when the test runs
        use_agent_store = members.pop("use_agent_store", False)

        def __init__(self) -> None:
            self.rounds = 0
            self.waiting = 0
            self.is_shut_down = False
            self.errors: list[BaseException] = []

        def get_backend(self) -> str:
            return "stub"

        def next_rendezvous(self) -> Any:
            if self.errors:
                raise self.errors.pop(0)
            self.rounds += 1
            self.waiting = 0
            return api.RendezvousInfo(store, rank, world_size, api.RendezvousStoreInfo(*MASTER))

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            pass

        def num_nodes_waiting(self) -> int:
            return self.waiting

        def get_run_id(self) -> str:
            return RUN_ID

        def shutdown(self) -> bool:
            self.is_shut_down = True
            return True

    return Handler()


def entrypoint() -> None:
    """What the workers of a stub agent would run."""


def spec(impl: Implementation, handler: Any = None, **fields: Any) -> Any:
    """A specification; every field can be chosen."""
    chosen = {
        "role": "trainer",
        "local_world_size": 1,
        "rdzv_handler": handler,
        "entrypoint": entrypoint,
        "monitor_interval": 0.001,
        **fields,
    }
    return impl.agent.WorkerSpec(**chosen)


def agent_class(impl: Implementation) -> Any:
    """A subclass of the agent as programs write it, whose workers are a list of what monitoring them says."""
    base = impl.agent.SimpleElasticAgent

    class StubAgent(base):  # type: ignore[misc,valid-type]  # as above
        def __init__(self, spec: Any, script: Iterable[Any] = (), **options: Any) -> None:
            super().__init__(spec, **options)
            self.script = iter(script)
            self.calls: list[Any] = []

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            self.calls.append("start")
            return {worker.local_rank: worker.global_rank + 1000 for worker in worker_group.workers}

        def _stop_workers(self, worker_group: Any, **_older_options: Any) -> None:
            self.calls.append("stop")

        def _monitor_workers(self, worker_group: Any) -> Any:
            step = next(self.script)
            if callable(step):
                step = step(self)
            if isinstance(step, BaseException):
                raise step
            return step

        def _shutdown(self, death_sig: Any = 15, timeout: int = 30) -> None:
            self.calls.append(("shutdown", int(death_sig), timeout))

    return StubAgent


def succeeded(impl: Implementation, *values: Any) -> Any:
    return impl.agent.RunResult(impl.agent.WorkerState.SUCCEEDED, dict(enumerate(values)))


def failed(impl: Implementation, **failures: Any) -> Any:
    by_rank = {int(name.removeprefix("rank_")): failure for name, failure in failures.items()}
    return impl.agent.RunResult(impl.agent.WorkerState.FAILED, failures=by_rank)


def in_state(impl: Implementation, name: str) -> Any:
    return impl.agent.RunResult(impl.agent.WorkerState[name])


class MetricLog:
    """The data points that were emitted."""

    data: list[Any]

    def names(self) -> list[str]:
        return [point.name for point in self.data]

    def values(self, prefix: str = "") -> dict[str, int]:
        """The last value of each metric, durations left out."""
        return {
            point.name.removeprefix(prefix): point.value
            for point in self.data
            if point.name.startswith(prefix) and not point.name.endswith(".duration.ms")
        }


def metric_log(impl: Implementation) -> MetricLog:
    class Recorder(impl("metrics").MetricHandler, MetricLog):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            self.data = []

        def emit(self, metric_data: Any) -> None:
            self.data.append(metric_data)

    recorder: MetricLog = Recorder()
    return recorder


class EventLog(logging.Handler):
    """A handler of events that keeps them, as they are written."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @property
    def events(self) -> list[dict[str, Any]]:
        found = []
        for line in self.lines:
            event = json.loads(line)
            event.get("metadata", {})["metadata"] = json.loads(event["metadata"]["metadata"])
            found.append(event)
        return found

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["name"] == name]


def call_in_threads(functions: Iterable[Callable[[], Any]]) -> list[Any]:
    """Call all at the same time, and return what they return."""
    # Not with an executor: a process that is forked in one of its threads fails when it ends, because it joins that thread.
    calls = [_Call(function) for function in functions]
    for call in calls:
        call.start()
    for call in calls:
        call.join(60)
    return [call.result() for call in calls]


class _Call(threading.Thread):
    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._outcome: tuple[Any, BaseException | None] = (None, TimeoutError(f"{function} does not return"))

    def run(self) -> None:
        try:
            self._outcome = self._function(), None
        except BaseException as error:  # noqa: BLE001 - for the caller
            self._outcome = None, error

    def result(self) -> Any:
        value, error = self._outcome
        if error is not None:
            raise error
        return value


def launch_config(impl: Implementation, tmp_path: Path, **fields: Any) -> Any:
    """A job on this node alone."""
    std = impl.mp.Std
    specs = impl.mp.DefaultLogsSpecs(
        str(tmp_path / "logs"), std[fields.pop("redirects", "NONE")], std[fields.pop("tee", "NONE")]
    )
    chosen = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": 2,
        "run_id": "my_run",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "max_restarts": 0,
        "monitor_interval": 0.02,
        "start_method": "fork",
        "logs_specs": specs,
        **fields,
    }
    return impl.launcher.api.LaunchConfig(**chosen)
