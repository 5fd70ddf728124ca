"""Base class of the contexts for commands and for function workers."""

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
from ferroelastic._engine import get_engine
from ferroelastic._signals import SignalException
from ferroelastic._stop_notice import STOP_FILE_ENV
from ferroelastic._wait import wait_for_event
from ferroelastic.multiprocessing._line_heads import global_ranks, json_heads, with_pids
from ferroelastic.multiprocessing._log_options import LogOptions
from ferroelastic.multiprocessing._log_rules import LogWatch, describe
from ferroelastic.multiprocessing._std import _validate_full_rank
from ferroelastic.multiprocessing._stderr import ConsoleStreams, end_of_file
from ferroelastic.multiprocessing._stopping import kill_wait_s, make_stop_file, stop_group
from ferroelastic.multiprocessing.errors import ProcessFailure
from ferroelastic.multiprocessing.errors._failures import NOT_AVAILABLE, failed_at_ns
from ferroelastic.multiprocessing.tail_log import TailLog
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ferroelastic import _rust
    from ferroelastic._stop_notice import SignalTarget, StopReason
    from ferroelastic.multiprocessing._logs import LogsSpecs
    from ferroelastic.multiprocessing._terminal import Terminal

__all__ = ["PContext", "RunProcsResult"]

logger = get_logger(__name__)

_MAX_OVERDUE_GRACE_S = 5.0
_CONSOLE_TIMEOUT_S = 0.5
_MIN_CONSOLE_TIMEOUT_S = 0.05
_ROTATION_TIMEOUT_S = 5.0
_EXPLANATION_TIMEOUT_S = 0.1
"""Time for the search of the last log lines before the first failure is reported."""
_LOG_FAILURE_CODE = 1
"""Exit code of a worker that has ended with 0 and has failed because of a line in its log."""


