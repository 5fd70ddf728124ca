"""Mirror of ``torch.distributed.elastic.timer.local_timer``.

Intended difference: the server wakes up at the next deadline, even before the end of ``max_interval``. torch acts up to ``max_interval``
late, a minute by default.
"""

from __future__ import annotations

import os
import signal
import time
from queue import Empty
from typing import TYPE_CHECKING, Any

from ferroelastic.timer.api import RequestQueue, TimerClient, TimerRequest, TimerServer
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

__all__ = ["LocalTimerClient", "LocalTimerServer", "MultiprocessingRequestQueue"]

logger = get_logger(__name__)

_RELEASE = -1


class LocalTimerClient(TimerClient):
    """Sends requests through a queue of ``multiprocessing``. The worker id is the pid. Mirrors torch's ``LocalTimerClient``.

    Args:
        mp_queue: queue of the server.
    """

    def __init__(self, mp_queue: Queue[TimerRequest]) -> None:
        self._mp_queue = mp_queue

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Start the timer of a scope; see :meth:`TimerClient.acquire`."""
        self._mp_queue.put(TimerRequest(os.getpid(), scope_id, expiration_time))

    def release(self, scope_id: str) -> None:
        """Release the timer of a scope; see :meth:`TimerClient.release`."""
        self._mp_queue.put(TimerRequest(os.getpid(), scope_id, _RELEASE))


class MultiprocessingRequestQueue(RequestQueue):
    """Request queue over a queue of ``multiprocessing``. Mirrors torch's ``MultiprocessingRequestQueue``.

    Args:
        mp_queue: queue of the clients and the server.
    """

    def __init__(self, mp_queue: Queue[TimerRequest]) -> None:
        self._mp_queue = mp_queue

    def size(self) -> int:
        """Return the number of queued requests; see :meth:`RequestQueue.size`."""
        return self._mp_queue.qsize()

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Wait for requests and remove them from the queue; see :meth:`RequestQueue.get`."""
        requests: list[TimerRequest] = []
        deadline = time.monotonic() + timeout
        remaining = timeout
        # Read queued requests even after the timeout, because a release may be among them.
        while len(requests) < size:
            try:
                requests.append(self._mp_queue.get(timeout=max(0.0, remaining)))
            except Empty:
                break
            remaining = deadline - time.monotonic()
        return requests


class LocalTimerServer(TimerServer):
    """Kills processes of this host with SIGKILL when their timers expire. Mirrors torch's ``LocalTimerServer``.

    Args:
        mp_queue: queue of the clients.
        max_interval: maximum time in seconds that the server waits for a request.
        daemon: whether the server's thread is a daemon thread.
    """

    def __init__(self, mp_queue: Queue[TimerRequest], max_interval: float = 60, daemon: bool = True) -> None:
        super().__init__(MultiprocessingRequestQueue(mp_queue), max_interval, daemon)
        self._timers: dict[tuple[Any, str], TimerRequest] = {}
        self._checked_until = 0.0  # deadline of the last check for expired timers, in seconds since the epoch

    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Start and release timers; see :meth:`TimerServer.register_timers`."""
        for request in timer_requests:
            key = (request.worker_id, request.scope_id)
            if request.expiration_time < 0:
                self._timers.pop(key, None)
            else:
                self._timers[key] = request

    def clear_timers(self, worker_ids: set[int]) -> None:
        """Release all timers of some processes; see :meth:`TimerServer.clear_timers`."""
        self._timers = {key: request for key, request in self._timers.items() if key[0] not in worker_ids}

    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        """Return the expired timers by process id; see :meth:`TimerServer.get_expired_timers`."""
        self._checked_until = deadline
        expired: dict[Any, list[TimerRequest]] = {}
        for request in self._timers.values():
            if request.expiration_time <= deadline:
                expired.setdefault(request.worker_id, []).append(request)
        return expired

    def _next_interval(self) -> float:
        # Skip checked timers: their processes could not be killed, and a retry at the normal interval is sufficient.
        deadlines = [
            timer.expiration_time for timer in self._timers.values() if timer.expiration_time > self._checked_until
        ]
        return max(0.0, min([self._max_interval, *(deadline - time.time() for deadline in deadlines)]))

    def _reap_worker(self, worker_id: int) -> bool:
        try:
            os.kill(worker_id, signal.SIGKILL)
        except ProcessLookupError:
            logger.info("Process with pid=%s does not exist. Skipping", worker_id)
        except Exception:
            logger.exception("Error terminating pid=%s", worker_id)
            return False
        return True
