"""Creation and special cases of torch's rendezvous handlers.

Handlers and stores are recognised without an import of torch. torch has no public interface for these cases.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ferroelastic import _torch
from ferroelastic._text import message_of
from ferroelastic.rendezvous.api import RendezvousConnectionError

if TYPE_CHECKING:
    from ferroelastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousParameters

__all__ = ["create_handler", "has_fixed_port", "join_with_new_store", "listing_store", "starts_stores"]

_ETCD_BACKENDS = ("etcd", "etcd-v2")
_ETCD_V2 = "It needs an etcd with the v2 API (--enable-v2, up to etcd 3.5)"
_STATIC = "torch.distributed.elastic.rendezvous.static_tcp_rendezvous"


def _check_etcd(backend: str) -> None:
    """Check that the etcd client is installed. torch checks this late and does not name the package.

    Raises:
        ModuleNotFoundError: the client is not installed.
    """
    from importlib.util import find_spec

    try:
        is_installed = find_spec("etcd") is not None
    except ValueError:  # the module is loaded and has no spec
        is_installed = True
    if not is_installed:
        raise ModuleNotFoundError(
            f"rendezvous backend {backend!r} needs the package python-etcd, which is not installed: pip install python-etcd. {_ETCD_V2}",
            name="etcd",
        )


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Create a rendezvous handler of torch or of a plug-in (entry point group ``torchrun.handlers``).

    Args:
        params: parameters of this package's or of torch's class.

    Returns:
        The handler.

    Raises:
        ValueError: torch does not have the backend, or a parameter is not valid.
        ModuleNotFoundError: torch is not installed, or python-etcd is not installed for a rendezvous over etcd.
        RendezvousConnectionError: the backend cannot be reached.
    """
    purpose = f"rendezvous backend {params.backend!r}"
    rendezvous = _torch.load("torch.distributed.elastic.rendezvous", purpose)
    registry = _torch.load("torch.distributed.elastic.rendezvous.registry", purpose)
    is_etcd = params.backend in _ETCD_BACKENDS
    if is_etcd:
        _check_etcd(params.backend)
    torch_params = rendezvous.RendezvousParameters(
        backend=params.backend,
        endpoint=params.endpoint,
        run_id=params.run_id,
        min_nodes=params.min_nodes,
        max_nodes=params.max_nodes,
        local_addr=params.local_addr,
        **params.config,
    )
    try:
        handler: RendezvousHandler = registry.get_rendezvous_handler(torch_params)
    except Exception as error:
        if is_etcd and _is_of_etcd(error):
            raise RendezvousConnectionError(
                f"rendezvous backend {params.backend!r} failed to use the etcd at {params.endpoint!r}: {_innermost(error)}. {_ETCD_V2}"
            ) from None
        raise
    return handler


def _is_of_etcd(error: Exception) -> bool:
    """Return whether an error comes from etcd (python-etcd's or torch's class) and not from a parameter."""
    names = [cls.__name__ for cls in type(error).__mro__]
    return "EtcdException" in names or "RendezvousConnectionError" in names


def _innermost(error: BaseException) -> str:
    """Return the text of the root cause of an exception chain, in one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join((getattr(error, "strerror", None) or message_of(error)).split())


def starts_stores(handler: RendezvousHandler) -> bool:
    """Return whether a handler starts the workers' store, as torch's ``DynamicRendezvousHandler`` does."""
    return hasattr(handler, "_bootstrap_store_info") and hasattr(handler, "_shared_tcp_store_server")


def join_with_new_store(handler: Any) -> RendezvousInfo:
    """Join the next round with a handler for which :func:`starts_stores` holds, and make it start a new store."""
    # Keep the previous store alive until the round is complete: workers on other nodes use it until their agents have stopped them.
    previous = handler._shared_tcp_store_server  # noqa: SLF001 - torch has no public interface
    handler._bootstrap_store_info = None  # noqa: SLF001 - as above
    handler._shared_tcp_store_server = None  # noqa: SLF001 - as above
    info: RendezvousInfo = handler.next_rendezvous()
    del previous
    return info


def has_fixed_port(handler: RendezvousHandler) -> bool:
    """Return whether the workers' store must stay at the port from the handler, as with torch's ``StaticTCPRendezvous``."""
    # If the module is not loaded, no handler is an instance of its class.
    static: Any = sys.modules.get(_STATIC)
    return static is not None and isinstance(handler, static.StaticTCPRendezvous)


def listing_store(store: Any) -> Any:
    """Return the store below all ``PrefixStore`` wrappers; ``None`` if it cannot list its keys (torch before 2.10)."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store if hasattr(store, "list_keys") else None
