"""Dump of a worker's Python stacks. The agent requests it when a timer has expired."""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import suppress

__all__ = ["STACKS_SIGNAL", "arm_stack_dump"]

STACKS_SIGNAL = signal.SIGRTMIN + 13
"""Signal for the dump. The engine uses the same number."""

_NO_PROCESS = 0
_armed_by = _NO_PROCESS


def arm_stack_dump() -> None:
    """Let this process write its Python stacks to ``stacks.<pid>.txt``, beside its error file, on :data:`STACKS_SIGNAL`.

    Takes effect once per process; a forked process can arm its own dump. Does nothing if ``TORCHELASTIC_ERROR_FILE`` is not set, if the
    program uses the signal, or if the file cannot be created. The agent sends the signal only to processes with such a file.
    """
    global _armed_by  # noqa: PLW0603 - a process has one handler for the signal
    pid = os.getpid()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if _armed_by == pid or not error_file or not (_armed_by != _NO_PROCESS or _is_unused()):
        return
    # A descriptor and not a file object, which would raise a ResourceWarning at the end of the interpreter.
    path = os.path.join(os.path.dirname(error_file), f"stacks.{pid}.txt")
    with suppress(OSError, RuntimeError, ValueError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            faulthandler.register(STACKS_SIGNAL, fd, all_threads=True, chain=False)
        except BaseException:
            os.close(fd)
            raise
        _armed_by = pid


def _is_unused() -> bool:
    """Return whether the signal has its default disposition, also according to the kernel (for handlers of C libraries)."""
    if signal.getsignal(STACKS_SIGNAL) != signal.SIG_DFL:
        return False
    bit = 1 << (STACKS_SIGNAL - 1)
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
        return not (int(fields["SigCgt"], 16) | int(fields["SigIgn"], 16)) & bit
    except (OSError, KeyError, ValueError):
        return True
