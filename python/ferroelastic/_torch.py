"""The only module that imports torch. Each function imports what it needs when it is called.

The rest of the package recognises torch's objects by duck typing and with :mod:`ferroelastic._compat`; special cases for torch's rendezvous
handlers are in :mod:`ferroelastic.rendezvous._torch_handlers`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ferroelastic._text import message_of
from ferroelastic.rendezvous.api import RendezvousConnectionError

if TYPE_CHECKING:
    from ferroelastic.rendezvous.api import RendezvousHandler, RendezvousParameters

__all__ = [
    "accelerator_count",
    "create_rendezvous_handler",
    "cuda_device_count",
    "custom_device_count",
    "start_worker_server",
    "xpu_device_count",
]


_ETCD_BACKENDS = ("etcd", "etcd-v2")
_ETCD_V2 = "It needs an etcd with the v2 API (--enable-v2, up to etcd 3.5)"


def _import(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"{purpose} takes torch, which is not installed: pip install torch", name="torch"
        ) from None


def _check_etcd(backend: str) -> None:
    """Check that the client of an etcd is installed, which torch says late and without its package.

    Raises:
        ModuleNotFoundError: it is not.
    """
    from importlib.util import find_spec

    try:
        is_there = find_spec("etcd") is not None
    except ValueError:  # it is loaded, and does not say where from
        is_there = True
    if not is_there:
        raise ModuleNotFoundError(
            f"rendezvous backend {backend!r} takes the package python-etcd, which is not installed: pip install python-etcd. {_ETCD_V2}",
            name="etcd",
        )


def create_rendezvous_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Make one of torch's rendezvous handlers, or one of a plug-in (entry point group ``torchrun.handlers``).

    Args:
        params: parameters of this package's or of torch's class.

    Raises:
        ValueError: torch knows no such backend, or a parameter is wrong.
        ModuleNotFoundError: torch is not installed, or python-etcd for a rendezvous over etcd.
        RendezvousConnectionError: the backend cannot be reached.
    """
    purpose = f"rendezvous backend {params.backend!r}"
    rendezvous = _import("torch.distributed.elastic.rendezvous", purpose)
    registry = _import("torch.distributed.elastic.rendezvous.registry", purpose)
    is_etcd = params.backend in _ETCD_BACKENDS
    if is_etcd:
        _check_etcd(params.backend)
    theirs = rendezvous.RendezvousParameters(
        backend=params.backend,
        endpoint=params.endpoint,
        run_id=params.run_id,
        min_nodes=params.min_nodes,
        max_nodes=params.max_nodes,
        local_addr=params.local_addr,
        **params.config,
    )
    try:
        handler: RendezvousHandler = registry.get_rendezvous_handler(theirs)
    except Exception as error:
        if is_etcd and _is_of_etcd(error):
            raise RendezvousConnectionError(
                f"rendezvous backend {params.backend!r} cannot use the etcd at {params.endpoint!r}: {_innermost(error)}. {_ETCD_V2}"
            ) from None
        raise
    return handler


def _is_of_etcd(error: Exception) -> bool:
    """Tell failures of an etcd, of python-etcd's classes or of torch's, from wrong parameters."""
    names = [cls.__name__ for cls in type(error).__mro__]
    return "EtcdException" in names or "RendezvousConnectionError" in names


def _innermost(error: BaseException) -> str:
    """Return the first of a chain of reasons, in one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join((getattr(error, "strerror", None) or message_of(error)).split())


def start_worker_server(socket_path: str) -> Any:
    """Serve torch's debug handlers on a unix socket, until ``shutdown()`` of what is returned.

    Args:
        socket_path: path of the socket.
    """
    return _import("torch._C._distributed_c10d", "the worker server")._WorkerServer(socket_path)  # noqa: SLF001 - no public name


def cuda_device_count() -> int:
    """Return how many CUDA (or ROCm) devices torch sees; 0 if it cannot use them."""
    torch = _import("torch", "counting GPUs")
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def xpu_device_count() -> int:
    """Return how many XPU devices torch sees; 0 if it cannot use them."""
    torch = _import("torch", "counting XPUs")
    return int(torch.xpu.device_count()) if torch.xpu.is_available() else 0


def custom_device_count(name: str) -> int | None:
    """Return how many devices a private backend of torch sees; 0 if it cannot use them.

    Args:
        name: name of the backend.

    Returns:
        ``None`` if torch's private backend has another name.
    """
    torch = _import("torch", f"counting devices of {name!r}")
    if name != torch._C._get_privateuse1_backend_name():  # noqa: SLF001 - no public name
        return None
    module = getattr(torch, name, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def accelerator_count() -> tuple[str, int]:
    """Return type and number of the accelerator devices that torch sees; ``("cpu", 0)`` if there are none."""
    torch = _import("torch", "counting accelerators")
    if hasattr(torch, "accelerator"):
        if torch.accelerator.is_available():
            return str(torch.accelerator.current_accelerator().type), int(torch.accelerator.device_count())
        return "cpu", 0
    count = cuda_device_count()  # torch < 2.7
    return ("cuda", count) if count else ("cpu", 0)
