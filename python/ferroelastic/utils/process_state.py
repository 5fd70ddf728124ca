"""Mirror of ``torch.distributed.elastic.utils.process_state``; no intended differences."""

from __future__ import annotations

__all__ = ["is_uninterruptible_state", "read_proc_state"]


def read_proc_state(pid: int) -> str | None:
    """Return the state of a process from ``/proc/PID/stat``, for instance ``"S"``.

    Args:
        pid: process id.

    Returns:
        The state letter; ``None`` if the process does not exist or the file cannot be read.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            content = stat.read()
    except OSError:
        return None
    # The command name may hold spaces and parentheses; the state follows the last closing one.
    _, closing, after = content.rpartition(b")")
    fields = after.split()
    return fields[0].decode("ascii", "replace") if closing and fields else None


def is_uninterruptible_state(state: str | None) -> bool:
    """Return whether ``state`` is uninterruptible sleep (``D``)."""
    return state is not None and state.startswith("D")
