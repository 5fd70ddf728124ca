"""Mirror of ``torch.distributed.elastic.utils.distributed``.

Intended difference: ``create_c10d_store`` is missing. Use torch's function to create a store of torch.
"""

from __future__ import annotations

from contextlib import closing

from ferroelastic.utils.api import get_socket_with_port
from ferroelastic.utils.logging import get_logger
from ferroelastic.utils.store import barrier

__all__ = ["barrier", "get_free_port", "get_logger", "get_socket_with_port"]


def get_free_port() -> int:
    """Return a free port. Mirrors torch's ``get_free_port``. :func:`get_socket_with_port` has the addresses on which it is free.

    The port is not reserved: another process may use it first. If the listener can report its port, bind port 0 instead.

    Raises:
        RuntimeError: no address could be bound.
    """
    with closing(get_socket_with_port()) as listener:
        port: int = listener.getsockname()[1]
        return port
