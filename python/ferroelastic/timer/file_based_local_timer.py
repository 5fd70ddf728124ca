"""Mirror of ``torch.distributed.elastic.timer.file_based_local_timer``.

The wire format is torch's, so clients and servers of both packages interoperate. Intended differences:

* The client opens the pipe once and writes once per request. If the pipe is full or has lost its reader, the client neither raises nor
  blocks: the request is queued and sent before the next one. Without a server from the start it raises as in torch, but waits only once.
* The engine reads the pipe and keeps the deadlines, independent of the GIL. It acts at each deadline. A change of the system clock moves no
  deadline. ``max_interval`` is ignored. A malformed line is reported and does not affect other lines.
* The server signals only descendants of its process and processes in the sessions of its workers.
* A pipe that another process serves is an error. torch replaces that process's pipe.
* ``log_event`` and the debug hook are called after a process was signalled, in a thread. With ``reap_server=False`` the server does not
  signal its own process afterwards.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from json.encoder import encode_basestring_ascii
from os import getpid
from signal import SIGKILL
from typing import TYPE_CHECKING, Any, TypeVar

from ferroelastic.timer._pipe import Pipe
from ferroelastic.timer._wire import VERSION, encode, encode_heartbeat, join
from ferroelastic.timer.api import TimerClient, TimerRequest
from ferroelastic.timer.debug_info_logging import log_debug_info_for_expired_timers
from ferroelastic.utils import _threads
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ferroelastic import _rust

__all__ = ["FileTimerClient", "FileTimerRequest", "FileTimerServer"]

T = TypeVar("T")
U = TypeVar("U")

logger = get_logger(__name__)

_RELEASE = -1
_JOIN_TIMEOUT_S = 5.0


class FileTimerRequest(TimerRequest):
    """A timer request with a signal. Mirrors ``torch.distributed.elastic.timer.FileTimerRequest``.

    Args:
        worker_pid: process id of the worker.
        scope_id: see :class:`TimerRequest`.
        expiration_time: see :class:`TimerRequest`.
        signal: number of the signal that is sent to the worker when the timer expires; 0 or less sends none.
    """

    def __init__(self, worker_pid: int, scope_id: str, expiration_time: float, signal: int = 0) -> None:
        super().__init__(worker_id=worker_pid, scope_id=scope_id, expiration_time=expiration_time)
        self.version = VERSION
        self.signal = signal

    @property
    def worker_pid(self) -> int:
        """Process id of the worker."""
        pid: int = self.worker_id
        return pid

    @worker_pid.setter
    def worker_pid(self, pid: int) -> None:
        # Copies restore it, because it is a slot of torch's class before 2.10.
        self.worker_id = pid

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FileTimerRequest):
            return False
        return super().__eq__(other) and (self.version, self.signal) == (other.version, other.signal)

    __hash__ = None  # as in TimerRequest

    def to_json(self) -> str:
        """Return the request in the wire format, without the line end."""
        return encode(self.version, self.worker_pid, self.scope_id, self.expiration_time, self.signal)


class FileTimerClient(TimerClient):
    """Sends requests through the named pipe of a server. Mirrors ``torch.distributed.elastic.timer.FileTimerClient``.

    A client in a worker also arms a dump of the worker's Python stacks, which the agent requests when a timer expires. ``faulthandler``
    writes it to a file beside the worker's error file, on a real-time signal (``SIGRTMIN + 13``). If the program uses that signal, the dump
    is not armed.

    Args:
        file_path: path of the pipe. In workers, the environment variable ``TORCHELASTIC_TIMER_FILE`` has this path.
        signal: number of the signal that is sent to this process when a timer expires; 0 or less sends none.
    """

    def __init__(self, file_path: str, signal: int = SIGKILL) -> None:
        self._file_path = file_path
        self.signal = signal
        self._pipe = Pipe(file_path)

    @property
    def signal(self) -> int:
        """Number of the signal that is sent to this process when a timer expires."""
        return self._signal

    @signal.setter
    def signal(self, signal: int) -> None:
        self._signal = signal
        self._signal_as_json = json.dumps(signal)

    @property
    def unsent(self) -> int:
        """Number of queued requests. They are sent before the next request. Not in torch."""
        return self._pipe.unsent

    @property
    def delayed(self) -> int:
        """Number of requests that were queued since the creation of this client. Not in torch."""
        return self._pipe.delayed

    @property
    def path(self) -> str:
        """Path of the pipe. Not in torch."""
        return self._file_path

    def _send_request(self, request: FileTimerRequest) -> None:
        self._pipe.send(request.worker_pid, request.scope_id, request.to_json())

    def start_heartbeat(self, scope_id: str, expiration_time: float, slot: int, timeout_s: float) -> bool:
        """Start a timer that heartbeats postpone, for :func:`ferroelastic.timer.heartbeat`. Not in torch.

        Args:
            scope_id: name of the scope.
            expiration_time: deadline of the first heartbeat in seconds since the epoch.
            slot: index of the heartbeat slot.
            timeout_s: maximum time between two heartbeats in seconds.

        Returns:
            ``True`` if the request was sent; ``False`` if it was dropped.

        Raises:
            BrokenPipeError: no server has ever served the pipe.
            RuntimeError: the scope is too long.
        """
        request = FileTimerRequest(getpid(), scope_id, expiration_time, self.signal)
        self._pipe.send(request.worker_pid, scope_id, encode_heartbeat(request.to_json(), slot, timeout_s))
        return not self._pipe.withdraw(request.worker_pid, scope_id)

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Start the timer of a scope; see :meth:`TimerClient.acquire`.

        Raises:
            BrokenPipeError: there never was a server.
            RuntimeError: the scope is too long.
        """
        pid = getpid()
        # Fast path with the same text as `json.dumps`, for finite numbers only: `repr` and JSON differ for the others.
        if type(expiration_time) is float and expiration_time - expiration_time == 0.0 and type(scope_id) is str:
            scope = encode_basestring_ascii(scope_id)
            request = join(VERSION, pid, scope, repr(expiration_time), self._signal_as_json)
        else:
            request = FileTimerRequest(pid, scope_id, expiration_time, self.signal).to_json()
        self._pipe.send(pid, scope_id, request)

    def release(self, scope_id: str) -> None:
        """Release the timer of a scope; see :meth:`TimerClient.release`.

        Raises:
            BrokenPipeError: there never was a server.
            RuntimeError: the scope is too long.
        """
        pid = getpid()
        if type(scope_id) is str:
            request = join(VERSION, pid, encode_basestring_ascii(scope_id), _RELEASE, 0)
        else:
            request = FileTimerRequest(pid, scope_id, _RELEASE, 0).to_json()
        self._pipe.send(pid, scope_id, request)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without the open pipe."""
        return {name: value for name, value in self.__dict__.items() if name != "_pipe"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled client. It opens the pipe on its first request."""
        self.__dict__.update(state)
        self._pipe = Pipe(self._file_path)


