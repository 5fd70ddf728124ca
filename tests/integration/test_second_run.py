"""An agent that runs again, over the rendezvous of this package: each run is a job of its own."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec, WorkerState
from ferroelastic.multiprocessing import DefaultLogsSpecs, SignalException
from ferroelastic.rendezvous import RendezvousParameters
from ferroelastic.rendezvous._native import NativeRendezvous

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE_S = 60


class Nodes:
    """Agents of one job, which run in turn; the first one hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handlers: list[NativeRendezvous] = []

    def add(self, script: str, *, backend: str = "c10d", nodes: int = 1, **fields: Any) -> LocalElasticAgent:
        rank = len(self.handlers)
        port = 0 if rank == 0 else self.handlers[0]._port
        options: dict[str, Any] = {} if backend == "static" else {"is_host": rank == 0}
        parameters = RendezvousParameters(
            backend,
            f"127.0.0.1:{port}",
            "the-job",
            nodes,
            nodes,
            rank=rank,
            **options,
        )
        self.handlers.append(NativeRendezvous(parameters))
        spec = WorkerSpec(
            **{"role": "trainer", "local_world_size": 1, "max_restarts": 0, "monitor_interval": 600, **fields},
            rdzv_handler=self.handlers[-1],
            entrypoint="/bin/sh",
            args=("-c", script),
        )
        logs = DefaultLogsSpecs(str(self.folder / f"logs.{rank}"))
        return LocalElasticAgent(spec, logs, exit_barrier_timeout=PATIENCE_S)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    for handler in reversed(made.handlers):
        handler.shutdown()


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_it_succeeds_again(nodes: Nodes, backend: str) -> None:
    agent = nodes.add("exit 0", backend=backend)
    assert [agent.run().state for _ in range(3)] == [WorkerState.SUCCEEDED] * 3


def test_it_fails_again_and_may_succeed_then(nodes: Nodes, tmp_path: Path) -> None:
    script = f"[ -e {tmp_path}/good ] || {{ echo $TORCHELASTIC_RESTART_COUNT >> {tmp_path}/counts; exit 3; }}"
    agent = nodes.add(script, max_restarts=1)
    assert [agent.run().state for _ in range(2)] == [WorkerState.FAILED] * 2
    assert agent.job_exit_code == 3
    assert (tmp_path / "counts").read_text().split() == ["0", "1", "0", "1"]
    (tmp_path / "good").touch()
    assert agent.run().state == WorkerState.SUCCEEDED
    assert agent.job_exit_code is None


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_two_nodes_run_again(nodes: Nodes, backend: str, first: int) -> None:
    """Whichever comes first: the one that hosted the former job hosts the next one."""
    agents = [nodes.add("exit 0", backend=backend, nodes=2) for _ in range(2)]
    assert run_together([agents[0].run, agents[1].run]) == [WorkerState.SUCCEEDED] * 2
    # The second of them starts when the first one looks for the other.
    is_waiting = threading.Event()
    handler: Any = nodes.handlers[first]
    begin = handler.begin

    def begin_and_tell() -> None:
        is_waiting.set()
        begin()

    handler.begin = begin_and_tell

    def run_second() -> Any:
        assert is_waiting.wait(PATIENCE_S)
        return agents[1 - first].run()

    assert run_together([agents[first].run, run_second]) == [WorkerState.SUCCEEDED] * 2


def run_together(runs: list[Callable[[], Any]]) -> list[Any]:
    outcomes: list[Any] = [None] * len(runs)

    def keep(number: int, run: Callable[[], Any]) -> None:
        try:
            outcomes[number] = run().state
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            outcomes[number] = error

    threads = [threading.Thread(target=keep, args=one) for one in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return outcomes


def test_a_signal_in_the_second_rendezvous_is_not_the_success_of_the_first_run(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = nodes.add("exit 0")
    assert agent.run().state == WorkerState.SUCCEEDED

    def be_told_to_end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(nodes.handlers[0], "begin", be_told_to_end)
    with pytest.raises(SignalException):
        agent.run()
