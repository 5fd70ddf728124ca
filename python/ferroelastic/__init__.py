"""A drop-in for torchrun and ``torch.distributed.elastic`` with a Rust supervision engine.

Module paths mirror torch's: ``torch.distributed.elastic.X`` is ``ferroelastic.X``, ``torch.distributed.run`` is
``ferroelastic.run``, ``torch.distributed.launcher`` is ``ferroelastic.launcher``. Nothing here imports torch unless a function
entrypoint or one of torch's own rendezvous handlers is used; where torch is loaded already, what is raised or returned is an
instance of torch's class too.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if sys.platform != "linux":
    raise ImportError(
        f"ferroelastic supports Linux only and cannot run on {sys.platform!r}: "
        "use torchrun (python -m torch.distributed.run) here"
    )

__all__ = ["__version__"]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        # importlib.metadata costs more to import than the rest of the launcher: only who asks for the version pays.
        if name == "__version__":
            from importlib.metadata import version

            return version("ferroelastic")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
