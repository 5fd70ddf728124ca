"""Mirror of ``torch.distributed.elastic.timer.api``.

Intended differences:

* A timer without a scope is named after the line of its ``with`` statement. torch names all of them after one line of
  ``contextlib``, so that nested ones release one another.
* A server may wait for less than its ``max_interval``, where it knows when the next timer expires.
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
    """A timer to be started or released. Mirrors ``torch.distributed.elastic.timer.TimerRequest``.

    Args:
        worker_id: whose timer it is; client and server agree on what that is, a process id mostly.
        scope_id: what the worker calls the piece of work; it has one timer for each.
        expiration_time: seconds since the epoch. Negative: the timer is released.
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

    __hash__ = None  # type: ignore[assignment]  # compared by value and not frozen, as torch's


class TimerClient(TorchVirtual, abc.ABC):
    """The worker's side. Mirrors ``torch.distributed.elastic.timer.TimerClient``."""

    @abc.abstractmethod
    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Start the timer of a scope, in place of the one that it may have.

        Args:
            scope_id: the scope.
            expiration_time: when it expires, in seconds since the epoch.
        """

    @abc.abstractmethod
    def release(self, scope_id: str) -> None:
        """Forget the timer of a scope; nothing happens if there is none.

        Args:
            scope_id: the scope.
        """


class RequestQueue(TorchVirtual, abc.ABC):
    """Where a server finds the requests of its clients. Mirrors ``torch.distributed.elastic.timer.api.RequestQueue``."""

    @abc.abstractmethod
    def size(self) -> int:
        """Return how many requests wait. There may be more by the time of :meth:`get`, never fewer."""

    @abc.abstractmethod
    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Take requests out, waiting for them.

        Args:
            size: as many at most.
            timeout: seconds to wait at most.
        """


class TimerServer(TorchVirtual, abc.ABC):
    """The side that ends workers whose timers expire. Mirrors ``torch.distributed.elastic.timer.TimerServer``.

    Args:
        request_queue: where the requests come from.
        max_interval: seconds that the server waits for a request at most.
        daemon: whether the server's thread lets the process end.
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
            timer_requests: in their order.
        """

    @abc.abstractmethod
    def clear_timers(self, worker_ids: set[Any]) -> None:
        """Forget all timers of some workers.

        Args:
            worker_ids: the workers.
        """

    @abc.abstractmethod
    def get_expired_timers(self, deadline: float) -> dict[str, list[TimerRequest]]:
        """Return the timers that have expired, by worker.

        Args:
            deadline: by when, in seconds since the epoch.
        """

    @abc.abstractmethod
    def _reap_worker(self, worker_id: Any) -> bool:
        """End a worker; return whether that is done. If this raises, it counts as done."""

    def _reap_worker_no_throw(self, worker_id: Any) -> bool:
        try:
            return self._reap_worker(worker_id)
        except Exception:
            logger.exception("failed to end worker %s; its timers are forgotten", worker_id)
            return True

    def _next_interval(self) -> float:
        """Seconds to wait for a request at most."""
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
        """Start to serve, in a thread."""
        logger.info("Starting %s... max_interval=%s, daemon=%s", type(self).__name__, self._max_interval, self._daemon)
        self._watchdog_thread = threading.Thread(target=self._watchdog_loop, name="ferro-timer", daemon=self._daemon)
        _threads.start(self._watchdog_thread)

    def stop(self) -> None:
        """Stop to serve. Waits for the thread for ``max_interval`` seconds at most."""
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
        timer_client: the client; ``None`` takes the former one away.
    """
    global _timer_client  # noqa: PLW0603 - what this function is for
    _timer_client = timer_client
    logger.info("Timer client configured to: %s", type(timer_client).__name__)


def expires(after: float, scope: str | None = None, client: TimerClient | None = None) -> _Expiring:
    """Give a ``with`` block, or a decorated function, so many seconds; the server ends the process if it takes longer.

    Mirrors ``torch.distributed.elastic.timer.expires``::

        with expires(after=10):
            all_reduce(...)

    Args:
        after: seconds that the block has.
        scope: what to call it; by default the line of the caller, as ``file#line``. Whoever enters the same scope again, as a
            recursive function does, starts its timer anew, and the first to leave it releases it.
        client: whom to tell; by default the one that was given to :func:`configure`.

    Raises:
        RuntimeError: on entry, there is no client.
    """
    if scope is None:
        caller = sys._getframe(1)  # noqa: SLF001 - the only way that does not read source files
        scope = f"{caller.f_code.co_filename}#{caller.f_lineno}"
    return _Expiring(after, scope, client)


class _Expiring:
    """What :func:`expires` returns."""

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
