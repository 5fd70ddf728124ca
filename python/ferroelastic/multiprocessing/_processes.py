"""Natively spawned processes with the interface of ``subprocess``."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

from ferroelastic._engine import get_engine
from ferroelastic._exec import worker_environment
from ferroelastic._process import open_files_of_workers
from ferroelastic._wait import wait_for_event
from ferroelastic.multiprocessing._debuggers import with_debugger
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ferroelastic import _rust
    from ferroelastic.multiprocessing._terminal import Terminal
    from ferroelastic.numa.binding import NumaOptions

__all__ = ["NativeProcess", "cpus_for", "exit_code", "lost_status", "make_command", "spawn"]

logger = get_logger(__name__)

UNKNOWN_STATUS = 255


def cpus_for(local_rank: int, numa_options: NumaOptions | None) -> list[int] | None:
    """Return the logical CPUs for a worker, or ``None`` if it is not bound."""
    if numa_options is None:
        return None
    from ferroelastic.numa.binding import cpus_for_worker

    cpus = cpus_for_worker(local_rank, numa_options)
    return None if cpus is None else sorted(cpus)


def make_command(
    entrypoint: str,
    args: Sequence[Any],
    env: Mapping[str, str],
    stdout: str | _rust.WorkerEnd | None,
    stderr: str | _rust.WorkerEnd | None,
    local_rank: int,
    numa_options: NumaOptions | None,
    terminal: Terminal | None = None,
) -> tuple[tuple[str, ...], _rust.Command]:
    """Return the argument vector and the native command of one worker. A debugger of this process is attached to the worker too.

    Args:
        entrypoint: program.
        args: arguments, converted to strings.
        env: environment variables, added to the environment of this process.
        stdout: path of a file for standard output, or an end of a relay; empty or ``None`` inherits the stream of this process.
        stderr: the same for standard error.
        local_rank: local rank of the worker.
        numa_options: NUMA binding; ``None`` does not bind the worker.
        terminal: controlling terminal of the worker; ``None`` for no terminal.
    """
    from ferroelastic import _rust

    argv = (entrypoint, *map(str, args))
    executed = with_debugger(argv)
    command = _rust.Command(
        executed if terminal is None else terminal.command(executed),
        {**worker_environment(), **env},
        stdout=stdout or None,
        stderr=stderr or None,
        cpus=cpus_for(local_rank, numa_options),
        open_files=open_files_of_workers(),
    )
    return argv, command


def spawn(
    commands: Sequence[_rust.Command],
    groups: list[_rust.Group],
    pool: _rust.WarmPool | None = None,
    stop_file: _rust.StopFile | None = None,
) -> None:
    """Start all commands as one group and append the group to ``groups``. Parked children of ``pool`` become the first workers.

    The workers can read the deadline of their stop in ``stop_file``.

    Raises:
        OSError: a command cannot be started. All started processes are ended first. The subclass matches the errno, as in ``subprocess``.
    """
    from ferroelastic import _rust

    try:
        # One call into C starts the processes and stores their group. A signal handler that raised between two steps would leave
        # processes without an owner.
        groups.extend(map(get_engine().spawn, (commands,), (pool,), (stop_file,)))
    except _rust.SpawnError as error:
        raise OSError(error.errno, str(error)) from error


def exit_code(ended: _rust.Exit) -> int:
    """Return the exit code of a child process, or the negative signal number."""
    return ended.returncode if ended.returncode is not None else lost_status(ended.pid)


def lost_status(pid: int) -> int:
    """Log that an exit status is lost, and return the exit code that replaces it. ``Popen`` returns 0, so a failed job would succeed."""
    ignored = signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
    reason = (
        "this process ignores SIGCHLD"
        if ignored
        else "another part of this program has reaped it, perhaps with waitpid(-1)"
    )
    logger.error(
        "The exit status of process %s is unknown, because %s. It is reported as exit code %s. Linux 6.15 and later keep the status",
        pid,
        reason,
        UNKNOWN_STATUS,
    )
    return UNKNOWN_STATUS


class NativeProcess:
    """One process of a native group, with the interface of ``subprocess.Popen``.

    Attributes:
        args: argument vector.
        pid: process id.
        returncode: exit code or negative signal number, set by :meth:`poll` and :meth:`wait`. ``None`` while the process runs.
    """

    def __init__(self, group: _rust.Group, index: int, args: Sequence[str]) -> None:
        self._group = group
        self._index = index
        self.args = args
        self.pid = group.pids[index]
        self.returncode: int | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: returncode: {self.returncode} pid: {self.pid} args: {self.args!r}>"

    def poll(self) -> int | None:
        """Return the return code if the process has ended, else ``None``."""
        if self.returncode is None:
            ended = next((ended for ended in self._group.exits() if ended.index == self._index), None)
            if ended is not None:
                self.returncode = exit_code(ended)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process to end.

        Args:
            timeout: timeout in seconds; ``None`` waits without limit.

        Returns:
            The return code.

        Raises:
            subprocess.TimeoutExpired: the process still runs after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            generation = self._group.generation
            returncode = self.poll()
            if returncode is not None:
                return returncode
            remaining = None if deadline is None else deadline - time.monotonic()
            if timeout is not None and remaining is not None and remaining <= 0:
                from subprocess import TimeoutExpired

                raise TimeoutExpired(self.args, timeout)
            wait_for_event(self._group, generation, remaining)

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process, not to its process group. Does nothing if the process has ended."""
        if self.poll() is None:
            self._group.signal(self._index, sig, leader_only=True)

    def terminate(self) -> None:
        """Send SIGTERM to the process, not to its process group."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the process, not to its process group."""
        self.send_signal(signal.SIGKILL)
