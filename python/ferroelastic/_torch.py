"""The only module that imports torch, and the only one that knows its version. Each function does so when it is called.

The rest of the package recognises torch's objects by duck typing and with :mod:`ferroelastic._compat`. Special cases for torch's
rendezvous handlers are in :mod:`ferroelastic.rendezvous._torch_handlers`.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from typing import Any

__all__ = [
    "NEWEST_VERSION",
    "accelerator_count",
    "cuda_device_count",
    "custom_device_count",
    "installed_version",
    "is_older_than",
    "load",
    "start_worker_server",
    "xpu_device_count",
]


NEWEST_VERSION = (2, 15)
"""Newest version of torch that the conformance suite has run on."""


@functools.cache
def installed_version() -> tuple[int, int] | None:
    """Return major and minor version of the installed torch without importing it; ``None`` if torch is not installed."""
    text = getattr(sys.modules.get("torch"), "__version__", None)
    if text is None:
        from importlib import metadata

        try:
            text = metadata.version("torch")
        except metadata.PackageNotFoundError:
            return None
    found = re.match(r"(\d+)\.(\d+)", str(text))
    return (int(found[1]), int(found[2])) if found else None


def is_older_than(major: int, minor: int) -> bool:
    """Return whether the installed torch is older than a version. Without torch the package behaves as with the newest one."""
    installed = installed_version()
    return installed is not None and installed < (major, minor)


def load(name: str, purpose: str) -> Any:
    """Import a module of torch.

    Args:
        name: name of the module.
        purpose: the feature that needs it, for the error message.

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs torch, which is not installed: pip install torch", name="torch"
        ) from None


def start_worker_server(socket_path: str) -> Any:
    """Serve torch's debug handlers on a unix socket.

    Args:
        socket_path: path of the socket.

    Returns:
        torch's server, which serves until its method ``shutdown()`` is called.

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    return load("torch._C._distributed_c10d", "the worker server")._WorkerServer(socket_path)  # noqa: SLF001 - no public name


def cuda_device_count() -> int:
    """Return the number of CUDA (or ROCm) devices that torch sees, 0 if it cannot use them."""
    torch = load("torch", "counting GPUs")
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def xpu_device_count() -> int:
    """Return the number of XPU devices that torch sees, 0 if it cannot use them."""
    torch = load("torch", "counting XPUs")
    return int(torch.xpu.device_count()) if torch.xpu.is_available() else 0


def custom_device_count(name: str) -> int | None:
    """Return the number of devices of torch's private backend.

    Args:
        name: name of the backend.

    Returns:
        The number, 0 if torch cannot use the devices. ``None`` if the private backend has another name.
    """
    torch = load("torch", f"counting devices of {name!r}")
    if name != torch._C._get_privateuse1_backend_name():  # noqa: SLF001 - no public name
        return None
    module = getattr(torch, name, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def accelerator_count() -> tuple[str, int]:
    """Return type and number of the accelerator devices that torch sees, ``("cpu", 0)`` if there are none."""
    torch = load("torch", "counting accelerators")
    if hasattr(torch, "accelerator"):
        if torch.accelerator.is_available():
            return str(torch.accelerator.current_accelerator().type), int(torch.accelerator.device_count())
        return "cpu", 0
    count = cuda_device_count()  # torch < 2.7
    return ("cuda", count) if count else ("cpu", 0)
