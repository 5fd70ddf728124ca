"""Stopping a group of processes, with what signal handlers may do meanwhile."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from ferroelastic import _compat, _signals
from ferroelastic._signals import SignalException
from ferroelastic._wait import wait_for_event
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from ferroelastic import _rust

__all__ = ["kill_wait_s", "longest_stop_s", "stop_group"]

logger = get_logger(__name__)

_LEAST_KILL_WAIT_S = 5.0
_LOGS_WAIT_S = 5.0
_IMPATIENCE = 2


def stop_group(
    group: _rust.Group, death_sig: signal.Signals, grace_s: float, *, linger_s: float = 0.0
) -> _rust.StopReport:
    """Stop all process groups, and wait until they are empty or the last deadline has passed.

    A second ``KeyboardInterrupt`` ends the grace, like a second SIGINT where the handlers are ours.

    Args:
        group: the processes.
        death_sig: what to send first.
        grace_s: seconds until SIGKILL.
        linger_s: seconds until ``death_sig``.

    Returns:
        What was found.

    Raises:
        BaseException: what a handler that is not ours raised meanwhile, after the stop; not where that is being answered by this call.
    """
    # Of handlers that are not ours: those of torch, and Python's for SIGINT.
    interrupting: tuple[type[BaseException], ...] = (*_compat.family(SignalException), KeyboardInterrupt)
    answered = sys.exc_info()[1]
    interruption: BaseException | None = None
    interrupts = int(isinstance(answered, KeyboardInterrupt))
    report: _rust.StopReport | None = None
    begun = False
    while report is None:
        try:
            if not begun:
                running = _running_pids(group)
                group.stop(death_sig, grace_s, kill_wait_s(grace_s), linger_s=linger_s)
                begun = True
                # Only now: a log handler may wait for whoever reads it.
                for pid in running if linger_s == 0 else ():
                    logger.warning("Sending process %s closing signal %s", pid, signal.Signals(death_sig).name)
            if interrupts >= _IMPATIENCE or _signals.is_impatient():
                group.hurry()
            generation = group.generation
            report = group.stop_report()
            if report is None:
                wait_for_event(group, generation)
        except interrupting as error:  # noqa: PERF203 - this is what the loop is for
            interruption = interruption or error
            interrupts += isinstance(error, KeyboardInterrupt)
    if interruption is not None and not isinstance(answered, interrupting):
        raise interruption
    return report


def kill_wait_s(grace_s: float) -> float:
    """Return the seconds that processes have to end after SIGKILL: as long as the grace period, and at least 5."""
    return max(_LEAST_KILL_WAIT_S, grace_s)


def longest_stop_s(grace_s: float) -> float:
    """Return an upper bound of the seconds that stopping workers takes: the grace period, the end after SIGKILL, and their logs."""
    return grace_s + kill_wait_s(grace_s) + _LOGS_WAIT_S


def _running_pids(group: _rust.Group) -> list[int]:
    if group.stop_report() is not None:
        return []
    ended = {ended.index for ended in group.exits()}
    return [pid for index, pid in enumerate(group.pids) if index not in ended]
