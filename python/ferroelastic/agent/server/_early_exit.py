"""Detects workers that run on although another worker has ended with exit code 0."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ferroelastic.agent.server._workers import RunResult, WorkerState
from ferroelastic.multiprocessing import ProcessFailure
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from ferroelastic import _rust
    from ferroelastic.agent.server._workers import WorkerGroup

__all__ = ["check", "left_s"]

logger = get_logger("ferroelastic.agent.server.local_elastic_agent")

_EXIT_CODE = 1  # the job must not end with 0


def left_s(group: _rust.Group, timeout_s: float) -> float | None:
    """Return the seconds until the round has failed, because workers run on after one has ended with exit code 0.

    ``None`` if there is no limit, if no worker has ended with 0, or if all have ended.

    Args:
        group: the workers.
        timeout_s: seconds that the others may run on; 0 for no limit.
    """
    if not timeout_s:
        return None
    exits = group.exits()
    ended_ns = [ended.monotonic_ns for ended in exits if ended.returncode == 0]
    if not ended_ns or len(exits) >= len(group.pids):
        return None
    return max(0.0, timeout_s - (time.monotonic_ns() - min(ended_ns)) / 1e9)


def check(worker_group: WorkerGroup, group: _rust.Group | None, timeout_s: float) -> RunResult | None:
    """Return a failed result if workers have run on for longer than the timeout; ``None`` if they have not. A failure is logged.

    Args:
        worker_group: the workers of this node.
        group: their processes; ``None`` for workers that the engine does not supervise.
        timeout_s: seconds that the others may run on; 0 for no limit.
    """
    if group is None or left_s(group, timeout_s) != 0:
        return None
    failure = _failure_of(group, timeout_s)
    logger.error("[%s] %s", worker_group.spec.role, failure.message)
    rank = worker_group.workers[failure.local_rank].global_rank
    return RunResult(state=WorkerState.FAILED, failures={rank: failure})


def _failure_of(group: _rust.Group, timeout_s: float) -> ProcessFailure:
    """Return a failure of the worker that was the first to end with exit code 0."""
    exits = group.exits()
    first = min((ended for ended in exits if ended.returncode == 0), key=lambda ended: ended.order)
    ended_pids = {ended.pid for ended in exits}
    running = next(pid for pid in group.pids if pid not in ended_pids)
    failure = ProcessFailure(first.index, first.pid, _EXIT_CODE, error_file="")
    failure.message = f"Worker pid={first.pid} ended with exit code 0, and worker pid={running} ran on for {timeout_s:g} s (--early-exit-timeout)"
    failure.declared_kind = "early_exit"  # type: ignore[attr-defined]
    return failure
