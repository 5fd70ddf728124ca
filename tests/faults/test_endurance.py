"""An agent that has restarted its workers many times is as small as it was."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tests.support.harness import FERRORUN
from tests.support.ports import free_port
from tests.support.sizes import Size, measure
from tests.support.waiting import eventually

from ferroelastic.agent.server import LocalElasticAgent, RestartSettings, WorkerSpec, WorkerState
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std
from ferroelastic.rendezvous import RendezvousParameters
from ferroelastic.rendezvous._native import NativeRendezvous

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.harness import Job, Launcher

pytestmark = pytest.mark.engine

RESTARTS = 100
WARM_UP = 20
"""Restarts after which an agent has all that it will ever need."""
GROWTH_BYTES = 128 << 10
"""What the memory may grow by in the 80 restarts from there on. It does by 10 to 40 KiB, less and less."""

GROWTH_BLOCKS = 8
"""How many objects may be added in each restart. The test itself keeps 6."""


class Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


class InUse(NamedTuple):
    """Memory of this process that was allocated and not freed: of a leak it tells also where the leak fits into what was freed before."""

    malloc_bytes: int
    python_blocks: int


def in_use() -> InUse:
    gc.collect()
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc's
    if mallinfo is None:
        return InUse(0, sys.getallocatedblocks())
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return InUse(info.uordblks + info.hblkhd, sys.getallocatedblocks())


class CountingAgent(LocalElasticAgent):
    """Takes its own measure at the beginning of each attempt, when the workers of the former one are to be gone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: list[Size] = []
        self.in_use: list[InUse] = []

    def _rendezvous(self, worker_group: Any) -> None:
        self.in_use.append(in_use())
        self.sizes.append(measure(os.getpid()))
        super()._rendezvous(worker_group)


@pytest.fixture
def no_logging() -> Iterator[None]:
    """pytest keeps what is logged, and would grow."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("no_logging")
@pytest.mark.parametrize("tee", [Std.NONE, Std.ALL], ids=["quiet", "tee"])
def test_many_restarts_leave_nothing_in_the_agent(tmp_path: Path, zoo: str, tee: Std) -> None:
    handler = NativeRendezvous(RendezvousParameters("c10d", "localhost:0", "endurance", 1, 1))
    spec = WorkerSpec(
        role="endurance",
        local_world_size=4,
        rdzv_handler=handler,
        entrypoint="/bin/sh",
        # The last rank fails, the others are stopped; one leaves a child in its group.
        args=("-c", f"case $RANK in 3) exit 1;; 2) {zoo} orphan 0 > /dev/null;; esac; exec {zoo} sleep"),
        max_restarts=RESTARTS,
        restart_settings=RestartSettings(restart_backoff=0),
    )
    agent = CountingAgent(spec, DefaultLogsSpecs(str(tmp_path / "logs"), tee=tee))
    try:
        result = agent.run()
    finally:
        handler.shutdown()
    assert result.state == WorkerState.FAILED
    assert len(agent.sizes) == RESTARTS + 1

    before, after = agent.sizes[WARM_UP], agent.sizes[-1]
    assert {size[:3] for size in agent.sizes[WARM_UP:]} == {before[:3]}
    assert after.anonymous_bytes - before.anonymous_bytes < GROWTH_BYTES
    malloc_bytes, python_blocks = (
        last - first for first, last in zip(agent.in_use[WARM_UP], agent.in_use[-1], strict=True)
    )
    assert malloc_bytes < GROWTH_BYTES
    assert python_blocks < GROWTH_BLOCKS * (RESTARTS - WARM_UP)


# The ranks of all agents fail in turn, each when it is let.
FAIL_IN_TURN = """
echo up
if test $((TORCHELASTIC_RESTART_COUNT % WORLD_SIZE)) = "$RANK"; then read line < "$DIR/gate"; exit 1; fi
exec "$ZOO" sleep
"""
NPROC = 2


@pytest.mark.parametrize("count", [1, 2], ids=["one agent", "two agents"])
def test_many_restarts_leave_nothing_in_the_launcher(launch: Launcher, count: int) -> None:
    gate = launch.gate()
    options = ("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=job", f"--nnodes={count}")
    script = launch.shell(FAIL_IN_TURN)
    agents = [
        launch(
            f"--max-restarts={RESTARTS}",
            "--restart-backoff=0",
            "--tee=1",
            *script,
            launcher=(*FERRORUN, *options),
            nproc=NPROC,
        )
        for _ in range(count)
    ]
    before: list[Size] = []
    for attempt in range(RESTARTS + 1):
        for agent in agents:
            agent.lines(NPROC)
        if attempt == WARM_UP:
            before = [at_rest(agent, attempt) for agent in agents]
        if attempt < RESTARTS:
            gate.let_pass()
    for agent, former in zip(agents, before, strict=True):
        now = at_rest(agent, RESTARTS)
        # What is there for a moment only is waited for, on both sides.
        assert eventually(lambda a=agent, f=former: measure(a.process.pid)[:3] <= f[:3]), (former, now)  # type: ignore[misc]
        assert now.anonymous_bytes - former.anonymous_bytes < GROWTH_BYTES
    gate.let_pass()
    assert [agent.end() for agent in agents] == [1] * count, [agent.story for agent in agents]


def at_rest(agent: Job, attempt: int) -> Size:
    """The size of a launcher that is done with starting the workers of an attempt."""
    agent.settle(NPROC * (attempt + 1))
    return measure(agent.process.pid)
