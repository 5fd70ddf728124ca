"""The one native engine of this process."""

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
    """The engine of this process; started on the first call and closed when the interpreter ends.

    A process forked from this one gets an engine of its own on its first call and never touches its parent's.
    With ``FERROELASTIC_PIDFD=0`` in the environment the engine does without pidfds, as on an old kernel.

    Returns:
        The engine, shared by everybody in the process.

    Raises:
        OSError: the engine's thread or one of its descriptors cannot be made.
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
    """Log what the engine has to say."""
    engine = _engine
    if engine is None or _owner_pid != os.getpid():
        return
    for remark in engine.take_remarks():
        from ferroelastic.utils.logging import get_logger

        get_logger(__name__).warning("%s", remark)


def _set_hooks() -> None:
    global _hooks_set  # noqa: PLW0603 - hooks belong to the interpreter and cannot be taken back
    if not _hooks_set:
        atexit.register(_close)
        os.register_at_fork(after_in_child=_forget)
        _hooks_set = True


def _forget() -> None:
    """Drop what the parent left in a forked child: its lock may be held by a thread that does not exist here."""
    global _engine, _lock  # noqa: PLW0603 - see get_engine
    _lock = threading.Lock()
    _engine = None


def _close() -> None:
    global _engine
    with _lock:
        engine, _engine = _engine, None
        if engine is not None and _owner_pid == os.getpid():
            engine.close(_CLOSE_TIMEOUT_S)
