"""The name of this host, looked up once per process and in the background.

torch asks the resolver again for every event and every failure. A slow DNS server therefore delays the loop and the end of its agent.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress

from ferroelastic.utils import _threads

__all__ = ["begin_look_up", "fq_hostname", "hostname_for_report"]

_PATIENCE_S = 0.5


class _LookUp:
    """A look-up under way in a thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.short_name = socket.gethostname()
        self.found: str | None = None
        self.thread = threading.Thread(target=self._ask, name="ferro-resolver", daemon=True)
        _threads.start(self.thread)

    def _ask(self) -> None:
        # As bytes: for text Python would import the modules of internationalised names.
        with suppress(OSError, UnicodeError):
            hostname, aliases, _ = socket.gethostbyaddr(self.short_name.encode())  # type: ignore[arg-type]  # it takes both
            self.found = next((one for one in (hostname, *aliases) if "." in one), hostname)


_look_up: _LookUp | None = None


def begin_look_up() -> bool:
    """Start to look up the name of this host; return ``False`` if that was started before."""
    global _look_up  # noqa: PLW0603 - a process-wide cache
    # A forked child may be in another UTS namespace, so it starts its own look-up.
    if _look_up is not None and _look_up.pid == os.getpid():
        return False
    _look_up = _LookUp()
    return True


def fq_hostname() -> str:
    """Return the fully qualified name of this host; its short name if the resolver does not answer within half a second."""
    begin_look_up()
    assert _look_up is not None  # noqa: S101 - for the type checker
    if _look_up.found is None:
        _look_up.thread.join(_PATIENCE_S)
    return _look_up.found or _look_up.short_name


def hostname_for_report() -> str:
    """Return the name of this host for a report. Does not wait for a look-up that :func:`begin_look_up` has started before.

    Reports are made while a job fails, stops or ends, and must not delay it.
    """
    if begin_look_up():
        return fq_hostname()
    assert _look_up is not None  # noqa: S101 - for the type checker
    return _look_up.found or _look_up.short_name
