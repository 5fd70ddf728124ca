"""The one place where Python waits for the engine."""

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
_NOBODY = -1
_EVENTS = ("event", "news")


class _WakeupPipe:
    """A pipe for ``signal.set_wakeup_fd``: the C signal handler writes, the native wait watches the other end."""

    def __init__(self) -> None:
        self.owner_pid = os.getpid()
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.forward_fd = _NOBODY
        # A full pipe has woken its reader already: there is nothing to warn about.
        self.install = partial(signal.set_wakeup_fd, warn_on_full_buffer=False)

    def forward(self) -> None:
        """Drain the pipe, and hand on what the owner of the former descriptor (an asyncio loop, say) would have got."""
        more = True
        while more:
            try:
                signals = os.read(self.read_fd, _CHUNK)
            except BlockingIOError:
                return
            more = len(signals) == _CHUNK
            if self.forward_fd != _NOBODY:
                with suppress(OSError):  # full: its reader wakes up as it is; closed: nobody listens
                    os.write(self.forward_fd, signals)


_pipe: _WakeupPipe | None = None
_hook_set = False


def wait_for_event(
    group: _rust.Group | _rust.RendezvousClient,
    generation: int,
    timeout_s: float | None = None,
    news_fd: int | None = None,
) -> bool:
    """Wait until something has happened to ``group`` since ``generation``, with Python's signal handlers running at once.

    In a native wait alone a signal handler, which Python runs between two bytecodes of the main thread, would wait for
    the event. On the main thread the wait is therefore left, and taken up again, whenever a signal arrives.

    Args:
        group: what to wait for: workers, or a membership in a rendezvous.
        generation: the last ``group.generation`` that was acted on.
        timeout_s: give up after so many seconds; ``None`` or ``inf`` never, 0 or less only looks.
        news_fd: that this descriptor is readable is an event as well.

    Returns:
        Whether there was an event; ``False`` on timeout.

    Raises:
        RuntimeError: the engine was closed or has failed.
        SignalException: the agent was told to end, and nobody has dealt with that yet.
        BaseException: whatever a signal handler raises.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    if threading.get_ident() != threading.main_thread().ident or deadline <= time.monotonic():
        return group.wait(generation, _remaining(deadline), None, news_fd) in _EVENTS
    pipe = _get_pipe()
    former: list[int] = []
    try:
        try:
            # One call into C sets the descriptor and keeps the former one: between two steps a signal handler could
            # raise, and the former one would be lost.
            former.extend(map(pipe.install, (pipe.write_fd,)))
        except ValueError:
            if former:
                raise
            # The interpreter's main thread is not the one that `threading` takes for it (an embedded interpreter).
            return group.wait(generation, _remaining(deadline), None, news_fd) in _EVENTS
        if former[0] != pipe.write_fd:  # else a signal handler is itself waiting: what it gets is for the same owner
            pipe.forward_fd = former[0]
        while True:
            _signals.report()
            _engine.report()
            _signals.raise_pending()
            # The descriptor is set before the group is looked at: a signal from here on makes the pipe readable.
            outcome = group.wait(generation, _remaining(deadline), pipe.read_fd, news_fd)
            if outcome != "wake":
                return outcome in _EVENTS
            pipe.forward()
    finally:
        # In line, because the interpreter looks for signals at each entry of a Python function, and a second signal's
        # handler would raise there. Twice, because Python 3.10 also looks between any two bytecodes.
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
        former = signal.set_wakeup_fd(_NOBODY)
        if former not in {_NOBODY, _pipe.write_fd}:
            signal.set_wakeup_fd(former)
        os.close(_pipe.read_fd)
        os.close(_pipe.write_fd)
        _pipe = None
