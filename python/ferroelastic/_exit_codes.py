"""Exit codes of ``ferrorun``."""

from __future__ import annotations

__all__ = ["FAILURE", "SIGNAL_BASE", "exit_code"]

FAILURE = 1
SIGNAL_BASE = 128  # the shells' convention for a process that a signal ended


def exit_code(returncode: int | None) -> int:
    """Return the exit code of ``ferrorun`` for a failed worker. Never 0.

    Args:
        returncode: return code of the worker. A negative one is minus the number of the signal that ended it.
    """
    if not returncode:
        return FAILURE
    return SIGNAL_BASE - returncode if returncode < 0 else returncode