class FileTimerServer:
    """Signals processes of this host when their timers expire. Mirrors ``torch.distributed.elastic.timer.FileTimerServer``.

    The constructor creates the pipe. :meth:`start` begins to serve it.

    Args:
        file_path: path of the pipe, which is created.
        run_id: run id of the job, for the log.
        max_interval: ignored. The polling interval of torch's server in seconds.
        daemon: whether the reporting thread is a daemon thread.
        log_event: callback with the name of an event and its request (or ``None``). The events are ``"watchdog started"``,
            ``"timer expired"``, ``"kill worker process"`` and ``"watchdog stopped"``.
        reap_server: whether the server also signals its own process after it has signalled another process, as torch's server does. An
            agent that restarts its workers passes ``False``. Not in torch.
        evidence_s: timeout in seconds to collect evidence about the workers before a process is signalled, see :meth:`set_workers`.
            0 collects none. Not in torch.
        py_spy: path of the program py-spy, for the stacks of workers without their own stack dump. ``None`` uses none. Not in torch.

    Raises:
        OSError: the pipe cannot be created. The errno is ``EADDRINUSE`` if another process serves it.
    """

    def __init__(
        self,
        file_path: str,
        run_id: str,
        max_interval: float = 10,
        daemon: bool = True,
        log_event: Callable[[str, FileTimerRequest | None], None] | None = None,
        *,
        reap_server: bool = True,
        evidence_s: float = 0.0,
        py_spy: str | None = None,
    ) -> None:
        from ferroelastic._engine import get_engine

        self._file_path = file_path
        self._run_id = run_id
        self._max_interval = max_interval
        self._daemon = daemon
        self._log_event = _ignore if log_event is None else log_event
        self._reap_server = reap_server
        self._stop_signaled = False
        self._run_once = False
        self._watchdog_thread: threading.Thread | None = None
        self._native: _rust.Watchdog = get_engine().watchdog(file_path, evidence_s=evidence_s, py_spy=py_spy)
        self._owner_pid = os.getpid()
        self._last_counts = self._native.counts()
        self._last_timers: dict[tuple[int, str], FileTimerRequest] = {}
        self._is_closed = False
        self._reported_dropped = 0

    @property
    def _timers(self) -> dict[tuple[int, str], FileTimerRequest]:
        """The armed timers by process and scope, earliest first. After the stop: the timers that were armed at the stop."""
        armed = self._query(self._native.timers, None)
        if armed is not None:
            earliest_first = sorted(armed, key=lambda timer: timer[2])
            self._last_timers = {timer[:2]: FileTimerRequest(*timer) for timer in earliest_first}
        return self._last_timers

    @property
    def _counts(self) -> _rust.WatchdogCounts:
        self._last_counts = self._query(self._native.counts, self._last_counts)
        return self._last_counts

    def _query(self, function: Callable[[], T], default: U) -> T | U:
        """Call ``function`` of the native server; return ``default`` if the server is closed."""
        try:
            return default if self._is_closed else function()
        except RuntimeError:  # closed by another thread
            return default

    @property
    def _request_count(self) -> int:
        """Number of valid requests."""
        return self._counts.requests

    @property
    def _is_client_started(self) -> bool:
        return self._request_count > 0

    @property
    def _last_progress_time(self) -> int:
        return self.get_last_progress_time()

    def start(self) -> None:
        """Start to serve the pipe. A second call only creates the pipe again if it was removed."""
        self._native.start()
        if self._watchdog_thread is not None:
            return
        logger.info("Starting %s... daemon=%s, file_path=%s", type(self).__name__, self._daemon, self._file_path)
        self._watchdog_thread = threading.Thread(target=self._watchdog_loop, name="ferro-timer", daemon=self._daemon)
        _threads.start(self._watchdog_thread)
        # The thread must end before the interpreter. This hook is registered after the engine's hook, so it runs first.
        atexit.register(self._close)
        self._log_event("watchdog started", None)

    def stop(self) -> None:
        """Stop to serve the pipe and remove it. Does nothing in a forked process."""
        if self._owner_pid != os.getpid():
            return
        logger.info("Stopping %s", type(self).__name__)
        self._close()
        self._log_event("watchdog stopped", None)

    def run_once(self) -> None:
        """Process all requests that were sent until now, then stop to serve the pipe."""
        self._run_once = True
        if self._watchdog_thread is not None:
            self._native.drain()
        self._close()

    def _close(self) -> None:
        """Close the pipe and let the thread report the last events."""
        if self._owner_pid != os.getpid():
            return
        self._stop_signaled = True
        if not self._is_closed:
            self._timers, self._counts  # noqa: B018 - both properties store the last values
            self._is_closed = True
            self._native.close()
        atexit.unregister(self._close)
        thread = self._watchdog_thread
        # An event handler may stop the server.
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_TIMEOUT_S)
            self._watchdog_thread = None
        self._warn_of_dropped_requests()

    def last_request_age_s(self, pid: int) -> float | None:
        """Return the seconds since the last request or heartbeat of a process; ``None`` without one. Not in torch.

        Args:
            pid: process id.
        """
        return self._query(lambda: self._native.last_request_age_s(pid), None)

    @staticmethod
    def is_process_running(pid: int) -> bool:
        """Return whether a process exists and this process may signal it.

        Args:
            pid: process id.
        """
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return True

    def _watchdog_loop(self) -> None:
        while expiries := self._native.next_expiries():
            try:
                self._report(expiries)
            except Exception:  # noqa: PERF203 - the loop goes on
                logger.exception("Error running watchdog")

    def _report(self, expiries: Sequence[_rust.Expiry]) -> None:
        """Call the hooks and log the outcome for timers that have expired."""
        by_pid: dict[int, list[_rust.Expiry]] = {}
        for expiry in sorted(expiries, key=lambda expiry: expiry.expiration_time):
            by_pid.setdefault(expiry.pid, []).append(expiry)
        requests = {pid: [_request_of(expiry) for expiry in expired] for pid, expired in by_pid.items()}
        # Looked up in this module, because programs replace the function here.
        log_debug_info_for_expired_timers(
            self._run_id, {pid: [request.to_json() for request in expired] for pid, expired in requests.items()}
        )
        last_signal = 0
        for pid, expired in by_pid.items():
            logger.info("Reaping worker_pid=[%s]. Expired timers: %s", pid, self._get_scopes(requests[pid]))
            for expiry, request in zip(expired, requests[pid], strict=True):
                self._log_event("timer expired", request)
                if expiry.signal > 0:
                    if self._report_outcome(expiry, request):
                        last_signal = expiry.signal
                    break
            else:
                logger.info("No signal specified with worker=[%s]. Do not reap it.", pid)
        self._warn_of_dropped_requests()
        if self._reap_server and last_signal > 0:
            logger.info("Terminating the server process=[%s] because of expired timers", os.getpid())
            self._reap_worker(os.getpid(), last_signal)

    def _report_outcome(self, expiry: _rust.Expiry, request: FileTimerRequest) -> bool:
        """Log the outcome of an expired timer; return whether the process was signalled or has ended."""
        if expiry.outcome == "signalled":
            logger.info("Successfully reaped worker=[%s] with signal=%s", expiry.pid, expiry.signal)
        elif expiry.outcome == "gone":
            logger.info("Process with pid=%s does not exist. Skipping", expiry.pid)
        else:
            not_ours = "it is neither a worker of this agent nor a descendant of one (pids of another pid namespace do not match)"
            reason = not_ours if expiry.outcome == "not ours" else "permission denied"
            logger.error(
                "timer %r of process %s has expired, but the process was not signalled: %s",
                expiry.scope,
                expiry.pid,
                reason,
            )
            return False
        self._log_event("kill worker process", request)
        return True

    def _warn_of_dropped_requests(self) -> None:
        """Warn of requests that were dropped since the last warning: broken ones, as counted in /metrics, and refused ones."""
        counts = self._counts
        broken = counts.broken + counts.oversized + counts.unknown_version
        dropped = broken + counts.refused
        if dropped > self._reported_dropped:
            logger.warning(
                "dropped %d timer requests at %s. In total %d were broken (%d malformed, %d too long, %d of an unknown"
                " version) and %d were refused; the newest: %s",
                *(dropped - self._reported_dropped, self._file_path, broken, counts.broken, counts.oversized),
                *(counts.unknown_version, counts.refused, counts.last_broken),
            )
            self._reported_dropped = dropped

    def _get_scopes(self, timer_requests: list[FileTimerRequest]) -> list[str]:
        return [request.scope_id for request in timer_requests]

    def _reap_worker(self, worker_pid: int, signal: int) -> bool:
        try:
            os.kill(worker_pid, signal)
        except ProcessLookupError:
            logger.info("Process with pid=%s does not exist. Skipping", worker_pid)
        except Exception:
            logger.exception("Error terminating pid=%s", worker_pid)
            return False
        return True

    def register_timers(self, timer_requests: list[FileTimerRequest]) -> None:
        """Start and release timers, as requests through the pipe do.

        Args:
            timer_requests: requests in the order of their arrival.
        """
        self._native.register(
            [
                (request.worker_pid, request.scope_id, float(request.expiration_time), int(request.signal))
                for request in timer_requests
            ]
        )

    def clear_timers(self, worker_pids: set[int]) -> None:
        """Release all timers of some processes, and of processes that have ended.

        Args:
            worker_pids: process ids.
        """
        ended = {pid for pid, _ in self._timers if not self.is_process_running(pid)}
        self._native.clear(list(ended | set(worker_pids)))

    def get_expired_timers(self, deadline: float) -> dict[int, list[FileTimerRequest]]:
        """Return the expired timers by process id.

        Args:
            deadline: timers that expire at this time or earlier are returned, in seconds since the epoch.
        """
        expired: dict[int, list[FileTimerRequest]] = {}
        for request in self._timers.values():
            if request.expiration_time <= deadline:
                expired.setdefault(request.worker_pid, []).append(request)
        return expired

    def get_last_progress_time(self) -> int:
        """Return the time of the last progress in seconds since the epoch.

        This is the current time. If a process has missed a deadline and still runs, it is that deadline.
        """
        return int(time.time() - self._query(self._native.overdue_s, 0.0))

    def set_workers(self, workers: Iterable[tuple[int, str, str]]) -> None:
        """Set the workers. When a timer of one expires, evidence about all of them is collected before the signal. Not in torch.

        Args:
            workers: process id, name and evidence folder of each worker. The folder must exist; ``""`` collects no evidence.
                Replaces the previous list. The evidence is the state of each process and its stacks.
        """
        self._native.set_workers(list(workers))

    def expiry(self, pid: int) -> _rust.Expiry | None:
        """Return the last timer that caused a signal to a process, or ``None``. Not in torch.

        Args:
            pid: process id. For a worker, the timers of its descendants are included.
        """
        return self._query(lambda: self._native.expiry(pid), None)


def _ignore(name: str, request: FileTimerRequest | None) -> None:
    pass


def _request_of(expiry: _rust.Expiry) -> FileTimerRequest:
    return FileTimerRequest(expiry.pid, expiry.scope, expiry.expiration_time, expiry.signal)
