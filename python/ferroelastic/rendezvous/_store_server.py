"""Starts a store server on the right addresses."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferroelastic import _rust

__all__ = ["LOOPBACK", "start_store"]

LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}
"""Loopback names and their addresses."""

_ALL_INTERFACES = ("::", "0.0.0.0")  # noqa: S104 - other nodes connect from any network
_NO_SUCH_ADDRESS = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def start_store(port: int = 0, *, loopback: str | None = None, **options: Any) -> _rust.StoreServer:
    """Start a store that listens on IPv4 and IPv6.

    Args:
        port: port; 0 takes a free port.
        loopback: address to listen on if no other machine needs to connect; ``None`` listens on all interfaces.
        options: options of :class:`_rust.StoreServer`.

    Raises:
        OSError: the port is in use.
    """
    from ferroelastic import _rust

    first, *others = (loopback,) if loopback else _ALL_INTERFACES
    try:
        return _rust.StoreServer(first, port, **options)
    except OSError as error:
        if not others or error.errno not in _NO_SUCH_ADDRESS:
            raise
        return _rust.StoreServer(others[0], port, **options)
