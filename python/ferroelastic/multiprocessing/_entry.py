"""What a function worker does before and after the function. Runs in the worker."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ferroelastic._signals import forget_in_child
from ferroelastic._text import entrypoint_name, format_traceback, message_of
from ferroelastic.multiprocessing._std import get_std_cm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ferroelastic.multiprocessing._hold import Hold

__all__ = ["Task", "load_return_value"]


@dataclass(frozen=True)
class Task:
    """One function worker, as it travels to its process."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    env: Mapping[str, str]
    stdout: str
    stderr: str
    return_file: str
    hold: Hold
    terminal: tuple[str, list[int]] | None
    """What it takes as its controlling terminal, and for which standard streams."""
    parent_pid: int | None
    """Process that the worker must be a child of; ``None`` if another one (a fork server) creates it."""
    cpus: Sequence[int] | None
    forked: bool
    open_files: int | None = None
    """Soft limit of open descriptors; ``None`` leaves that of the agent."""


def _wrap(task: Task) -> None:
    """Run the task; the process's exit code tells the outcome.

    The return value goes to a file: a queue would need a reader, and would block the agent when this process is killed in
    the middle of sending.
    """
    _become_worker(task)
    from ferroelastic.multiprocessing.errors import record
    from ferroelastic.multiprocessing.redirects import redirect_stderr, redirect_stdout

    os.environ.update(task.env)

    def run(*args: Any) -> None:
        # Within `record`: a value that cannot be pickled is an error of the function.
        _store_return_value(task.fn(*args), task.return_file)

    # For error handlers. An instance is not wrapped: its attributes are none of a function's.
    run.__name__ = run.__qualname__ = entrypoint_name(task.fn)

    with get_std_cm(task.stdout, redirect_stdout), get_std_cm(task.stderr, redirect_stderr):
        try:
            try:
                record(run)(*task.args)
            except SystemExit as exit_request:
                if exit_request.code is not None and not _is_zero(exit_request.code):
                    raise
            _flush()
            task.hold.wait()
        except KeyboardInterrupt as interrupt:
            _tell(format_traceback(interrupt))
            # To end by the signal, as every Python program does: exit code 0 would hide it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _flush()
            os.kill(os.getpid(), signal.SIGINT)
        except SystemExit as exit_request:
            if isinstance(exit_request.code, int):
                raise
            _tell(f"{message_of(exit_request.code)}\n")  # as the interpreter does
            sys.exit(1)
        except Exception as error:  # noqa: BLE001 - the end of this process: all that is left is to tell
            # Here and not by multiprocessing, whose traceback would miss the redirected stream.
            _tell(format_traceback(error))
            sys.exit(1)
        finally:
            _flush()


def _is_zero(code: object) -> bool:
    return isinstance(code, int) and code == 0


def _become_worker(task: Task) -> None:
    """Take the place of a natively spawned worker: own session, bound to the agent's life, clean of its handlers."""
    import multiprocessing

    from ferroelastic._rust import arm_parent_death_signal

    os.setsid()
    agent = multiprocessing.parent_process()
    if task.parent_pid is not None:
        arm_parent_death_signal(signal.SIGKILL)
    elif agent is not None:
        _die_at_hangup(agent.sentinel)
    # The agent may have died before that.
    if (agent is not None and not agent.is_alive()) or task.parent_pid not in {None, os.getppid()}:
        os.kill(os.getpid(), signal.SIGKILL)
    if task.forked:
        signal.set_wakeup_fd(-1)
        forget_in_child(signal.valid_signals())
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if task.terminal is not None:
        from ferroelastic.multiprocessing._on_terminal import take_terminal

        take_terminal(*task.terminal)
        # multiprocessing has put the null device in its place.
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    if task.open_files is not None:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (task.open_files, hard))
    if task.cpus is not None:
        os.sched_setaffinity(0, task.cpus)
        for thread in os.listdir("/proc/self/task"):  # libraries that were imported on the way here have threads
            with suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread), task.cpus)


def _die_at_hangup(sentinel: int) -> None:
    """Have the kernel send SIGKILL to this process when the agent's end of the pipe ``sentinel`` is closed.

    For workers of a fork server, which are not the agent's children. The server itself lives as long as its workers.
    """
    import fcntl

    fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | fcntl.FASYNC)


def _store_return_value(value: Any, path: str) -> None:
    """Write the value so that a file is either whole or not there."""
    if value is not None:
        import pickle

        unfinished = f"{path}.part"
        with open(unfinished, "wb") as file:
            pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)
        os.replace(unfinished, path)


def load_return_value(path: str) -> Any:
    """The value that a worker has left; ``None`` also for one that ended with code 0 in some other way than returning.

    Raises:
        Exception: whatever unpickling raises, e.g. because the value's class cannot be imported here.
    """
    import pickle

    try:
        with open(path, "rb") as file:
            return pickle.load(file)  # noqa: S301 - written by our own worker in a folder that only this user can write
    except FileNotFoundError:
        return None


def _tell(text: str) -> None:
    with suppress(
        AttributeError, OSError, ValueError
    ):  # the function has closed standard error, or it takes no such text
        sys.stderr.write(text)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # closed by the function
                stream.flush()
