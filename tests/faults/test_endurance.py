"""An agent that has restarted its workers many times is as small as it was."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from tests.faults.alone import AloneRendezvous

from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec, WorkerState
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std

pytestmark = pytest.mark.engine

RESTARTS = 50
WARM_UP = 10
GROWTH_BYTES = 1 << 20


class Size(NamedTuple):
    descriptors: int
    threads: int
    children: int
    resident_bytes: int


def measure() -> Size:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Size(
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=int(status["Threads"]),
        children=len(psutil.Process().children()),
        resident_bytes=int(status["VmRSS"].split()[0]) << 10,
    )


class CountingAgent(LocalElasticAgent):
    """Takes its own measure at the beginning of each attempt, when the workers of the former one are to be gone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: list[Size] = []

    def _rendezvous(self, worker_group: Any) -> None:
        self.sizes.append(measure())
        super()._rendezvous(worker_group)


@pytest.mark.parametrize("tee", [Std.NONE, Std.ALL], ids=["quiet", "tee"])
def test_many_restarts_leave_nothing_in_the_agent(tmp_path: Path, zoo: str, tee: Std) -> None:
    spec = WorkerSpec(
        role="endurance",
        local_world_size=4,
        rdzv_handler=AloneRendezvous(),
        entrypoint="/bin/sh",
        # The last rank fails, the others are stopped; one leaves a child in its group.
        args=("-c", f"case $RANK in 3) exit 1;; 2) {zoo} orphan 0 > /dev/null;; esac; exec {zoo} sleep"),
        max_restarts=RESTARTS,
    )
    agent = CountingAgent(spec, DefaultLogsSpecs(str(tmp_path / "logs"), tee=tee))
    result = agent.run()
    assert result.state == WorkerState.FAILED
    assert len(agent.sizes) == RESTARTS + 1

    before, after = agent.sizes[WARM_UP], agent.sizes[-1]
    assert after[:3] == before[:3]
    assert {size[:3] for size in agent.sizes[WARM_UP:]} == {before[:3]}
    assert after.resident_bytes - before.resident_bytes < GROWTH_BYTES
