"""The only place where Python waits for the engine."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from ferroelastic import _engine, _signals

if TYPE_CHECKING:
    from ferroelastic import _rust

__all__ = ["wait_for_event"]

_CHUNK = 4096
_NO_FD = -1
_EVENTS = ("event", "news")


class _WakeupPipe:
    """A pipe for ``signal.set_wakeup_fd``: the C signal handler writes to it, the native wait polls the read end."""

    def __init__(self) -> None:
        self.owner_pid = os.getpid()
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.forward_fd = _NO_FD
        # No warning: a full pipe has already woken its reader.
        self.install = partial(signal.set_wakeup_fd, warn_on_full_buffer=False)

    def forward(self) -> None:
        """Drain the pipe and forward the bytes to the previous wakeup descriptor, for example of an asyncio loop."""
        more = True
        while more:
            try:
                signals = os.read(self.read_fd, _CHUNK)
            except BlockingIOError:
                return
            more = len(signals) == _CHUNK
            if self.forward_fd != _NO_FD:
                with suppress(OSError):  # full, so its reader is awake, or closed
                    os.write(self.forward_fd, signals)


_pipe: _WakeupPipe | None = None
_hook_set = False


def wait_for_event(
    group: _rust.Group | _rust.RendezvousClient | _rust.WarmPool,
    generation: int,
    timeout_s: float | None = None,
    news_fd: int | None = None,
) -> bool:
    """Wait until ``group`` has an event after ``generation``. Python's signal handlers run at once.

    Python runs signal handlers between two bytecodes of the main thread, so a native wait would delay them until the event. On the main
    thread every signal therefore interrupts the native wait, which then continues.

    Args:
        group: source of the events: workers, or a membership in a rendezvous.
        generation: the last handled value of ``group.generation``.
        timeout_s: timeout in seconds. ``None`` or ``inf`` waits without limit, 0 or less only polls.
        news_fd: descriptor whose readability is an event as well.

    Returns:
        Whether there was an event; ``False`` on timeout.

    Raises:
        RuntimeError: the engine was closed or has failed.
        SignalException: a terminating signal is pending.
        BaseException: any exception of a signal handler.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    if threading.get_ident() != threading.main_thread().ident or deadline <= time.monotonic():
        return group.wait(generation, _remaining(deadline), None, news_fd) in _EVENTS
    pipe = _get_pipe()
    former: list[int] = []
    try:
        try:
            # A single C call sets the descriptor and stores the previous one. Between two bytecodes a signal handler could
            # raise, and the previous descriptor would be lost.
            former.extend(map(pipe.install, (pipe.write_fd,)))
        except ValueError:
            if former:
                raise
            # `threading` is wrong about the interpreter's main thread (an embedded interpreter).
            return group.wait(generation, _remaining(deadline), None, news_fd) in _EVENTS
        if (
            former[0] != pipe.write_fd
        ):  # equal if a signal handler is waiting: then the forward descriptor is already set
            pipe.forward_fd = former[0]
        while True:
            _signals.report()
            _engine.report()
            _signals.raise_pending()
            # The wakeup descriptor is already set: a signal from here on makes the pipe readable.
            outcome = group.wait(generation, _remaining(deadline), pipe.read_fd, news_fd)
            if outcome != "wake":
                return outcome in _EVENTS
            pipe.forward()
    finally:
        # Inline, because the interpreter checks for signals at each entry of a Python function, where the handler of a
        # second signal would raise. Twice, because Python 3.10 also checks between two bytecodes.
        try:
            if former:
                signal.set_wakeup_fd(former[0])
        finally:
            if former:
                signal.set_wakeup_fd(former[0])
            pipe.forward()


def _remaining(deadline: float) -> float | None:
    return None if deadline == math.inf else max(0.0, deadline - time.monotonic())


def _get_pipe() -> _WakeupPipe:
    global _pipe, _hook_set  # noqa: PLW0603 - a process has one wakeup descriptor, so one pipe
    if _pipe is None or _pipe.owner_pid != os.getpid():
        if not _hook_set:
            os.register_at_fork(after_in_child=_forget)
            _hook_set = True
        _pipe = _WakeupPipe()
    return _pipe


def _forget() -> None:
    """In a forked child: a signal here must not wake the parent."""
    global _pipe  # noqa: PLW0603 - see _get_pipe
    if _pipe is not None:
        former = signal.set_wakeup_fd(_NO_FD)
        if former not in {_NO_FD, _pipe.write_fd}:
            signal.set_wakeup_fd(former)
        os.close(_pipe.read_fd)
        os.close(_pipe.write_fd)
        _pipe = None
