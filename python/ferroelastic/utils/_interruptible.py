"""Blocking native calls during which Python signal handlers can run.

A store's ``wait`` blocks in C++ for up to its timeout, which is minutes by default. CPython runs signal handlers on the main thread between
bytecodes, so a SIGTERM handler would run only after the wait. A helper thread therefore makes the call. The main thread waits for the
helper, and signals interrupt this wait.
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
    """The completion of the helper's call, with the interface of a native group for :func:`wait_for_event`."""

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
    """Call ``function`` and run signal handlers while it blocks.

    On other threads than the main thread this is a plain call, because no handler runs there. If a handler raises, this function raises
    immediately. The helper is a daemon thread. It runs until ``function`` returns, and the result is dropped.

    Returns:
        The result of ``function``.

    Raises:
        BaseException: ``function`` or a signal handler raised it.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*args, **kwargs)

    results: list[R] = []
    errors: list[BaseException] = []
    completion: Any = _Completion()

    def body() -> None:
        try:
            results.append(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller
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
        errors.clear()  # break the reference cycle between the traceback and this frame
