"""A drop-in for torchrun and ``torch.distributed.elastic`` with a Rust supervision engine.

Module paths mirror torch's: ``torch.distributed.elastic.X`` is ``ferroelastic.X``, ``torch.distributed.run`` is
``ferroelastic.run``, ``torch.distributed.launcher`` is ``ferroelastic.launcher``. The package imports torch only for function
entrypoints and for torch's own rendezvous handlers. If torch is already loaded, exceptions and results are instances of torch's
classes too.

:func:`install` puts the agent of this package under programs that call torch's launcher, and :func:`uninstall` takes it away again.
:func:`stop_deadline` tells a worker the deadline of its stop.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than that of this module
if sys.platform != "linux":
    raise ImportError(
        f"ferroelastic supports Linux only and cannot run on {sys.platform!r}: "
        "use torchrun (python -m torch.distributed.run) instead"
    )
if "t" in sys.abiflags:
    raise ImportError(
        f"ferroelastic cannot run on the free-threaded build of CPython {sys.version_info[0]}.{sys.version_info[1]}, "
        "which cannot load its native module (stable ABI abi3): use the build with the GIL, or torchrun"
    )

__all__ = ["StopNotice", "__version__", "install", "stop_deadline", "uninstall"]

if TYPE_CHECKING:
    from ferroelastic._install import install, uninstall
    from ferroelastic._stop_notice import StopNotice, stop_deadline

    __version__: str
else:

    def __getattr__(name: str) -> object:
        # Imported late: importlib.metadata takes longer to import than the rest of the launcher.
        if name == "__version__":
            from importlib.metadata import version

            return version("ferroelastic")
        if name in ("install", "uninstall"):
            from ferroelastic import _install

            return getattr(_install, name)
        if name in ("StopNotice", "stop_deadline"):
            from ferroelastic import _stop_notice

            return getattr(_stop_notice, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
