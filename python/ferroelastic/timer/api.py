"""Mirror of ``torch.distributed.elastic.timer.api``.

Intended differences:

* The default scope of a timer is the line of its ``with`` statement. torch uses the same line of ``contextlib`` for all timers, so nested
  timers release one another.
* A server may wait for less than ``max_interval`` if the next timer expires earlier.
"""

from __future__ import annotations

import abc
import functools
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ferroelastic._compat import TorchCompatible, TorchVirtual
from ferroelastic.utils import _threads
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RequestQueue", "TimerClient", "TimerRequest", "TimerServer", "configure", "expires"]

P = ParamSpec("P")
R = TypeVar("R")

logger = get_logger(__name__)


class TimerRequest(TorchCompatible):
    """A request to start or release a timer. Mirrors ``torch.distributed.elastic.timer.TimerRequest``.

    Args:
        worker_id: id of the worker, usually its process id. Client and server must use the same kind of id.
        scope_id: name of the guarded work. A worker has one timer per scope.
        expiration_time: deadline in seconds since the epoch. A negative value releases the timer.
    """

    def __init__(self, worker_id: Any, scope_id: str, expiration_time: float) -> None:
        self.worker_id = worker_id
        self.scope_id = scope_id
        self.expiration_time = expiration_time

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TimerRequest):
            return False
        return (self.worker_id, self.scope_id, self.expiration_time) == (
            other.worker_id,
            other.scope_id,
            other.expiration_time,
        )

    __hash__ = None  # type: ignore[assignment]  # mutable and compared by value, as in torch


class TimerClient(TorchVirtual, abc.ABC):
    """Base class of timer clients, which run in workers. Mirrors ``torch.distributed.elastic.timer.TimerClient``."""

    @abc.abstractmethod
    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Start the timer of a scope. A running timer of the scope is replaced.

        Args:
            scope_id: name of the scope.
            expiration_time: deadline in seconds since the epoch.
        """

    @abc.abstractmethod
    def release(self, scope_id: str) -> None:
        """Release the timer of a scope. Does nothing if the scope has no timer.

        Args:
            scope_id: name of the scope.
        """


class RequestQueue(TorchVirtual, abc.ABC):
    """Queue of requests from clients to a server. Mirrors ``torch.distributed.elastic.timer.api.RequestQueue``."""

    @abc.abstractmethod
    def size(self) -> int:
        """Return a lower bound of the number of queued requests at the next :meth:`get`."""

    @abc.abstractmethod
    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Wait for requests and remove them from the queue.

        Args:
            size: maximum number of requests.
            timeout: timeout in seconds.

        Returns:
            The requests, possibly fewer than ``size``.
        """