@dataclass
class RunProcsResult(_compat.TorchCompatible):
    """Outcome of a group of workers. Mirrors ``torch.distributed.elastic.multiprocessing.RunProcsResult``.

    All attributes are dictionaries by local rank.

    Attributes:
        return_values: return values of function workers. Commands have ``None``.
        failures: workers that failed by themselves. torch's attribute also holds workers that the agent stopped.
        stdouts: log file of each worker's standard output, ``""`` if it was not redirected.
        stderrs: log file of each worker's standard error, ``""`` if it was not redirected.
        stopped: workers that ended after the agent sent them a stop signal. Not in torch.
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
    """A group of workers that are started together. Mirrors ``torch.distributed.elastic.multiprocessing.PContext``.

    Args:
        name: prefix of teed lines.
        entrypoint: function or program.
        args: arguments by local rank.
        envs: environment variables by local rank, added to the environment of this process.
        logs_specs: destinations of the workers' output.
        log_line_prefixes: prefixes of teed lines by local rank. The default is ``[<name><local rank>]:``.
        duplicate_stdout_filters: teed lines of standard output that contain one of these strings are also written to
            ``LogsDest.filtered_stdout``. Empty or ``None`` writes none.
        duplicate_stderr_filters: the same for standard error and ``LogsDest.filtered_stderr``.

    Raises:
        RuntimeError: the log destinations do not cover all local ranks.
        OSError: a log file or folder cannot be created.

    Attributes:
        shutdown_timeout: after a failure, the grace period in seconds between SIGTERM and SIGKILL for the other workers. After a success,
            the time in seconds for processes that the workers left in their process groups. Set it before :meth:`start`. Not in torch.
        grace_signal_target: receivers of the stop signal: ``"group"`` for the worker's process group, or ``"leader"`` for the worker alone.
            The rest of the group then gets SIGTERM after the worker has ended. SIGKILL always goes to the group. Set it before
            :meth:`start`. Not in torch.
        interactive_rank: local rank that gets the terminal of standard input; ``None`` for no rank. Set it before :meth:`start`.
            Not in torch.
        warm_pool: parked children that become the first workers, which run a program or have the start method ``spawn``; ``None`` starts all
            workers anew. Set it before :meth:`start`. Not in torch.
        log_options: options for the lines of the workers; ``None`` for torch's behaviour. Set it before :meth:`start`. Not in torch.
        on_first_failure: callback for the first failure. It is called once, before the other workers have ended: they may use their
            whole grace period. Not in torch.
    """

    shutdown_timeout: float = 30
    grace_signal_target: SignalTarget = "group"
    interactive_rank: int | None = None
    warm_pool: _rust.WarmPool | None = None
    log_options: LogOptions | None = None
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
        # At most one group. It is a list because the call that starts the processes can append to it, see `_processes.spawn`.
        self._groups: list[_rust.Group] = []
        self._running_local_ranks: set[int] = set(range(nprocs))
        self._failures: dict[int, ProcessFailure] = {}
        self._stopped: dict[int, ProcessFailure] = {}
        self._stop_reported = False
        # Time for processes that a successful rank left in its process group.
        self._linger_s = 0.0
        # Grace period of a stop that was begun before `close`.
        self._grace_s: float | None = None
        self._handling: _signals.Handling | None = None
        self._tails_deadline: float | None = None
        self._terminal: Terminal | None = None
        self._log_watch: LogWatch | None = None
        self._log_rotation: _rust.LogRotation | None = None
        self._log_line_prefixes = log_line_prefixes
        self._stop_file: _rust.StopFile | None = None
        self._console_streams: ConsoleStreams | None = None
        self._tail_logs = [
            TailLog(name, logs_dest.tee_stdouts, sys.stdout, log_line_prefixes),
            TailLog(name, logs_dest.tee_stderrs, sys.stderr, log_line_prefixes),
        ]

        def duplicate(stream: str, tees: Mapping[int, str], filters: list[str]) -> TextIO | None:
            path = _compat.newer(logs_dest, f"filtered_{stream}", "")
            if not path:
                logger.warning(
                    "ignoring duplicate_%s_filters: %s.reify() returned no filtered_%s path; return one, or pass no filters",
                    stream,
                    type(logs_specs).__name__,
                    stream,
                )
                return None
            # Line-buffered, because other programs may follow this file.
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
        """The engine's group of these workers, to wait for exits and to read them. Not in torch.

        ``None`` before the start, for zero workers, and in subclasses that start processes without the engine.
        """
        return self._groups[0] if self._groups else None

    def start(self) -> None:
        """Start the workers and install signal handlers.

        The handlers raise :class:`SignalException` until :meth:`close`. The environment variable ``TORCHELASTIC_SIGNALS_TO_HANDLE`` lists
        the signals. Handlers are installed on the main thread only.

        Raises:
            OSError: a worker cannot be started. :meth:`close` ends the workers that were started.
            ValueError: an interactive rank is set and standard input is not a terminal.
        """
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "Failed to register signal handlers since torchelastic is running on a child thread. "
                "This could lead to orphaned worker processes if the torchrun is terminated."
            )
        _warn_if_sigchld_ignored()
        names = os.environ.get(_signals.SIGNALS_ENV, _signals.DEFAULT_SIGNALS)
        self._handling = _signals.Handling(names, receiver=self._forward_signal)
        self._handling.install()
        if self.interactive_rank is not None:
            from ferroelastic.multiprocessing._terminal import Terminal

            self._terminal = Terminal()
            self._terminal.start()
        self._stop_file = make_stop_file()
        self._start()
        self._follow_logs()

    def _follow_logs(self) -> None:
        """Start to copy and to search the log files."""
        options = self.log_options or LogOptions()
        if self._log_line_prefixes:
            prefixes = with_pids(self._log_line_prefixes, self.pids())
            for tail_log in self._tail_logs:
                tail_log.set_headers(prefixes)
        if options.format == "json":
            for stream, tail_log in zip(("stdout", "stderr"), self._tail_logs, strict=False):
                tail_log.set_headers(json_heads(stream, self.envs), is_json=True)
        if options.max_size is not None:
            files = [path for path in (*self.stdouts.values(), *self.stderrs.values()) if path and path != os.devnull]
            self._log_rotation = get_engine().rotate_logs(files, max_size=options.max_size, max_files=options.max_files)
        for tail_log in self._tail_logs:
            tail_log.start()
        rules = options.rules()
        if rules is not None and self.native_group is not None:
            streams = {"stdout": self.stdouts, "stderr": self.stderrs}
            self._log_watch = LogWatch(rules, streams, global_ranks(self.envs), self.native_group)

    @property
    def log_failures(self) -> dict[int, str]:
        """Workers that have failed because of a line in their log: reason and line by local rank. Not in torch."""
        failures = {} if self._log_watch is None else self._log_watch.update()
        return {rank: describe(failure) for rank, failure in failures.items()}

    def _record_log_failures(self) -> None:
        """Record workers as failed that have ended with success and have a line in their log that fails them."""
        if self._log_watch is None:
            return
        may_grow = bool(self._running_local_ranks or self._failures)
        failures = self._log_watch.update() if may_grow else self._log_watch.finish()
        exits = {ended.index: ended for ended in self.native_group.exits()} if self.native_group is not None else {}
        for rank in failures.keys() - self._running_local_ranks - self._failures.keys() - self._stopped.keys():
            self._record_exit(rank, self.pids()[rank], 0, exits.get(rank))

    @abstractmethod
    def _start(self) -> None:
        """Start the workers."""

    @abstractmethod
    def _poll(self) -> RunProcsResult | None:
        """Check the workers without waiting; return a result if all have succeeded or one has failed, else ``None``."""

    @abstractmethod
    def pids(self) -> dict[int, int]:
        """Return the process ids by local rank."""

    @abstractmethod
    def _close(self, death_sig: signal.Signals, timeout: float = 30) -> None:
        """Stop the workers that still run."""

    def wait(self, timeout: float = -1, period: float = 1) -> RunProcsResult | None:
        """Wait until all workers have succeeded or one has failed. After a failure the other workers are stopped.

        The exit of a worker wakes the call at once. On the main thread, signal handlers run during the wait. If this call raises
        :class:`SignalException`, call :meth:`close`.

        Args:
            timeout: timeout in seconds. A negative value waits without limit; 0 checks once and returns.
            period: polling interval in seconds of subclasses that do not use the engine; otherwise ignored.

        Returns:
            The outcome, or ``None`` if the workers still run after ``timeout``.

        Raises:
            SignalException: a handled signal arrived.
        """
        if timeout == 0:
            return self._poll_shielded()
        deadline = math.inf if timeout < 0 else time.monotonic() + timeout
        while True:
            group = self.native_group
            generation = 0 if group is None else group.generation
            result = self._poll_shielded()
            if result is not None:
                return result
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            if group is not None:
                wait_for_event(group, generation, remaining)
            else:  # a subclass written for torch can only be polled
                threading.Event().wait(min(period, remaining))

    def _poll_shielded(self) -> RunProcsResult | None:
        """Poll while signals are deferred: a signal must not interrupt the recording of an exit. Raise them then if workers still run."""
        with _signals.shielded(self._end_grace):
            result = self._poll()
        if result is None:
            _signals.raise_pending()
        return result

    def close(self, death_sig: signal.Signals | None = None, timeout: float = 30) -> None:
        """Stop the workers, copy the rest of their logs and close all files. Idempotent, and safe after a failed start.

        Each signal goes to the whole process group of each worker, also if the worker itself has ended. A second SIGINT or SIGQUIT to this
        process ends the grace period: SIGKILL follows immediately. Other signals that arrive during the stop do not change it. They are
        raised at the end, unless the agent of these workers handles them.

        Args:
            death_sig: stop signal; SIGTERM by default.
            timeout: grace period in seconds between the stop signal and SIGKILL. After SIGKILL, the call waits up to
                ``max(timeout, 5)`` seconds for the processes to end.

        Raises:
            SignalException: a handled signal arrived during the stop.
        """
        handles_signal = isinstance(sys.exc_info()[1], _compat.family(SignalException))
        pending: SignalException | None = None
        with _signals.shielded(self._end_grace):
            with ExitStack() as stack:
                stack.callback(self._close_files)
                if self._log_watch is not None:
                    stack.callback(self._log_watch.close)
                for tail_log in self._tail_logs:
                    stack.callback(self._stop_tail, tail_log)
                stack.callback(self._finish_console_streams)
                if self._log_rotation is not None:
                    # A file may be locked while its beginning is removed. The tails then would end too early.
                    stack.callback(self._log_rotation.close, _ROTATION_TIMEOUT_S)
                if self._terminal is not None:
                    stack.callback(self._terminal.close)
                self._close(death_sig or signal.SIGTERM, timeout)
            if self._handling is not None:
                pending = self._handling.restore()
                self._handling = None  # it refers to this object
        if pending is not None and not handles_signal:
            raise pending

    def _close_after_exits(self) -> None:
        """Close the context after the success of all workers or the failure of one."""
        if not self._failures:
            self._linger_s = self.shutdown_timeout
        self.close(timeout=self.shutdown_timeout)

    def stderr_tail(self, local_rank: int) -> bytes:
        """Return the last bytes of a worker's standard error, at most 64 KiB. Not in torch.

        Args:
            local_rank: local rank of the worker.

        Returns:
            The bytes that the worker has written so far. After :meth:`close` they are complete. ``b""`` before the start, for the interactive
            rank, and if standard error of this process is closed or the null device. On a terminal they include standard output.
        """
        path = self.stderrs.get(local_rank, "")
        if path:
            return end_of_file(path)
        return b"" if self._console_streams is None else self._console_streams.last(local_rank)

    def _open_console_streams(self) -> ConsoleStreams:
        self._console_streams = ConsoleStreams(self.stdouts, self.stderrs, self.interactive_rank)
        return self._console_streams

    def _terminal_of(self, local_rank: int) -> Terminal | None:
        return self._terminal if local_rank == self.interactive_rank else None

    def _env_of(self, local_rank: int) -> dict[str, str]:
        """Return the variables of a worker, with the path of its stop file."""
        env = self.envs[local_rank]
        return env if self._stop_file is None else {**env, STOP_FILE_ENV: self._stop_file.path}

    def begin_stop(self, death_sig: signal.Signals, timeout: float, reason: StopReason = "shutdown") -> None:
        """Send the stop signal to the workers and return without waiting. Call :meth:`close` afterwards. Not in torch.

        Args:
            death_sig: stop signal.
            timeout: grace period in seconds between the stop signal and SIGKILL.
            reason: reason of the stop, for the workers. See :class:`ferroelastic.StopNotice`.
        """
        if self.native_group is not None:
            # A stop that is in progress keeps its deadline.
            self._grace_s = self.shutdown_timeout if self._failures else timeout
            target = self.grace_signal_target
            self.native_group.stop(death_sig, timeout, kill_wait_s(timeout), target=target, reason=reason)

    def _console_timeout_s(self) -> float:
        """Return the remaining time for a stalled console. All streams share one deadline."""
        if self._tails_deadline is None:
            self._tails_deadline = time.monotonic() + _CONSOLE_TIMEOUT_S
        return max(_MIN_CONSOLE_TIMEOUT_S, self._tails_deadline - time.monotonic())

    def _stop_tail(self, tail_log: TailLog) -> None:
        tail_log.stop(self._console_timeout_s())

    def _finish_console_streams(self) -> None:
        if self._console_streams is not None:
            self._console_streams.finish(self._console_timeout_s())

    def _end_grace(self) -> None:
        if self.native_group is not None:
            self.native_group.end_grace()

    def _forward_signal(self, number: int) -> int:
        """Send a signal to the workers, not to their children; return the number of workers that still ran."""
        group = self.native_group
        return (
            0 if group is None else sum(group.signal(rank, number, leader_only=True) for rank in range(len(group.pids)))
        )

    def _close_files(self) -> None:
        for filtered in (self.filtered_stdout, self.filtered_stderr):
            if filtered is not None:
                filtered.close()

    def _arm(self, group: _rust.Group) -> None:
        """Let the engine stop the peers of the first worker that fails, without waiting for Python."""
        timeout, target = self.shutdown_timeout, self.grace_signal_target
        group.stop_on_failure(signal.SIGTERM, timeout, kill_wait_s(timeout), target=target)

    def _stop_group(self, group: _rust.Group, death_sig: signal.Signals, timeout: float) -> None:
        """Stop all process groups and wait until they are empty or the last deadline has passed."""
        grace_s = timeout if self._linger_s == 0 else min(timeout, _MAX_OVERDUE_GRACE_S)
        reason: StopReason = "shutdown" if self._linger_s == 0 else "success"
        target = self.grace_signal_target
        report = stop_group(group, death_sig, grace_s, linger_s=self._linger_s, target=target, reason=reason)
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
                    "Workers of local ranks %s were killed %.1f s after the stop signal: their grace period of %g s was cut short",
                    *(killed, report.elapsed_s, grace_s),
                )
            else:
                logger.warning("Workers of local ranks %s did not end within %g s and were killed", killed, grace_s)
        for survivor in report.survivors:
            logger.error(
                "process %s of worker %s did not end after SIGKILL (state %s%s) and keeps its resources on this host:"
                " check its device or file system, or restart the host",
                survivor.pid,
                survivor.index,
                survivor.state,
                f", waiting in {survivor.wait_channel}" if survivor.wait_channel else "",
            )

    def _record_exit(self, local_rank: int, pid: int, exitcode: int, ended: _rust.Exit | None) -> None:
        """Record the exit of one worker as a success, a failure or a stop."""
        was_stopped = ended is not None and ended.stopped
        log_failure = None
        if self._log_watch is not None and not was_stopped:
            # The last lines before a failure may explain it.
            known = self._log_watch.update() if exitcode == 0 else self._log_watch.finish(_EXPLANATION_TIMEOUT_S)
            log_failure = known.get(local_rank)
        if log_failure is not None:
            exitcode = exitcode or _LOG_FAILURE_CODE
        if exitcode != 0 or was_stopped:
            (self._stopped if was_stopped else self._failures)[local_rank] = ProcessFailure(
                local_rank=local_rank,
                pid=pid,
                exitcode=exitcode,
                error_file=self.error_files[local_rank],
                exit=ended,
            )
        if log_failure is not None and self._failures[local_rank].error_file == NOT_AVAILABLE:
            self._failures[local_rank].message = describe(log_failure)
        # Last, because a signal handler may raise before this line. The next poll then records the exit again.
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

    def _notify_first_failure(self) -> None:
        if self._console_streams is not None:
            self._console_streams.flush()  # the log lines about a failure follow the worker's traceback
        callback, self.on_first_failure = self.on_first_failure, None
        if callback is not None and self._failures:
            callback(self._first_failure())


def _warn_if_sigchld_ignored() -> None:
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        logger.warning(
            "This process ignores SIGCHLD, so the kernel discards exit statuses: before Linux 6.15 every worker is reported as failed. "
            "Set SIGCHLD to signal.SIG_DFL before the workers start"
        )
