"""Mirror of ``torch.distributed.elastic.timer.debug_info_logging``.

Intended difference: the function is called after the processes are signalled; torch calls it before. The engine collects evidence about the
processes before the signal, see ``evidence_s`` of :class:`ferroelastic.timer.FileTimerServer`.
"""

from __future__ import annotations

from ferroelastic.utils.logging import get_logger

__all__ = ["log_debug_info_for_expired_timers"]

logger = get_logger(__name__)


def log_debug_info_for_expired_timers(run_id: str, expired_timers: dict[int, list[str]]) -> None:
    """Log expired timers. Programs may replace this function to log more.

    Mirrors ``torch.distributed.elastic.timer.debug_info_logging.log_debug_info_for_expired_timers``.

    Args:
        run_id: run id of the job.
        expired_timers: expired timers as JSON, by process id.
    """
    if expired_timers:
        logger.info("Timers expired for run:[%s] [%s].", run_id, expired_timers)
