"""The name of this host, looked up once per process.

torch asks the resolver again for every event and every failure; where DNS is slow, that stalls its agent's loop.
"""

from __future__ import annotations

import os
import socket

__all__ = ["fq_hostname"]

_known: tuple[int, str] | None = None


def fq_hostname() -> str:
    """Return the fully qualified name of this host. The first call in a process may wait for DNS."""
    global _known  # noqa: PLW0603 - a process-wide cache
    # A forked child may have gone to another UTS namespace: it asks for itself.
    if _known is None or _known[0] != os.getpid():
        _known = (os.getpid(), socket.getfqdn(socket.gethostname()))
    return _known[1]
