"""The name of this host, looked up once per process.

torch asks the resolver again for every event and every failure; where DNS is slow, that stalls its agent's loop.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress

__all__ = ["fq_hostname"]

_PATIENCE_S = 0.5
_known: tuple[int, str] | None = None


def fq_hostname() -> str:
    """Return the fully qualified name of this host. The first call in a process waits for DNS, half a second at most."""
    global _known  # noqa: PLW0603 - a process-wide cache
    # A forked child may have gone to another UTS namespace: it asks for itself.
    if _known is None or _known[0] != os.getpid():
        _known = (os.getpid(), _look_up(socket.gethostname()))
    return _known[1]


def _look_up(name: str) -> str:
    """Return the fully qualified name of a host, or the name itself if the resolver does not answer in time."""
    found: list[str] = []

    def ask() -> None:
        # As bytes: of text Python would make an internationalised name, with modules that are loaded for that alone.
        with suppress(OSError, UnicodeError):
            hostname, aliases, _ = socket.gethostbyaddr(name.encode())  # type: ignore[arg-type]  # it takes both
            found.append(next((one for one in (hostname, *aliases) if "." in one), hostname))

    thread = threading.Thread(target=ask, name="ferro-resolver", daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    return found[0] if found else name
