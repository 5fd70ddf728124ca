"""Stops a group of processes. Signal handlers may raise during the stop."""

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
    from ferroelastic._stop_notice import SignalTarget, StopReason

__all__ = ["kill_wait_s", "longest_stop_s", "make_stop_file", "stop_group"]

logger = get_logger(__name__)

_MIN_KILL_WAIT_S = 5.0
_LOGS_WAIT_S = 5.0
_INTERRUPTS_TO_KILL = 2


def stop_group(
    group: _rust.Group,
    death_sig: signal.Signals,
    grace_s: float,
    *,
    linger_s: float = 0.0,
    target: SignalTarget = "group",
    reason: StopReason = "shutdown",
) -> _rust.StopReport:
    """Stop all process groups, and wait until they are empty or the last deadline has passed.

    A second ``KeyboardInterrupt`` ends the grace period, as a second SIGINT does with the handlers of this package.

    Args:
        group: the processes.
        death_sig: stop signal.
        grace_s: grace period in seconds between ``death_sig`` and SIGKILL.
        linger_s: delay in seconds before ``death_sig``.
        target: receivers of ``death_sig``, see ``_rust.Group.stop``.
        reason: reason of the stop, see ``_rust.Group.stop``.

    Returns:
        The outcome of the stop.

    Raises:
        BaseException: a foreign signal handler raised it during the stop, and the caller is not already handling such an exception.
            It is raised after the stop.
    """
    # Raised by foreign handlers: torch's, and Python's own for SIGINT.
    interrupting: tuple[type[BaseException], ...] = (*_compat.family(SignalException), KeyboardInterrupt)
    handled = sys.exc_info()[1]
    interruption: BaseException | None = None
    interrupts = int(isinstance(handled, KeyboardInterrupt))
    report: _rust.StopReport | None = None
    begun = False
    while report is None:
        try:
            if not begun:
                running = _running_pids(group)
                wait_s = kill_wait_s(grace_s)
                group.stop(death_sig, grace_s, wait_s, linger_s=linger_s, target=target, reason=reason)
                begun = True
                # Logged after the signal, because a log handler may block.
                for pid in running if linger_s == 0 else ():
                    logger.warning("Sending process %s closing signal %s", pid, signal.Signals(death_sig).name)
            if interrupts >= _INTERRUPTS_TO_KILL or _signals.is_impatient():
                group.end_grace()
            generation = group.generation
            report = group.stop_report()
            if report is None:
                wait_for_event(group, generation)
        except interrupting as error:  # noqa: PERF203 - the loop continues after an interruption
            interruption = interruption or error
            interrupts += isinstance(error, KeyboardInterrupt)
    if interruption is not None and not isinstance(handled, interrupting):
        raise interruption
    return report


def make_stop_file() -> _rust.StopFile | None:
    """Return the file in which workers read the deadline of their stop; ``None`` if the kernel refuses it, which is logged."""
    from ferroelastic import _rust

    try:
        return _rust.StopFile()
    except OSError as error:
        logger.warning("The workers cannot read the deadline of a stop: %s", error)
        return None


def kill_wait_s(grace_s: float) -> float:
    """Return the timeout in seconds after SIGKILL: the length of the grace period, at least 5 s."""
    return max(_MIN_KILL_WAIT_S, grace_s)


def longest_stop_s(grace_s: float) -> float:
    """Return an upper bound in seconds for a stop: the grace period, the wait after SIGKILL, and the copying of logs."""
    return grace_s + kill_wait_s(grace_s) + _LOGS_WAIT_S


def _running_pids(group: _rust.Group) -> list[int]:
    if group.stop_report() is not None:
        return []
    ended = {ended.index for ended in group.exits()}
    return [pid for index, pid in enumerate(group.pids) if index not in ended]
