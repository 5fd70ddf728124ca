"""What ``ferrorun`` does to its own process before it starts anything, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from ferroelastic import _signals

if TYPE_CHECKING:
    from contextlib import ExitStack

__all__ = ["leave", "open_files_of_workers", "prepare", "take_signals"]

_MOST_OPEN_FILES = 1 << 20
_former_open_files: int | None = None


def prepare(cleanup: ExitStack) -> None:
    """Make this process fit to supervise others, whatever its parent has left to it.

    Standard streams that are closed are opened on the null device, so that no descriptor of the engine takes their number. The soft limit of
    open descriptors becomes the hard one; workers keep the former limit. No signal is blocked, and ``SIGCHLD`` is not ignored, so that exit
    statuses can be collected.

    Args:
        cleanup: gets what brings the former dispositions back.
    """
    _open_standard_streams()
    _raise_open_files(cleanup)
    if threading.current_thread() is not threading.main_thread():
        return
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        cleanup.callback(signal.signal, signal.SIGCHLD, signal.SIG_IGN)


def open_files_of_workers() -> int | None:
    """Return the soft limit of open descriptors that workers have, or ``None`` where it is that of this process."""
    return _former_open_files


def _raise_open_files(cleanup: ExitStack) -> None:
    global _former_open_files  # noqa: PLW0603 - a limit of this process
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    _former_open_files = soft
    cleanup.callback(_lower_open_files, soft, hard)


def _lower_open_files(soft: int, hard: int) -> None:
    global _former_open_files  # noqa: PLW0603 - a limit of this process
    import resource

    _former_open_files = None
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def take_signals(handled: str, forwarded: str, cleanup: ExitStack) -> None:
    """Handle signals from now on; those that would end this process, and are not listed, are ignored.

    Args:
        handled: comma-separated names of the signals that end the job.
        forwarded: likewise of those that are forwarded to the workers.
        cleanup: gets what brings the former dispositions back.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number, disposition in _signals.ignore_the_rest(f"{handled},{forwarded}").items():
        cleanup.callback(signal.signal, number, disposition)
    cleanup.enter_context(_signals.Handling(handled, forward=forwarded))


def _open_standard_streams() -> None:
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:  # noqa: PERF203 - of three
            # The lowest number that is free, which is this one: those below are open by now.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - as long as the process


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    Runs what was registered with ``atexit`` and skips the rest of the interpreter's end, which takes as long as the end of a small job.
    Where another thread is to be waited for, the interpreter ends as usual.
    """
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        sys.exit(code)
    import atexit

    from ferroelastic import _console

    atexit._run_exitfuncs()  # noqa: SLF001 - as the interpreter does; there is no public name
    _console.stderr().flush()
    os._exit(code)
