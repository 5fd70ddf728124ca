"""Mirror of ``torch.distributed.elastic.rendezvous.registry``.

Intended differences:

* ``c10d`` and ``static`` are native backends, see :mod:`ferroelastic.rendezvous._native`.
* An unknown backend is looked up in torch's registry. This loads the plug-ins of the entry point group ``torchrun.handlers``, which torch
  loads at import.
"""

from __future__ import annotations

from ferroelastic.rendezvous.api import RendezvousHandler, RendezvousParameters
from ferroelastic.rendezvous.api import rendezvous_handler_registry as handler_registry

__all__ = ["RendezvousHandler", "RendezvousParameters", "get_rendezvous_handler"]


def _create_torch_handler(params: RendezvousParameters) -> RendezvousHandler:
    # Imported here because the module imports torch.
    from ferroelastic.rendezvous import _torch_handlers

    return _torch_handlers.create_handler(params)


def _create_native_handler(params: RendezvousParameters) -> RendezvousHandler:
    if params.backend == "c10d" and params.get("store_type", "tcp") != "tcp":
        return _create_torch_handler(params)  # only torch's rendezvous supports a file store
    from ferroelastic.rendezvous._native import NativeRendezvous

    return NativeRendezvous(params)


def _register_default_handlers() -> None:
    for backend in ("etcd", "etcd-v2"):
        handler_registry.register(backend, _create_torch_handler)
    for backend in ("c10d", "static"):
        handler_registry.register(backend, _create_native_handler)


_register_default_handlers()


def get_rendezvous_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Create the handler of a backend. Mirrors torch's ``get_rendezvous_handler``.

    Args:
        params: parameters of the rendezvous; ``params.backend`` names the backend.

    Returns:
        The handler.

    Raises:
        ValueError: neither this package nor torch has the backend, or a parameter is not valid.
        ModuleNotFoundError: the backend needs torch, which is not installed.
        RendezvousConnectionError: the backend cannot be reached.
    """
    if params.backend in handler_registry.backends:
        return handler_registry.create_handler(params)
    return _create_torch_handler(params)