class TimerServer(TorchVirtual, abc.ABC):
    """Base class of timer servers, which end workers with expired timers. Mirrors ``torch.distributed.elastic.timer.TimerServer``.

    Args:
        request_queue: queue of requests.
        max_interval: maximum time in seconds that the server waits for a request.
        daemon: whether the server's thread is a daemon thread.
    """

    def __init__(self, request_queue: RequestQueue, max_interval: float, daemon: bool = True) -> None:
        self._request_queue = request_queue
        self._max_interval = max_interval
        self._daemon = daemon
        self._watchdog_thread: threading.Thread | None = None
        self._stop_signaled = False

    @abc.abstractmethod
    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Start and release timers.

        Args:
            timer_requests: requests in the order of their arrival.
        """

    @abc.abstractmethod
    def clear_timers(self, worker_ids: set[Any]) -> None:
        """Release all timers of some workers.

        Args:
            worker_ids: ids of the workers.
        """

    @abc.abstractmethod
    def get_expired_timers(self, deadline: float) -> dict[str, list[TimerRequest]]:
        """Return the expired timers by worker id.

        Args:
            deadline: timers that expire at this time or earlier are returned, in seconds since the epoch.
        """

    @abc.abstractmethod
    def _reap_worker(self, worker_id: Any) -> bool:
        """End a worker; return whether it has ended or does not exist. An exception counts as ended."""

    def _reap_worker_no_throw(self, worker_id: Any) -> bool:
        try:
            return self._reap_worker(worker_id)
        except Exception:
            logger.exception("failed to end worker %s; its timers are released", worker_id)
            return True

    def _next_interval(self) -> float:
        """Return the maximum time in seconds to wait for a request."""
        return self._max_interval

    def _watchdog_loop(self) -> None:
        while not self._stop_signaled:
            try:
                self._run_watchdog()
            except Exception:  # noqa: PERF203 - the loop goes on
                logger.exception("Error running watchdog")

    def _run_watchdog(self) -> None:
        batch_size = max(1, self._request_queue.size())
        self.register_timers(self._request_queue.get(batch_size, self._next_interval()))
        reaped_worker_ids = set()
        for worker_id, expired_timers in self.get_expired_timers(time.time()).items():
            logger.info(
                "Reaping worker_id=[%s]. Expired timers: %s",
                worker_id,
                self._get_scopes(expired_timers),
            )
            if self._reap_worker_no_throw(worker_id):
                logger.info("Successfully reaped worker=[%s]", worker_id)
                reaped_worker_ids.add(worker_id)
            else:
                logger.error("Error reaping worker=[%s]. Will retry on next watchdog.", worker_id)
        self.clear_timers(reaped_worker_ids)

    def _get_scopes(self, timer_requests: list[TimerRequest]) -> list[str]:
        return [request.scope_id for request in timer_requests]

    def start(self) -> None:
        """Start the server's thread."""
        logger.info("Starting %s... max_interval=%s, daemon=%s", type(self).__name__, self._max_interval, self._daemon)
        self._watchdog_thread = threading.Thread(target=self._watchdog_loop, name="ferro-timer", daemon=self._daemon)
        _threads.start(self._watchdog_thread)

    def stop(self) -> None:
        """Stop the server's thread. Waits up to ``max_interval`` seconds for its end."""
        logger.info("Stopping %s", type(self).__name__)
        self._stop_signaled = True
        if self._watchdog_thread is None:
            logger.info("No watchdog thread running, doing nothing")
            return
        self._watchdog_thread.join(self._max_interval)
        self._watchdog_thread = None


_timer_client: TimerClient | None = None


def configure(timer_client: TimerClient | None) -> None:
    """Set the client that :func:`expires` uses. Mirrors ``torch.distributed.elastic.timer.configure``.

    Args:
        timer_client: the client; ``None`` removes the current client.
    """
    global _timer_client  # noqa: PLW0603 - process-wide setting
    _timer_client = timer_client
    logger.info("Timer client configured to: %s", type(timer_client).__name__)


def expires(after: float, scope: str | None = None, client: TimerClient | None = None) -> _Expiring:
    """Set a deadline for a ``with`` block or a decorated function. The server ends the process if it misses the deadline.

    Mirrors ``torch.distributed.elastic.timer.expires``::

        with expires(after=10):
            all_reduce(...)

    Args:
        after: timeout in seconds.
        scope: name of the timer; the caller's ``file#line`` by default. Entering a scope again, for instance by recursion, restarts its
            timer. The first exit from the scope releases the timer.
        client: timer client; the client of :func:`configure` by default.

    Returns:
        A context manager, which is also a decorator.

    Raises:
        RuntimeError: no client is configured. Raised on entry to the block.
    """
    if scope is None:
        caller = sys._getframe(1)  # noqa: SLF001 - the only way that does not read source files
        scope = f"{caller.f_code.co_filename}#{caller.f_lineno}"
    return _Expiring(after, scope, client)


class _Expiring:
    """Context manager and decorator of :func:`expires`."""

    __slots__ = ("_acquired_by", "_after", "_client", "_scope")

    def __init__(self, after: float, scope: str, client: TimerClient | None) -> None:
        self._after = after
        self._scope = scope
        self._client = client
        self._acquired_by: TimerClient | None = None

    def __enter__(self) -> None:
        client = _timer_client if self._client is None else self._client
        if client is None:
            raise RuntimeError("Configure timer client before using countdown timers.")
        client.acquire(self._scope, time.time() + self._after)
        self._acquired_by = client

    def __exit__(self, *_: object) -> None:
        if self._acquired_by is not None:
            self._acquired_by.release(self._scope)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            with _Expiring(self._after, self._scope, self._client):
                return function(*args, **kwargs)

        return wrapper
