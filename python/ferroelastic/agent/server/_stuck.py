"""Detects workers that are stuck in uninterruptible sleep (state ``D``)."""

from __future__ import annotations

import os
import time

from ferroelastic.multiprocessing import ProcessFailure
from ferroelastic.utils.logging import get_logger

__all__ = ["TIMEOUT_ENV", "dwell_s", "failure_of", "read_wait_channel", "resolve_timeout_s"]

logger = get_logger("ferroelastic.agent.server.local_elastic_agent")

TIMEOUT_ENV = "TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT"

_EXIT_CODE = 1  # the worker has no exit code yet, and the job must not end with 0
_UNKNOWN_CHANNEL = "an unknown kernel function"


def resolve_timeout_s(explicit: float | None) -> float:
    """Return the timeout in seconds from the argument, else from the environment, else 0, which means no limit."""
    raw = os.environ.get(TIMEOUT_ENV, "") if explicit is None else explicit
    try:
        return max(0.0, float(raw))
    except ValueError:
        return 0.0


def dwell_s(
    first_seen: dict[int, float], pid: int, role: str, timeout_s: float, *, is_uninterruptible: bool
) -> float | None:
    """Return for how many seconds a worker has been in uninterruptible sleep; ``None`` if it is not.

    Args:
        first_seen: monotonic time of the first check that found a process in this state, by process id. Updated in place.
        pid: process id of the worker.
        role: role of the worker, for the log.
        timeout_s: limit in seconds, for the log.
        is_uninterruptible: whether the worker is in uninterruptible sleep now.
    """
    if not is_uninterruptible:
        first_seen.pop(pid, None)
        return None
    now = time.monotonic()
    first = first_seen.setdefault(pid, now)
    if first == now:
        logger.warning(
            "[%s] Worker pid=%s entered uninterruptible sleep (D-state); will mark UNHEALTHY if it remains for %.1fs.",
            *(role, pid, timeout_s),
        )
    return now - first


def failure_of(local_rank: int, pid: int, slept_s: float, timeout_s: float, wait_channel: str) -> ProcessFailure:
    """Return the failure of a stuck worker.

    Args:
        local_rank: rank of the worker on this node.
        pid: process id of the worker.
        slept_s: seconds in uninterruptible sleep.
        timeout_s: the exceeded limit in seconds.
        wait_channel: the kernel function in which it sleeps.
    """
    failure = ProcessFailure(local_rank, pid, _EXIT_CODE, error_file="")
    failure.message = (
        f"Worker pid={pid} stuck in uninterruptible sleep (D-state) for {slept_s:.1f}s (>= {timeout_s:.1f}s),"
        f" waiting in {wait_channel}"
    )
    failure.declared_kind = "stuck"  # type: ignore[attr-defined]
    return failure


def read_wait_channel(pid: int) -> str:
    """Return the kernel function in which a process sleeps, from ``/proc/PID/wchan``, or a placeholder if it cannot be read."""
    try:
        with open(f"/proc/{pid}/wchan") as file:
            return file.read() or _UNKNOWN_CHANNEL
    except OSError:
        return _UNKNOWN_CHANNEL
