"""Mirror of ``torch.distributed.elastic.timer.debug_info_logging``.

Intended difference: it is called when the processes have been signalled, where torch calls it before. What the processes were doing is
gathered natively before the signal (see :class:`ferroelastic.timer.FileTimerServer`, ``evidence_s``).
"""

from __future__ import annotations

from ferroelastic.utils.logging import get_logger

__all__ = ["log_debug_info_for_expired_timers"]

logger = get_logger(__name__)


def log_debug_info_for_expired_timers(run_id: str, expired_timers: dict[int, list[str]]) -> None:
    """Log the timers that have expired. Programs replace this function to do more.

    Mirrors ``torch.distributed.elastic.timer.debug_info_logging.log_debug_info_for_expired_timers``.

    Args:
        run_id: id of the run.
        expired_timers: by process id, the timers as JSON.
    """
    if expired_timers:
        logger.info("Timers expired for run:[%s] [%s].", run_id, expired_timers)
