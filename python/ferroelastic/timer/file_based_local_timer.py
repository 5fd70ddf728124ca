"""Mirror of ``torch.distributed.elastic.timer.file_based_local_timer``.

The wire format is torch's: clients and servers of both packages understand each other. Intended differences:

* The client opens the pipe once and writes once per request. Where the pipe is full or its reader has gone it neither raises nor blocks:
  the request is kept and sent before the next one. Where there never was a server it raises as in torch, but waits only once.
* The server's pipe is read and its deadlines are kept natively, whatever Python is doing. A deadline is acted on when it comes,
  and a step of the system's clock moves none; ``max_interval`` has no meaning. A line that is not understood costs itself
  alone, and is reported.
* Only processes of this one's are signalled: descendants, and the sessions of its workers.
* A pipe that another process serves is an error; torch takes it away from that process.
* ``log_event`` and the debug hook are called when a process has been signalled, in a thread. With ``reap_server=False`` the server does not
  signal its own process after that.
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
    """A request of a process of this host. Mirrors ``torch.distributed.elastic.timer.FileTimerRequest``.

    Args:
        worker_pid: process id of the worker.
        scope_id: see :class:`TimerRequest`.
        expiration_time: see :class:`TimerRequest`.
        signal: what ends the worker; 0 or less does not.
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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FileTimerRequest):
            return False
        return super().__eq__(other) and (self.version, self.signal) == (other.version, other.signal)

    __hash__ = None  # as in TimerRequest

    def to_json(self) -> str:
        """Return the request in the wire format, without the line's end."""
        return encode(self.version, self.worker_pid, self.scope_id, self.expiration_time, self.signal)


class FileTimerClient(TimerClient):
    """Asks the server of this host through its named pipe. Mirrors ``torch.distributed.elastic.timer.FileTimerClient``.

    A client in a worker also lets the agent see the worker's Python stacks when a timer expires: it arms a dump by ``faulthandler``
    on a real-time signal (``STACKS_SIGNAL``), unless the program uses that signal, to a file beside the worker's error file.

    Args:
        file_path: path of the pipe; the agent tells it in ``TORCHELASTIC_TIMER_FILE``.
        signal: what ends this process when a timer expires; 0 or less does not.
    """

    def __init__(self, file_path: str, signal: int = SIGKILL) -> None:
        self._file_path = file_path
        self.signal = signal
        self._pipe = Pipe(file_path)

    @property
    def signal(self) -> int:
        """What ends this process when a timer expires."""
        return self._signal

    @signal.setter
    def signal(self, signal: int) -> None:
        self._signal = signal
        self._signal_as_json = json.dumps(signal)

    @property
    def unsent(self) -> int:
        """Requests that could not be sent so far; they are sent before the next one."""
        return self._pipe.unsent

    @property
    def delayed(self) -> int:
        """Requests, all told, that could not be sent when they were made."""
        return self._pipe.delayed

    @property
    def path(self) -> str:
        """Path of the pipe (not in torch)."""
        return self._file_path

    def _send_request(self, request: FileTimerRequest) -> None:
        self._pipe.send(request.worker_pid, request.scope_id, request.to_json())

    def start_heartbeat(self, scope_id: str, expiration_time: float, slot: int, timeout_s: float) -> bool:
        """Start a timer that beats in a slot postpone; for :func:`ferroelastic.timer.heartbeat`. Not in torch.

        Args:
            scope_id: scope of the timer.
            expiration_time: deadline of the first beat, in seconds since the epoch.
            slot: index of the slot.
            timeout_s: longest time between two beats, in seconds.

        Returns:
            Whether the request was sent; otherwise it is dropped.
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
        # The same text as from `json.dumps`, in a fraction of the time. JSON spells numbers that are not finite differently.
        if type(expiration_time) is float and expiration_time - expiration_time == 0.0 and type(scope_id) is str:
            scope = encode_basestring_ascii(scope_id)
            request = join(VERSION, pid, scope, repr(expiration_time), self._signal_as_json)
        else:
            request = FileTimerRequest(pid, scope_id, expiration_time, self.signal).to_json()
        self._pipe.send(pid, scope_id, request)

    def release(self, scope_id: str) -> None:
        """Forget the timer of a scope; see :meth:`TimerClient.release`.

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
        """Return what another process needs; it opens the pipe itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_pipe"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what another process has given."""
        self.__dict__.update(state)
        self._pipe = Pipe(self._file_path)


