"""A worker's own dump of its Python stacks, which the agent asks for when a timer has expired."""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import suppress

__all__ = ["STACKS_SIGNAL", "arm_stack_dump"]

STACKS_SIGNAL = signal.SIGRTMIN + 13
"""Signal on which a worker dumps its stacks. The engine has the same number."""

_NOBODY = 0
_armed_by = _NOBODY


def arm_stack_dump() -> None:
    """Have this process write its Python stacks to ``stacks.<pid>.txt``, beside its error file, on :data:`STACKS_SIGNAL`.

    Once per process, and again in a forked one. Does nothing where no agent has set ``TORCHELASTIC_ERROR_FILE``, where the
    signal has a use already, or where the file cannot be made: the agent asks nobody who has no such file.
    """
    global _armed_by  # noqa: PLW0603 - a process has one handler for the signal
    pid = os.getpid()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if _armed_by == pid or not error_file or not (_armed_by != _NOBODY or _is_unused()):
        return
    # A descriptor and not a file object, whose end would be a warning when the interpreter ends.
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
    """Whether the signal's disposition is the default one, also for what handlers of C libraries are concerned."""
    if signal.getsignal(STACKS_SIGNAL) != signal.SIG_DFL:
        return False
    bit = 1 << (STACKS_SIGNAL - 1)
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
        return not (int(fields["SigCgt"], 16) | int(fields["SigIgn"], 16)) & bit
    except (OSError, KeyError, ValueError):
        return True
