"""Mirror of ``torch.distributed.elastic.timer.local_timer``.

Intended difference: the server waits for the next deadline, if that comes before its ``max_interval`` is over. torch is late by up to
``max_interval``, a minute by default.
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
    """Asks through a queue of ``multiprocessing``; the worker's id is its pid. Mirrors torch's ``LocalTimerClient``.

    Args:
        mp_queue: queue that the server reads.
    """

    def __init__(self, mp_queue: Queue[TimerRequest]) -> None:
        self._mp_queue = mp_queue

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Start the timer of a scope; see :meth:`TimerClient.acquire`."""
        self._mp_queue.put(TimerRequest(os.getpid(), scope_id, expiration_time))

    def release(self, scope_id: str) -> None:
        """Forget the timer of a scope; see :meth:`TimerClient.release`."""
        self._mp_queue.put(TimerRequest(os.getpid(), scope_id, _RELEASE))


class MultiprocessingRequestQueue(RequestQueue):
    """A queue of ``multiprocessing`` with requests. Mirrors torch's ``MultiprocessingRequestQueue``.

    Args:
        mp_queue: the queue.
    """

    def __init__(self, mp_queue: Queue[TimerRequest]) -> None:
        self._mp_queue = mp_queue

    def size(self) -> int:
        """Return how many requests wait."""
        return self._mp_queue.qsize()

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Take requests out; see :meth:`RequestQueue.get`."""
        requests: list[TimerRequest] = []
        deadline = time.monotonic() + timeout
        remaining = timeout
        # What is there is taken also when the time is over: a release must not be overlooked.
        while len(requests) < size:
            try:
                requests.append(self._mp_queue.get(timeout=max(0.0, remaining)))
            except Empty:
                break
            remaining = deadline - time.monotonic()
        return requests


class LocalTimerServer(TimerServer):
    """Ends processes of this host, by SIGKILL. Mirrors torch's ``LocalTimerServer``.

    Args:
        mp_queue: queue that the clients write to.
        max_interval: seconds that the server waits for a request at most.
        daemon: whether the server's thread lets the process end.
    """

    def __init__(self, mp_queue: Queue[TimerRequest], max_interval: float = 60, daemon: bool = True) -> None:
        super().__init__(MultiprocessingRequestQueue(mp_queue), max_interval, daemon)
        self._timers: dict[tuple[Any, str], TimerRequest] = {}
        self._looked_at = 0.0  # up to when timers have been looked at, in seconds since the epoch

    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Start and release timers; see :meth:`TimerServer.register_timers`."""
        for request in timer_requests:
            key = (request.worker_id, request.scope_id)
            if request.expiration_time < 0:
                self._timers.pop(key, None)
            else:
                self._timers[key] = request

    def clear_timers(self, worker_ids: set[int]) -> None:
        """Forget all timers of some processes; see :meth:`TimerServer.clear_timers`."""
        self._timers = {key: request for key, request in self._timers.items() if key[0] not in worker_ids}

    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        """Return the timers that have expired, by process id; see :meth:`TimerServer.get_expired_timers`."""
        self._looked_at = deadline
        expired: dict[Any, list[TimerRequest]] = {}
        for request in self._timers.values():
            if request.expiration_time <= deadline:
                expired.setdefault(request.worker_id, []).append(request)
        return expired

    def _next_interval(self) -> float:
        # A timer that has been looked at and is still there belongs to a process that could not be ended: no use to hurry.
        ahead = [at for at in (timer.expiration_time for timer in self._timers.values()) if at > self._looked_at]
        return max(0.0, min([self._max_interval, *(at - time.time() for at in ahead)]))

    def _reap_worker(self, worker_id: int) -> bool:
        try:
            os.kill(worker_id, signal.SIGKILL)
        except ProcessLookupError:
            logger.info("Process with pid=%s does not exist. Skipping", worker_id)
        except Exception:
            logger.exception("Error terminating pid=%s", worker_id)
            return False
        return True
