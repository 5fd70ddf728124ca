"""Heartbeats: timers that a loop postpones in every step with a write to shared memory. Not in torch."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING

from ferroelastic.timer._pipe import BEATS_SUFFIX
from ferroelastic.timer._wire import NEVER_S
from ferroelastic.timer.file_based_local_timer import FileTimerClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from ferroelastic._rust import BeatSlot

__all__ = ["Heartbeat", "heartbeat"]

_TIMER_FILE_ENV = "TORCHELASTIC_TIMER_FILE"
_ENABLE_ENV = "TORCHELASTIC_ENABLE_FILE_TIMER"


class Heartbeat:
    """A heartbeat of this process, created by :func:`heartbeat`. A context manager that calls :meth:`close` on exit.

    Attributes:
        beat: function that records a heartbeat. It stores to shared memory without a system call or a lock. In a forked process it raises
            ``ForkedError``.
    """

    __slots__ = ("_client", "_pid", "_scope", "_slot", "beat")

    beat: Callable[[], None]

    def __init__(self, slot: BeatSlot, client: FileTimerClient, scope: str) -> None:
        self._slot: BeatSlot | None = slot
        self._client = client
        self._scope = scope
        self._pid = os.getpid()
        self.beat = slot.beat

    def close(self) -> None:
        """Release the timer: no heartbeat is expected any more. Idempotent. Does nothing in a forked process."""
        if self._slot is None or self._pid != os.getpid():
            return
        slot, self._slot = self._slot, None
        # Release the timer first, because another process may claim a closed slot immediately.
        try:
            self._client.release(self._scope)
        finally:
            slot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def heartbeat(scope: str, timeout_s: float, *, client: FileTimerClient | None = None) -> Heartbeat:
    """Start a heartbeat. The agent ends this process if it misses a heartbeat.

    Args:
        scope: name of the timer, see :func:`ferroelastic.timer.expires`.
        timeout_s: maximum time between two heartbeats in seconds.
        client: timer client, which also sets the signal; a client of ``TORCHELASTIC_TIMER_FILE`` by default.

    Returns:
        The heartbeat. The deadline of the first heartbeat is ``timeout_s`` seconds from now.

    Raises:
        ValueError: ``timeout_s`` is not positive or not finite.
        RuntimeError: this process has no watchdog, the watchdog does not support heartbeats, or it does not read its pipe.
        BrokenPipeError: the watchdog does not run.
        OSError: all heartbeat slots are in use.
    """
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s of heartbeat {scope!r} must be positive and finite (seconds), got {timeout_s}")
    if client is None:
        path = os.environ.get(_TIMER_FILE_ENV)
        if not path:
            raise RuntimeError(
                f"heartbeat {scope!r} has no watchdog: {_TIMER_FILE_ENV} is not set; "
                f"start the job with {_ENABLE_ENV}=1 in the environment of ferrorun"
            )
        client = FileTimerClient(path)
    slot = _claim(client, scope)
    try:
        _arm(slot, client, scope, min(float(timeout_s), NEVER_S))
    except BaseException:
        slot.close()
        raise
    return Heartbeat(slot, client, scope)


def _claim(client: FileTimerClient, scope: str) -> BeatSlot:
    from ferroelastic._rust import BeatSlot

    path = client.path
    try:
        return BeatSlot(path + BEATS_SUFFIX)
    except FileNotFoundError:
        if not os.path.exists(path):
            raise BrokenPipeError(f"heartbeat {scope!r} has no watchdog: no process serves {path}") from None
        raise RuntimeError(
            f"the watchdog at {path} does not support heartbeats (torch's watchdog): use timer.expires(), or ferrorun instead of torchrun"
        ) from None


def _arm(slot: BeatSlot, client: FileTimerClient, scope: str, timeout_s: float) -> None:
    slot.beat()
    if not client.start_heartbeat(scope, time.time() + timeout_s, slot.index, timeout_s):
        # A queued request is sent with the next one, which a hung process never sends.
        raise RuntimeError(f"failed to start heartbeat {scope!r}: the watchdog does not read its pipe")
