"""Setup of the ``ferrorun`` process before it starts workers, and its exit."""

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

_MAX_OPEN_FILES = 1 << 20
_previous_open_files: int | None = None


def prepare(cleanup: ExitStack) -> None:
    """Normalise the state that this process inherited from its parent.

    * Closed standard streams are opened on the null device, because otherwise a descriptor of the engine would get their number.
    * The soft limit of open descriptors is raised to the hard limit. Workers keep the previous limit.
    * No signal is blocked, and ``SIGCHLD`` is not ignored: the kernel would otherwise discard exit statuses.

    Args:
        cleanup: receives the callbacks that restore the previous state.
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
    """Return the soft limit of open descriptors for workers, or ``None`` if they inherit the limit of this process."""
    return _previous_open_files


def _raise_open_files(cleanup: ExitStack) -> None:
    global _previous_open_files  # noqa: PLW0603 - a limit of this process
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    _previous_open_files = soft
    cleanup.callback(_lower_open_files, soft, hard)


def _lower_open_files(soft: int, hard: int) -> None:
    global _previous_open_files  # noqa: PLW0603 - a limit of this process
    import resource

    _previous_open_files = None
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def take_signals(handled: str, forwarded: str, cleanup: ExitStack) -> None:
    """Install the signal handlers of ``ferrorun``. Unlisted signals that would terminate this process are ignored.

    Args:
        handled: comma-separated names of the signals that end the job.
        forwarded: comma-separated names of the signals that are forwarded to the workers.
        cleanup: receives the callbacks that restore the previous dispositions.
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
        except OSError:  # noqa: PERF203 - three iterations
            # The kernel returns the lowest free number. That is this descriptor, because the lower ones are open by now.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - open until the process ends


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    Runs the ``atexit`` callbacks and skips the rest of the interpreter's shutdown, which takes as long as stopping a small job.
    If other non-daemon threads run, the interpreter shuts down as usual.

    Args:
        code: the exit code.
    """
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        sys.exit(code)
    import atexit

    from ferroelastic import _console

    atexit._run_exitfuncs()  # noqa: SLF001 - as the interpreter does; there is no public name
    _console.stderr().flush()
    os._exit(code)
