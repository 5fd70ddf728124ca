"""Mirror of ``torch.distributed.elastic.utils.distributed``.

Intended difference: ``create_c10d_store`` is not here; a store that belongs to torch is torch's to make.
"""

from __future__ import annotations

from contextlib import closing

from ferroelastic.utils.api import get_socket_with_port
from ferroelastic.utils.logging import get_logger
from ferroelastic.utils.store import barrier

__all__ = ["barrier", "get_free_port", "get_logger", "get_socket_with_port"]


def get_free_port() -> int:
    """Return a port of localhost that was free a moment ago.

    Nothing reserves it: another process may take it first. Prefer port 0 where the one who binds can tell its port.

    Raises:
        RuntimeError: no address of localhost could be bound.
    """
    with closing(get_socket_with_port()) as listener:
        port: int = listener.getsockname()[1]
        return port
