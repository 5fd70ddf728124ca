"""Special cases for torch's rendezvous handlers and stores, which are recognised without importing torch.

Needed by :mod:`ferroelastic.rendezvous._worker_store`. torch has no public interface for any of this.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferroelastic.rendezvous.api import RendezvousHandler, RendezvousInfo

__all__ = ["has_fixed_port", "join_with_new_store", "listing_store", "starts_stores"]

_STATIC = "torch.distributed.elastic.rendezvous.static_tcp_rendezvous"


def starts_stores(handler: RendezvousHandler) -> bool:
    """Tell whether a handler starts the workers' store, as torch's ``DynamicRendezvousHandler`` does."""
    return hasattr(handler, "_bootstrap_store_info") and hasattr(handler, "_shared_tcp_store_server")


def join_with_new_store(handler: Any) -> RendezvousInfo:
    """Join the next round with a handler for which :func:`starts_stores` holds, and make it start a new store."""
    # Kept alive until the round is complete: workers on other nodes use it until their agents have stopped them.
    former = handler._shared_tcp_store_server  # noqa: SLF001 - torch has no public way
    handler._bootstrap_store_info = None  # noqa: SLF001 - as above
    handler._shared_tcp_store_server = None  # noqa: SLF001 - as above
    info: RendezvousInfo = handler.next_rendezvous()
    del former
    return info


def has_fixed_port(handler: RendezvousHandler) -> bool:
    """Tell whether the workers' store has to stay at the port that the handler returns, as with torch's ``StaticTCPRendezvous``."""
    # Where the module is not loaded, no handler can be of its class.
    static: Any = sys.modules.get(_STATIC)
    return static is not None and isinstance(handler, static.StaticTCPRendezvous)


def listing_store(store: Any) -> Any:
    """Return the store below all ``PrefixStore`` objects; ``None`` if it cannot list its keys (torch before 2.10)."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store if hasattr(store, "list_keys") else None
