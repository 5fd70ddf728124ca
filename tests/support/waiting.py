"""Waiting for facts that nothing reports."""

from __future__ import annotations

import platform
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferroelastic.utils.process_state import read_proc_state

if TYPE_CHECKING:
    from collections.abc import Callable

LONG_S = 60.0
"""Upper bound for a fact that must come. A passing test never waits this long."""
SETTLE_S = 5.0
_WAITS = {
    "x86_64": {7: "poll", 230: "clock_nanosleep", 271: "ppoll"},
    "aarch64": {73: "ppoll", 115: "clock_nanosleep"},
}[platform.machine()]
"""System calls in which the engine's callers, and those of torch, wait for an event."""
PARKED_S = 0.06
"""A process that sleeps this long has finished its work and waits."""


def eventually(condition: Callable[[], bool], timeout_s: float = SETTLE_S) -> bool:
    """Whether ``condition`` becomes true within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def is_alive(pid: int) -> bool:
    """Whether a process runs. An orphan may stay a zombie where the init process of a container reaps nothing."""
    return read_proc_state(pid) not in {None, "Z", "X"}


def is_parked(pid: int) -> bool:
    """Whether a process sleeps for ``PARKED_S`` without a break."""
    until = time.monotonic() + PARKED_S
    while time.monotonic() < until:
        if read_proc_state(pid) != "S":
            return False
        time.sleep(PARKED_S / 10)
    return True


class WaitingThread:
    """The main thread of this process, observed from another one: whether it is in a wait that began after the last look."""

    def __init__(self) -> None:
        self._task = Path(f"/proc/self/task/{threading.main_thread().native_id}")
        self._switches = -1

    def waits(self) -> bool:
        """Whether the thread sleeps in a system call for waiting, and has run since this was true last."""
        with suppress(ValueError, IndexError):  # "running"
            number = int((self._task / "syscall").read_text().split()[0])
            switches = re.search(
                r"^voluntary_ctxt_switches:\s+(\d+)", (self._task / "status").read_text(), re.MULTILINE
            )
            if number in _WAITS and switches is not None and int(switches[1]) > self._switches:
                self._switches = int(switches[1])
                return True
        return False


class WhenWaiting:
    """Calls functions from another thread, each as soon as the main thread waits for an event.

    A second call of the same test begins when the main thread has left the wait of the first one and waits again.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._thread: threading.Thread | None = None
        self._missed: list[str] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> None:
        """Schedule a call. All calls of a test are scheduled before the wait."""
        self._calls.append((function, args))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="when-waiting")
            self._thread.start()

    def close(self) -> None:
        """Wait until all calls are done, and fail if the main thread never waited for one."""
        if self._thread is not None:
            self._thread.join()
        assert not self._missed, f"the main thread did not wait for {self._missed}"

    def _run(self) -> None:
        main = WaitingThread()
        done = 0
        while done < len(self._calls):
            function, args = self._calls[done]
            if not eventually(main.waits, LONG_S):
                self._missed.append(repr((function, args)))
                return
            function(*args)
            done += 1
