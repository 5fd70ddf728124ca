"""An agent whose workers are pretended, with a rendezvous in memory."""

from __future__ import annotations

import signal
from collections import deque
from typing import Any

from tests.support.memory_store import MemoryStore
from tests.support.rendezvous_handlers import QuietHandler

from ferroelastic.agent.server import RunResult, SimpleElasticAgent, WorkerGroup, WorkerSpec, WorkerState
from ferroelastic.multiprocessing.errors import ProcessFailure
from ferroelastic.rendezvous import RendezvousInfo, RendezvousStoreInfo


class Handler(QuietHandler):
    """One round after the other, each with a store of its own."""

    renews_store = True

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size, self.rounds, self.waiting = rank, world_size, 0, deque[int]()
        self.store = MemoryStore()

    def next_rendezvous(self) -> RendezvousInfo:
        self.rounds += 1
        store = self.store.below(str(self.rounds))
        return RendezvousInfo(store, self.rank, self.world_size, RendezvousStoreInfo("host", 29000 + self.rounds))

    def num_nodes_waiting(self) -> int:
        return self.waiting.popleft() if self.waiting else 0


class Agent(SimpleElasticAgent):
    """Pretends to have workers whose states are given."""

    def __init__(self, spec: WorkerSpec, *states: WorkerState | RunResult, **more: Any) -> None:
        super().__init__(spec, **more)
        self.results = deque(states)
        self.waits: list[float] = []
        self.started = self.stopped = 0
        self.shutdowns: list[tuple[Any, Any]] = []

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.started += 1
        return {worker.local_rank: 1000 + worker.global_rank for worker in worker_group.workers}

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self.stopped += 1

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = self.results.popleft()
        return result if isinstance(result, RunResult) else result_of(result, worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self.shutdowns.append((death_sig, timeout))

    def _wait_for_event(self, timeout_s: float) -> None:
        self.waits.append(timeout_s)


def result_of(state: WorkerState, group: WorkerGroup) -> RunResult:
    ranks = [worker.global_rank for worker in group.workers]
    if state == WorkerState.SUCCEEDED:
        return RunResult(state, return_values=dict.fromkeys(ranks))
    if state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
        return RunResult(state, failures={ranks[0]: ProcessFailure(0, 999, 1, "none")})
    return RunResult(state)


def spec(**more: Any) -> WorkerSpec:
    return WorkerSpec(
        **{"role": "trainer", "local_world_size": 2, "rdzv_handler": Handler(), "entrypoint": "/bin/true", **more}
    )


S = WorkerState