class FileTimerServer:
    """Ends processes of this host whose timers expire. Mirrors ``torch.distributed.elastic.timer.FileTimerServer``.

    The pipe is there when the constructor returns, and served from :meth:`start` on.

    Args:
        file_path: path of the pipe to be made.
        run_id: id of the run, for the log.
        max_interval: not used; torch's server looks at its timers this often, in seconds.
        daemon: whether the thread that reports lets the process end.
        log_event: called with what has happened and, where it is about one, the request: ``"watchdog started"``, ``"timer expired"``,
            ``"kill worker process"``, ``"watchdog stopped"``.
        reap_server: whether the server also signals its own process when it has signalled another, as torch's does. An agent that
            starts its workers again does not want that.
        evidence_s: seconds that it may take, before a process is signalled, to find out what the workers are doing; see
            :meth:`set_workers`. 0 finds out nothing.
        py_spy: program to ask for the Python stacks of workers that have not armed a dump of their own; ``None`` asks nobody.

    Raises:
        OSError: the pipe cannot be made; ``EADDRINUSE`` where another process serves it.
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
        self._reported = 0

    @property
    def _timers(self) -> dict[tuple[int, str], FileTimerRequest]:
        """The armed timers by process and scope, earliest first; when the server has stopped, those that were armed then."""
        armed = self._ask(self._native.timers, None)
        if armed is not None:
            earliest_first = sorted(armed, key=lambda timer: timer[2])
            self._last_timers = {timer[:2]: FileTimerRequest(*timer) for timer in earliest_first}
        return self._last_timers

    @property
    def _counts(self) -> _rust.WatchdogCounts:
        self._last_counts = self._ask(self._native.counts, self._last_counts)
        return self._last_counts

    def _ask(self, question: Callable[[], T], otherwise: U) -> T | U:
        """Ask the native server, for as long as there is one."""
        try:
            return otherwise if self._is_closed else question()
        except RuntimeError:  # closed meanwhile
            return otherwise

    @property
    def _request_count(self) -> int:
        """How many requests were understood."""
        return self._counts.requests

    @property
    def _is_client_started(self) -> bool:
        return self._request_count > 0

    @property
    def _last_progress_time(self) -> int:
        return self.get_last_progress_time()

    def start(self) -> None:
        """Start to serve. Doing so again makes the pipe anew if somebody has removed it, and nothing else."""
        self._native.start()
        if self._watchdog_thread is not None:
            return
        logger.info("Starting %s... daemon=%s, file_path=%s", type(self).__name__, self._daemon, self._file_path)
        self._watchdog_thread = threading.Thread(target=self._watchdog_loop, name="ferro-timer", daemon=self._daemon)
        _threads.start(self._watchdog_thread)
        # The thread must be gone before the interpreter is; the engine's own hook runs after this one, which is registered later.
        atexit.register(self._close)
        self._log_event("watchdog started", None)

    def stop(self) -> None:
        """Stop to serve, and remove the pipe. In a forked process this does nothing."""
        if self._owner_pid != os.getpid():
            return
        logger.info("Stopping %s", type(self).__name__)
        self._close()
        self._log_event("watchdog stopped", None)

    def run_once(self) -> None:
        """Deal with all that has been sent so far, and stop to serve."""
        self._run_once = True
        if self._watchdog_thread is not None:
            self._native.drain()
        self._close()

    def _close(self) -> None:
        """Close the pipe, and let the thread report what is left to report."""
        if self._owner_pid != os.getpid():
            return
        self._stop_signaled = True
        if not self._is_closed:
            self._timers, self._counts  # noqa: B018 - the last look at both
            self._is_closed = True
            self._native.close()
        atexit.unregister(self._close)
        thread = self._watchdog_thread
        # An event handler may stop the server.
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_TIMEOUT_S)
            self._watchdog_thread = None
        self._report_broken()

    @staticmethod
    def is_process_running(pid: int) -> bool:
        """Tell whether there is a process that this one may signal.

        Args:
            pid: its id.
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
        """Tell everybody of timers that have expired and were dealt with."""
        by_pid: dict[int, list[_rust.Expiry]] = {}
        for expiry in sorted(expiries, key=lambda expiry: expiry.expiration_time):
            by_pid.setdefault(expiry.pid, []).append(expiry)
        requests = {pid: [_request_of(expiry) for expiry in expired] for pid, expired in by_pid.items()}
        # By its name in this module, which is where programs replace it.
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
        self._report_broken()
        if self._reap_server and last_signal > 0:
            logger.info("Terminating the server process=[%s] because of expired timers", os.getpid())
            self._reap_worker(os.getpid(), last_signal)

    def _report_outcome(self, expiry: _rust.Expiry, request: FileTimerRequest) -> bool:
        """Tell whether the process is one that the server has ended, or that has ended by itself meanwhile."""
        if expiry.outcome == "signalled":
            logger.info("Successfully reaped worker=[%s] with signal=%s", expiry.pid, expiry.signal)
        elif expiry.outcome == "gone":
            logger.info("Process with pid=%s does not exist. Skipping", expiry.pid)
        else:
            stranger = (
                "it is no worker of this agent nor started by one (a worker in another pid namespace has other numbers)"
            )
            reason = stranger if expiry.outcome == "not ours" else "permission denied"
            logger.error(
                "timer %r of process %s has expired, but it is left alone: %s", expiry.scope, expiry.pid, reason
            )
            return False
        self._log_event("kill worker process", request)
        return True

    def _report_broken(self) -> None:
        """Warn of requests that were dropped since the last warning: broken ones, as in /metrics, and refused ones."""
        counts = self._counts
        broken = counts.broken + counts.oversized + counts.unknown_version
        dropped = broken + counts.refused
        if dropped > self._reported:
            logger.warning(
                "%d requests of timers at %s were dropped. In total %d were broken (%d malformed, %d too long, %d of an unknown"
                " version) and %d were refused; the newest: %s",
                *(dropped - self._reported, self._file_path, broken, counts.broken, counts.oversized),
                *(counts.unknown_version, counts.refused, counts.last_broken),
            )
            self._reported = dropped

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
        """Start and release timers as if they had been asked for through the pipe.

        Args:
            timer_requests: in their order.
        """
        self._native.register(
            [
                (request.worker_pid, request.scope_id, float(request.expiration_time), int(request.signal))
                for request in timer_requests
            ]
        )

    def clear_timers(self, worker_pids: set[int]) -> None:
        """Forget all timers of some processes, and those of processes that have ended.

        Args:
            worker_pids: the processes.
        """
        ended = {pid for pid, _ in self._timers if not self.is_process_running(pid)}
        self._native.clear(list(ended | set(worker_pids)))

    def get_expired_timers(self, deadline: float) -> dict[int, list[FileTimerRequest]]:
        """Return the armed timers that will have expired, by process.

        Args:
            deadline: by when, in seconds since the epoch.
        """
        expired: dict[int, list[FileTimerRequest]] = {}
        for request in self._timers.values():
            if request.expiration_time <= deadline:
                expired.setdefault(request.worker_pid, []).append(request)
        return expired

    def get_last_progress_time(self) -> int:
        """Return when all was well the last time, in seconds since the epoch.

        That is now, unless a process has missed a deadline and is still there: then it is that deadline.
        """
        return int(time.time() - self._ask(self._native.overdue_s, 0.0))

    def set_workers(self, workers: Iterable[tuple[int, str, str]]) -> None:
        """Say which processes are workers: when a timer of one of them expires, all are looked at before it is signalled.

        Args:
            workers: of each its process id, what to call it, and an existing folder that the files with the evidence go to, or "" for no
                evidence. Takes the place of the former list.
        """
        self._native.workers(list(workers))

    def expiry(self, pid: int) -> _rust.Expiry | None:
        """Return the last timer over which a process was signalled.

        Args:
            pid: the process; of a worker also the timers of its descendants count.
        """
        return self._ask(lambda: self._native.expiry(pid), None)


def _ignore(name: str, request: FileTimerRequest | None) -> None:
    pass


def _request_of(expiry: _rust.Expiry) -> FileTimerRequest:
    return FileTimerRequest(expiry.pid, expiry.scope, expiry.expiration_time, expiry.signal)
