"""Ends helper processes that left the session of their worker, or reports that they keep running."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from ferroelastic import _leftovers, _signals
from ferroelastic.multiprocessing._stopping import longest_stop_s, stop_group
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferroelastic.agent.server._activity import Activity

__all__ = ["handle_helpers"]

logger = get_logger("ferroelastic.agent.server.local_elastic_agent")

_MIN_GRACE_S = 1.0


def handle_helpers(
    run: _leftovers.Run,
    sessions: Sequence[int],
    *,
    are_native: bool,
    has_succeeded: bool,
    grace_s: float,
    elapsed_s: float,
    activity: Activity,
) -> None:
    """End the helpers of workers that have ended, or log that they keep running after a success.

    Helpers and workers share one deadline. The helpers are not signalled before the workers have ended, because workers may need them to
    save a checkpoint.

    Args:
        run: the run of this process.
        sessions: process ids of the workers.
        are_native: whether the engine started the workers; see :meth:`_leftovers.Run.find_detached`.
        has_succeeded: whether all workers have succeeded. Their helpers go on, unless the run ends them.
        grace_s: grace period of the workers in seconds.
        elapsed_s: seconds of the grace period that the stop of the workers has used.
        activity: gets the allowance for the stop.
    """
    if has_succeeded and not run.end_detached:
        _report_helpers(run, sessions, are_native=are_native)
        return
    group = run.hold_detached(sessions, are_native=are_native)
    if group is not None:
        left_s = max(grace_s - elapsed_s, min(grace_s, _MIN_GRACE_S))
        with _signals.shielded(group.end_grace), activity.allowing(longest_stop_s(left_s)):
            stop_group(group, signal.SIGTERM, left_s)


def _report_helpers(run: _leftovers.Run, sessions: Sequence[int], *, are_native: bool) -> None:
    """Log helpers that run after a success. They go on, or end with ferrorun if it is the first process of a container."""
    found = run.find_detached(sessions, are_native=are_native)
    if not found:
        return
    if os.getpid() == 1:  # the kernel ends the whole pid namespace with its first process
        logger.warning(
            "Helper processes that left their worker's process group end with the container: %s; wait for them in the script",
            _leftovers.describe(found),
        )
    else:
        logger.warning(
            "Helper processes that left their worker's process group keep running: %s; --end-detached ends them",
            _leftovers.describe(found),
        )
