"""What the contexts of subprocesses and of function workers have in common."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from ferroelastic import _compat, _signals
from ferroelastic._signals import SignalException
from ferroelastic._wait import wait_for_event
from ferroelastic.multiprocessing._std import _validate_full_rank
from ferroelastic.multiprocessing._stopping import kill_wait_s, stop_group
from ferroelastic.multiprocessing.errors import ProcessFailure
from ferroelastic.multiprocessing.errors._failures import failed_at_ns
from ferroelastic.multiprocessing.tail_log import TailLog
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ferroelastic import _rust
    from ferroelastic.multiprocessing._logs import LogsSpecs
    from ferroelastic.multiprocessing._terminal import Terminal

__all__ = ["PContext", "RunProcsResult"]

logger = get_logger(__name__)

_OVERDUE_GRACE_S = 5.0
_CONSOLE_PATIENCE_S = 0.5
_LEAST_CONSOLE_PATIENCE_S = 0.05


@dataclass
class RunProcsResult(_compat.TorchCompatible):
    """Outcome of a group of workers, by local rank. Mirrors torch's ``RunProcsResult``.

    Attributes:
        return_values: what function workers returned; ``None`` each for commands.
        failures: workers that failed. Unlike torch's, those that only the agent's stop ended are not among them.
        stdouts: file of each worker's standard output, ``""`` if it was not redirected.
        stderrs: likewise for standard error.
        stopped: workers that ended after the agent had told them to, and how.
    """

    return_values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    stdouts: dict[int, str] = field(default_factory=dict)
    stderrs: dict[int, str] = field(default_factory=dict)
    stopped: dict[int, ProcessFailure] = field(default_factory=dict)

    def is_failed(self) -> bool:
        """Whether any worker has failed."""
        return bool(self.failures)


class PContext(_compat.TorchVirtual, ABC):
    """Workers that were started together. Mirrors torch's ``PContext``.

    Args:
        name: header of teed lines.
        entrypoint: function or program.
        args: arguments by local rank.
        envs: environment variables by local rank, added to this process's.
        logs_specs: decides where the output goes.
        log_line_prefixes: headers of teed lines by local rank, instead of ``[<name><local rank>]:``.
        duplicate_stdout_filters: if not empty, teed lines of standard output with one of these strings also go to the
            file ``filtered_stdout`` of the logs.
        duplicate_stderr_filters: likewise for standard error.

    Raises:
        RuntimeError: the logs do not cover all local ranks.
        OSError: a log file or folder cannot be made.

    Attributes:
        shutdown_timeout: seconds between the stop signal and SIGKILL where workers are stopped because one has failed, and
            after a success the seconds in which processes that the workers left in their groups may finish. Set it before :meth:`start`.
        interactive_rank: local rank that gets the terminal on standard input; ``None`` gives it to nobody. Set it before :meth:`start`.
        on_first_failure: called once with the first failure, as soon as it is seen: its peers are being stopped, and may take as
            long as the grace.
    """

    shutdown_timeout: float = 30
    interactive_rank: int | None = None
    on_first_failure: Callable[[ProcessFailure], object] | None = None

    def __init__(
        self,
        name: str,
        entrypoint: Callable[..., Any] | str,
        args: dict[int, tuple[Any, ...]],
        envs: dict[int, dict[str, str]],
        logs_specs: LogsSpecs,
        log_line_prefixes: dict[int, str] | None = None,
        duplicate_stdout_filters: list[str] | None = None,
        duplicate_stderr_filters: list[str] | None = None,
    ) -> None:
        self.name = name
        nprocs = len(args)
        logs_dest = logs_specs.reify(envs)
        _validate_full_rank(logs_dest.stdouts, nprocs, "stdouts")
        _validate_full_rank(logs_dest.stderrs, nprocs, "stderrs")
        self.entrypoint = entrypoint
        self.args = args
        self.envs = envs
        self.stdouts = logs_dest.stdouts
        self.stderrs = logs_dest.stderrs
        self.error_files = logs_dest.error_files
        self.nprocs = nprocs
        self.filtered_stdout: TextIO | None = None
        self.filtered_stderr: TextIO | None = None
        # At most one: a list can be filled by the very call that starts the processes, see `_processes.spawn`.
        self._groups: list[_rust.Group] = []
        self._running_local_ranks: set[int] = set(range(nprocs))
        self._failures: dict[int, ProcessFailure] = {}
        self._stopped: dict[int, ProcessFailure] = {}
        self._stop_reported = False
        # What a rank that has succeeded leaves in its process group has this time to finish.
        self._linger_s = 0.0
        # Seconds between the signal to end and SIGKILL, if a stop was begun before `close`.
        self._grace_s: float | None = None
        self._handling: _signals.Handling | None = None
        self._tails_give_up_at: float | None = None
        self._terminal: Terminal | None = None
        self._tail_logs = [
            TailLog(name, logs_dest.tee_stdouts, sys.stdout, log_line_prefixes),
            TailLog(name, logs_dest.tee_stderrs, sys.stderr, log_line_prefixes),
        ]

        def duplicate(stream: str, tees: Mapping[int, str], filters: list[str]) -> TextIO | None:
            path = _compat.newer(logs_dest, f"filtered_{stream}", "")
            if not path:
                logger.warning(
                    "duplicate_%s_filters are ignored: %s names no file filtered_%s; leave them out, or have its reify() name one",
                    stream,
                    type(logs_specs).__name__,
                    stream,
                )
                return None
            # Line by line, as a tail of the filtered file expects.
            filtered = open(path, "w", errors="replace", buffering=1)  # noqa: SIM115 - closed by close()
            self._tail_logs.append(TailLog(name, tees, filtered, log_line_prefixes, only_lines_with=filters))
            return filtered

        try:
            if duplicate_stdout_filters:
                self.filtered_stdout = duplicate("stdout", logs_dest.tee_stdouts, duplicate_stdout_filters)
            if duplicate_stderr_filters:
                self.filtered_stderr = duplicate("stderr", logs_dest.tee_stderrs, duplicate_stderr_filters)
        except OSError:
            self._close_files()
            raise

    @property
    def native_group(self) -> _rust.Group | None:
        """The workers as the engine's group, to wait for exits and to read them. Not in torch.

        ``None`` before the start, without workers, and in subclasses that start processes without the engine.
        """
        return self._groups[0] if self._groups else None

    def start(self) -> None:
        """Start the workers, and on the main thread make the agent's signals raise :class:`SignalException` until :meth:`close`.

        Which signals these are is told by the variable ``TORCHELASTIC_SIGNALS_TO_HANDLE``.

        Raises:
            OSError: a worker cannot be started; :meth:`close` ends those that were.
            ValueError: there is an interactive rank, and standard input is no terminal.
        """
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "Failed to register signal handlers since torchelastic is running on a child thread. "
                "This could lead to orphaned worker processes if the torchrun is terminated."
            )
        _warn_of_ignored_sigchld()
        names = os.environ.get(_signals.SIGNALS_ENV, _signals.DEFAULT_SIGNALS)
        self._handling = _signals.Handling(names, receiver=self._pass_on)
        self._handling.install()
        if self.interactive_rank is not None:
            from ferroelastic.multiprocessing._terminal import Terminal

            self._terminal = Terminal()
            self._terminal.start()
        self._start()
        for tail_log in self._tail_logs:
            tail_log.start()

    @abstractmethod
    def _start(self) -> None:
        """Start the workers."""

    @abstractmethod
    def _poll(self) -> RunProcsResult | None:
        """Look at the workers: a result when all have succeeded or any has failed, else ``None``."""

    @abstractmethod
    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""

    @abstractmethod
    def _close(self, death_sig: signal.Signals, timeout: float = 30) -> None:
        """End the workers that still run."""

    def wait(self, timeout: float = -1, period: float = 1) -> RunProcsResult | None:
        """Wait until all workers have succeeded or one has failed; the others are stopped then.

        An exit ends the wait at once. On the main thread a signal's handler runs at once, too, and what it raises
        (:class:`SignalException`) leaves this call; answer it with :meth:`close`.

        Args:
            timeout: seconds; negative without limit, 0 only looks.
            period: not used, except by subclasses that know nothing of the engine: seconds between looks.

        Returns:
            The outcome, or ``None`` if the workers still run after ``timeout``.
        """
        if timeout == 0:
            return self._look()
        deadline = math.inf if timeout < 0 else time.monotonic() + timeout
        while True:
            group = self.native_group
            generation = 0 if group is None else group.generation
            result = self._look()
            if result is not None:
                return result
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            if group is not None:
                wait_for_event(group, generation, remaining)
            else:  # a subclass written for torch: it can only be asked
                threading.Event().wait(min(period, remaining))

    def _look(self) -> RunProcsResult | None:
        """Look at the workers; a signal meanwhile is raised after it, if they still run, so that nothing is noted by halves."""
        with _signals.shielded(self._hurry):
            result = self._poll()
        if result is None:
            _signals.raise_pending()
        return result

    def close(self, death_sig: signal.Signals | None = None, timeout: float = 30) -> None:
        """Stop the workers, finish their logs and let go of all files. Safe to call again, and after a failed start.

        Stopping covers the whole process group of each worker, also of one that has ended. A signal that arrives meanwhile does not shorten
        the grace, unless it is the second SIGINT or SIGQUIT: then SIGKILL follows at once. A first signal is raised as
        :class:`SignalException` when all is closed, unless an agent that runs these workers deals with it.

        Args:
            death_sig: what to send first; SIGTERM if not given.
            timeout: seconds until SIGKILL; the processes have as long again (at least 5) to go after that.
        """
        is_answer = isinstance(sys.exc_info()[1], _compat.family(SignalException))
        pending: SignalException | None = None
        with _signals.shielded(self._hurry):
            with ExitStack() as stack:
                stack.callback(self._close_files)
                for tail_log in self._tail_logs:
                    stack.callback(self._stop_tail, tail_log)
                if self._terminal is not None:
                    stack.callback(self._terminal.close)
                self._close(death_sig or signal.SIGTERM, timeout)
            if self._handling is not None:
                pending = self._handling.restore()
                self._handling = None  # it refers to this object
        if pending is not None and not is_answer:
            raise pending

    def _close_after_exits(self) -> None:
        """Close after all workers have succeeded, or one has failed."""
        if not self._failures:
            self._linger_s = self.shutdown_timeout
        self.close(timeout=self.shutdown_timeout)

    def _terminal_of(self, local_rank: int) -> Terminal | None:
        return self._terminal if local_rank == self.interactive_rank else None

    def begin_stop(self, death_sig: signal.Signals, timeout: float) -> None:
        """Send the workers the signal to end and return; :meth:`close` does the rest.

        Args:
            death_sig: the signal.
            timeout: seconds until SIGKILL.
        """
        if self.native_group is not None:
            # The deadline of a stop that is under way stays as it is.
            self._grace_s = self.shutdown_timeout if self._failures else timeout
            self.native_group.stop(death_sig, timeout, kill_wait_s(timeout))

    def _stop_tail(self, tail_log: TailLog) -> None:
        """Let a tail write what is left. All of them together wait for a console that takes nothing for no longer than one would."""
        if self._tails_give_up_at is None:
            self._tails_give_up_at = time.monotonic() + _CONSOLE_PATIENCE_S
        tail_log.stop(max(_LEAST_CONSOLE_PATIENCE_S, self._tails_give_up_at - time.monotonic()))

    def _hurry(self) -> None:
        if self.native_group is not None:
            self.native_group.hurry()

    def _pass_on(self, number: int) -> int:
        """Send a signal to the workers, not to their children; return how many were there to get it."""
        group = self.native_group
        return (
            0 if group is None else sum(group.signal(rank, number, leader_only=True) for rank in range(len(group.pids)))
        )

    def _close_files(self) -> None:
        for filtered in (self.filtered_stdout, self.filtered_stderr):
            if filtered is not None:
                filtered.close()

    def _arm(self, group: _rust.Group) -> None:
        """Have the engine stop the peers of the first worker that fails, whatever Python is doing then."""
        group.stop_on_failure(signal.SIGTERM, self.shutdown_timeout, kill_wait_s(self.shutdown_timeout))

    def _stop_group(self, group: _rust.Group, death_sig: signal.Signals, timeout: float) -> None:
        """Stop all process groups and wait until they are empty or the last deadline has passed."""
        grace_s = timeout if self._linger_s == 0 else min(timeout, _OVERDUE_GRACE_S)
        report = stop_group(group, death_sig, grace_s, linger_s=self._linger_s)
        if self._grace_s is None:
            self._grace_s = self.shutdown_timeout if self._failures else grace_s
        self._report_stop(report, self._grace_s)

    def _report_stop(self, report: _rust.StopReport, grace_s: float) -> None:
        if self._stop_reported:
            return
        self._stop_reported = True
        for leftover in report.overdue:
            logger.warning(
                "Worker %s succeeded and left process %s (%s) in its process group; it had not finished after %g s "
                "(--shutdown-timeout) and was ended",
                leftover.index,
                leftover.pid,
                leftover.command,
                self._linger_s,
            )
        if report.killed and not report.overdue:
            killed = ", ".join(map(str, report.killed))
            if report.elapsed_s < grace_s:
                logger.warning(
                    "Workers of local ranks %s were killed %.1f s after the signal to end: their grace period of %g s was cut short",
                    *(killed, report.elapsed_s, grace_s),
                )
            else:
                logger.warning("Workers of local ranks %s did not end within %g s and were killed", killed, grace_s)
        for survivor in report.survivors:
            logger.error(
                "process %s of worker %s outlived SIGKILL (state %s%s) and is left behind: it holds on to what it has"
                " of this host; look at its device or file system, or restart the host",
                survivor.pid,
                survivor.index,
                survivor.state,
                f", waiting in {survivor.wait_channel}" if survivor.wait_channel else "",
            )

    def _note_end(self, local_rank: int, pid: int, exitcode: int, ended: _rust.Exit | None) -> None:
        """Enter the end of one worker among the failures or the stopped."""
        was_stopped = ended is not None and ended.stopped
        if exitcode != 0 or was_stopped:
            (self._stopped if was_stopped else self._failures)[local_rank] = ProcessFailure(
                local_rank=local_rank,
                pid=pid,
                exitcode=exitcode,
                error_file=self.error_files[local_rank],
                exit=ended,
            )
        # Last: a signal handler may raise anywhere before, and then the end is entered by the next look.
        self._running_local_ranks.discard(local_rank)

    def _result(self, return_values: dict[int, Any]) -> RunProcsResult:
        return RunProcsResult(
            return_values=return_values,
            failures=self._failures,
            stdouts=self.stdouts,
            stderrs=self.stderrs,
            stopped=self._stopped,
        )

    def _first_failure(self) -> ProcessFailure:
        return min(self._failures.values(), key=failed_at_ns)

    def _tell_first_failure(self) -> None:
        tell, self.on_first_failure = self.on_first_failure, None
        if tell is not None and self._failures:
            tell(self._first_failure())


def _warn_of_ignored_sigchld() -> None:
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        logger.warning(
            "This process ignores SIGCHLD, so the kernel discards exit statuses: before Linux 6.15 every worker is reported as failed. "
            "Set SIGCHLD to signal.SIG_DFL before the workers start"
        )
