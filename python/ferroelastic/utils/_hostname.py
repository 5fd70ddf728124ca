"""The name of this host, resolved once per process in the background.

torch calls the resolver for every event and every failure, so a slow DNS server delays the loop and the end of its agent.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress

from ferroelastic.utils import _threads

__all__ = ["begin_look_up", "fq_hostname", "hostname_for_report"]

_RESOLVER_TIMEOUT_S = 0.5


class _LookUp:
    """A lookup in a thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.short_name = socket.gethostname()
        self.found: str | None = None
        self.thread = threading.Thread(target=self._resolve, name="ferro-resolver", daemon=True)
        _threads.start(self.thread)

    def _resolve(self) -> None:
        # As bytes, because Python imports the codec for internationalised names for text.
        with suppress(OSError, UnicodeError):
            hostname, aliases, _ = socket.gethostbyaddr(self.short_name.encode())  # type: ignore[arg-type]  # accepts bytes too
            self.found = next((name for name in (hostname, *aliases) if "." in name), hostname)


_look_up: _LookUp | None = None


def begin_look_up() -> bool:
    """Start the lookup of this host's name; return ``False`` if it was started before."""
    global _look_up  # noqa: PLW0603 - a process-wide cache
    # A forked child may be in another UTS namespace, so it starts its own lookup.
    if _look_up is not None and _look_up.pid == os.getpid():
        return False
    _look_up = _LookUp()
    return True


def fq_hostname() -> str:
    """Return the fully qualified name of this host, or its short name if the resolver does not answer within 0.5 s."""
    begin_look_up()
    assert _look_up is not None  # noqa: S101 - for the type checker
    if _look_up.found is None:
        _look_up.thread.join(_RESOLVER_TIMEOUT_S)
    return _look_up.found or _look_up.short_name


def hostname_for_report() -> str:
    """Return the name of this host for a report. Does not wait for a lookup that :func:`begin_look_up` started earlier.

    Reports are made while a job fails or stops, and must not delay it.
    """
    if begin_look_up():
        return fq_hostname()
    assert _look_up is not None  # noqa: S101 - for the type checker
    return _look_up.found or _look_up.short_name
