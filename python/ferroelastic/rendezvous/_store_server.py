"""Where a store listens."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferroelastic import _rust

__all__ = ["LOOPBACK", "start_store"]

LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}
"""Names of this machine that no other machine can reach -> their address."""

_EVERYWHERE = ("::", "0.0.0.0")  # noqa: S104 - the other nodes come from anywhere
_NO_SUCH_ADDRESS = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def start_store(port: int = 0, *, loopback: str | None = None, **options: Any) -> _rust.StoreServer:
    """Start a store, for nodes that come over IPv4 and IPv6.

    Args:
        port: port; 0 takes a free one.
        loopback: address to listen on if no other machine has to come.
        options: of :class:`_rust.StoreServer`.

    Raises:
        OSError: the port is taken.
    """
    from ferroelastic import _rust

    first, *others = (loopback,) if loopback else _EVERYWHERE
    try:
        return _rust.StoreServer(first, port, **options)
    except OSError as error:
        if not others or error.errno not in _NO_SUCH_ADDRESS:
            raise
        return _rust.StoreServer(others[0], port, **options)
