"""The native engine of this process. There is at most one."""

from __future__ import annotations

import atexit
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ferroelastic import _rust

__all__ = ["get_engine", "report"]

_PIDFD_ENV = "FERROELASTIC_PIDFD"
_CLOSE_TIMEOUT_S = 5.0

_lock = threading.Lock()
_engine: _rust.Engine | None = None
_owner_pid = 0
_hooks_set = False


def get_engine() -> _rust.Engine:
    """Return the engine of this process. The first call starts it. It is closed when the interpreter ends.

    A forked child gets its own engine at its first call and never uses its parent's. With ``FERROELASTIC_PIDFD=0`` in the
    environment the engine does not use pidfds, as on an old kernel.

    Returns:
        The engine, shared by all callers in the process.

    Raises:
        OSError: the engine's thread or one of its descriptors cannot be created.
    """
    global _engine, _owner_pid  # noqa: PLW0603 - one engine per process is what this module is for
    with _lock:
        if _engine is None or _owner_pid != os.getpid():
            from ferroelastic import _rust

            _set_hooks()
            _engine = _rust.Engine(pidfd=os.environ.get(_PIDFD_ENV, "1") != "0")
            _owner_pid = os.getpid()
        return _engine


def report() -> None:
    """Log the engine's warnings."""
    engine = _engine
    if engine is None or _owner_pid != os.getpid():
        return
    for warning in engine.take_warnings():
        from ferroelastic.utils.logging import get_logger

        get_logger(__name__).warning("%s", warning)


def _set_hooks() -> None:
    global _hooks_set  # noqa: PLW0603 - hooks belong to the interpreter and cannot be removed
    if not _hooks_set:
        atexit.register(_close)
        os.register_at_fork(after_in_child=_forget)
        _hooks_set = True


def _forget() -> None:
    """Drop the parent's engine and lock in a forked child. The lock may be held by a thread that does not exist here."""
    global _engine, _lock  # noqa: PLW0603 - see get_engine
    _lock = threading.Lock()
    _engine = None


def _close() -> None:
    global _engine
    with _lock:
        engine, _engine = _engine, None
        if engine is not None and _owner_pid == os.getpid():
            engine.close(_CLOSE_TIMEOUT_S)
