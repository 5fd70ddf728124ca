"""Mirror of ``torch.distributed.elastic.utils.log_level``; no intended differences."""

from __future__ import annotations

__all__ = ["get_log_level"]


def get_log_level() -> str:
    """Return the level that loggers of this package have unless ``LOGLEVEL`` is set."""
    return "WARNING"
