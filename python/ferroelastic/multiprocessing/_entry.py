"""Set-up and clean-up of a function worker around its function. Runs in the worker process."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ferroelastic import _install
from ferroelastic._signals import forget_in_child
from ferroelastic._sitecustomize import remove_exec
from ferroelastic._text import entrypoint_name, format_traceback, message_of
from ferroelastic.multiprocessing._std import get_std_cm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ferroelastic.multiprocessing._hold import Hold

__all__ = ["Task", "load_return_value"]


@dataclass(frozen=True)
class Task:
    """Arguments of one function worker, pickled for its process."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    env: Mapping[str, str]
    stdout: str
    stderr: str
    return_file: str
    hold: Hold
    terminal: tuple[str, list[int]] | None
    """Path of the worker's controlling terminal, and the standard streams to open on it."""
    console: tuple[str, list[int]]
    """Path of the worker's end of a relay to the console, and the standard streams to open on it; an empty list for no relay."""
    parent_pid: int | None
    """Pid of the worker's parent; ``None`` if a fork server creates the worker."""
    cpus: Sequence[int] | None
    forked: bool
    open_files: int | None = None
    """Soft limit of open descriptors; ``None`` keeps the limit of the agent."""
    keeps_install: bool = False
    """Whether ``ferroelastic.install()`` stays in effect in the worker."""

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import ForkingPickler

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["console"] = "", []
        return _load_task, (self.console, bytes(ForkingPickler.dumps(values)))


def _load_task(console: tuple[str, list[int]], values: bytes) -> Task:
    """Open the streams of the worker before the function is unpickled, which may fail."""
    import pickle

    _open_streams(*console)
    return Task(**pickle.loads(values))  # noqa: S301 - pickled by the agent


def _wrap(task: Task) -> None:
    """Run the task. The exit code of this process is the outcome.

    The return value is written to a file. A queue would block the agent if this process were killed during the transfer.
    """
    _become_worker(task)
    if not task.keeps_install:
        _install.leave_worker()
        remove_exec(os.environ)  # a fork server of the program has it
    from ferroelastic.multiprocessing.errors import record
    from ferroelastic.multiprocessing.redirects import redirect_stderr, redirect_stdout

    os.environ.update(task.env)

    def run(*args: Any) -> None:
        # Inside `record`, so a value that cannot be pickled is recorded as an error of the function.
        _store_return_value(task.fn(*args), task.return_file)

    # Error handlers show the name. Not `functools.wraps`, because a callable instance has no function attributes.
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
            _write_stderr(format_traceback(interrupt))
            # End by SIGINT, as a Python program does. Exit code 0 would hide the signal.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _flush()
            os.kill(os.getpid(), signal.SIGINT)
        except SystemExit as exit_request:
            if isinstance(exit_request.code, int):
                raise
            _write_stderr(f"{message_of(exit_request.code)}\n")  # as the interpreter does
            sys.exit(1)
        except Exception as error:  # noqa: BLE001 - the process ends here
            # multiprocessing would print the traceback after the redirect has ended.
            _write_stderr(format_traceback(error))
            sys.exit(1)
        finally:
            _flush()


def _is_zero(code: object) -> bool:
    return isinstance(code, int) and code == 0


def _become_worker(task: Task) -> None:
    """Set this process up like a natively spawned worker: own session, SIGKILL at the end of the agent, default signal handlers."""
    import multiprocessing

    from ferroelastic._rust import arm_parent_death_signal

    if os.getsid(0) != os.getpid():  # a warm process has a session already
        os.setsid()
    _open_streams(*task.console)
    agent = multiprocessing.parent_process()
    if task.parent_pid is not None:
        arm_parent_death_signal(signal.SIGKILL)
    elif agent is not None:
        _die_at_hangup(agent.sentinel)
    # The agent may have ended before the parent-death signal was armed.
    if (agent is not None and not agent.is_alive()) or task.parent_pid not in {None, os.getppid()}:
        os.kill(os.getpid(), signal.SIGKILL)
    if task.forked:
        signal.set_wakeup_fd(-1)
        forget_in_child(signal.valid_signals())
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if task.terminal is not None:
        from ferroelastic.multiprocessing._on_terminal import take_terminal

        take_terminal(*task.terminal)
        # multiprocessing has replaced standard input by the null device.
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - open until the process ends
    if task.open_files is not None:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (task.open_files, hard))
    if task.cpus is not None:
        os.sched_setaffinity(0, task.cpus)
        for thread in os.listdir("/proc/self/task"):  # imported libraries may have started threads
            with suppress(OSError):  # the thread has ended
                os.sched_setaffinity(int(thread), task.cpus)


def _open_streams(path: str, descriptors: list[int]) -> None:
    """Open standard streams on the worker's end of a relay. Where the path cannot be opened, they stay those of the agent."""
    import fcntl

    if not descriptors:
        return
    try:
        # Without O_NOCTTY, a terminal would become the controlling terminal of this session.
        end = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return
    with suppress(OSError):  # a terminal, or a kernel whose pipes do not keep the bytes of one write together
        fcntl.fcntl(end, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)
    for descriptor in descriptors:
        os.dup2(end, descriptor)
    if end not in descriptors:
        os.close(end)


def _die_at_hangup(sentinel: int) -> None:
    """Let the kernel send SIGKILL to this process when the agent's end of the pipe ``sentinel`` is closed.

    For workers of a fork server: their parent is the server, which outlives the agent while workers run.
    """
    import fcntl

    fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | fcntl.FASYNC)


def _store_return_value(value: Any, path: str) -> None:
    """Write the value to a file atomically."""
    if value is not None:
        import pickle

        temporary = f"{path}.part"
        with open(temporary, "wb") as file:
            pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)
        os.replace(temporary, path)


def load_return_value(path: str) -> Any:
    """Return the return value of a worker; ``None`` also if the worker ended with exit code 0 without a return.

    Raises:
        Exception: the value cannot be unpickled, for instance because its class cannot be imported here.
    """
    import pickle

    try:
        with open(path, "rb") as file:
            return pickle.load(file)  # noqa: S301 - written by our own worker in a folder that only this user can write
    except FileNotFoundError:
        return None


def _write_stderr(text: str) -> None:
    with suppress(
        AttributeError, OSError, ValueError
    ):  # the function has closed standard error, or its encoding does not support the text
        sys.stderr.write(text)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # closed by the function
                stream.flush()
