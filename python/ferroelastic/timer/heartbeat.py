"""A heartbeat: a timer that a loop puts off at every step, without asking anybody. Not in torch."""

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
    """What :func:`heartbeat` returns; as a context manager it closes itself.

    Attributes:
        beat: says that the process is alive. A store to shared memory, without a system call or a lock: cheap at every step. In a forked
            process it raises ``ForkedError``.
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
        """End the watch: from now on no beat is expected. Doing so again, or in a forked process, does nothing."""
        if self._slot is None or self._pid != os.getpid():
            return
        slot, self._slot = self._slot, None
        # In this order: a slot may be given to another process at once.
        try:
            self._client.release(self._scope)
        finally:
            slot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def heartbeat(scope: str, timeout_s: float, *, client: FileTimerClient | None = None) -> Heartbeat:
    """Have the agent end this process when it has not beaten for a time.

    Args:
        scope: what to call the work, see :func:`ferroelastic.timer.expires`.
        timeout_s: seconds from one beat to the next at most.
        client: whom to tell, and with which signal; by default a client of ``TORCHELASTIC_TIMER_FILE``.

    Returns:
        The heartbeat. The first beat is due ``timeout_s`` seconds from now.

    Raises:
        ValueError: ``timeout_s`` is not positive or not finite.
        RuntimeError: no watchdog serves this process, it is one that knows no heartbeats, or it does not read its pipe.
        BrokenPipeError: the watchdog is not there.
        OSError: all its heartbeats are in use.
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
            raise BrokenPipeError(f"heartbeat {scope!r} has no watchdog: nobody serves {path}") from None
        raise RuntimeError(
            f"the watchdog at {path} knows no heartbeats, it is torch's: use timer.expires(), or ferrorun in place of torchrun"
        ) from None


def _arm(slot: BeatSlot, client: FileTimerClient, scope: str, timeout_s: float) -> None:
    slot.beat()
    if not client.start_heartbeat(scope, time.time() + timeout_s, slot.index, timeout_s):
        # An unsent request waits for the next one, which a process that hangs never sends.
        raise RuntimeError(f"heartbeat {scope!r} could not be started: the watchdog does not read its pipe")
