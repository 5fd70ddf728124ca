"""Blocking native calls that still let Python signal handlers run.

A store's ``wait`` blocks in C++ for up to its timeout, which is minutes by default. CPython runs signal handlers on the main thread between
bytecodes, so a handler of SIGTERM would run only after the wait. Here a helper thread makes the call, and the main thread waits for it in a
way that signals interrupt.
"""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from ferroelastic._wait import wait_for_event
from ferroelastic.utils import _threads

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["call"]

P = ParamSpec("P")
R = TypeVar("R")


class _Completion:
    """The end of the helper's work, with the interface of a native group for :func:`wait_for_event`."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()

    def wait(
        self,
        generation: int,  # noqa: ARG002 - interface of a native group
        timeout_s: float | None,
        wake_fd: int | None = None,
        news_fd: int | None = None,  # noqa: ARG002 - as above
    ) -> Literal["event", "timeout", "wake"]:
        poll = select.poll()
        for descriptor in (self.read_fd, wake_fd):
            if descriptor is not None:
                poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
        if self.read_fd in ready:
            return "event"
        return "wake" if ready else "timeout"


def call(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call ``function`` so that signal handlers run while it blocks.

    Off the main thread this is a plain call, because no handler runs there. An exception of a handler leaves this function at once. The
    helper thread (a daemon) runs until ``function`` returns, and its outcome is dropped.

    Returns:
        What ``function`` returned.

    Raises:
        BaseException: what ``function`` raised, or what a signal handler raised.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*args, **kwargs)

    results: list[R] = []
    errors: list[BaseException] = []
    completion: Any = _Completion()

    def body() -> None:
        try:
            results.append(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - handed over to the caller
            errors.append(error)
        finally:
            os.close(completion.write_fd)

    try:
        helper = threading.Thread(target=body, name="ferro-call", daemon=True)
        try:
            _threads.start(helper)
        except RuntimeError:  # the system cannot start another thread
            body()
        else:
            wait_for_event(completion, 0)
            helper.join()
    finally:
        os.close(completion.read_fd)
    try:
        if errors:
            raise errors[0]
        return results[0]
    finally:
        errors.clear()  # the traceback refers to this frame: break the cycle
