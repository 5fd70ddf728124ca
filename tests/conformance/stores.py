"""Servers of a ``TCPStore``: torch's, and ours."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tests.conformance.implementations import TORCH

from ferroelastic._rust import StoreServer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["connect", "serving"]


@contextmanager
def serving(name: str) -> Iterator[int]:
    """Serve an empty store of that implementation. Gives its port."""
    if name == TORCH:
        from torch.distributed import TCPStore

        theirs = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        assert theirs.libuvBackend  # type: ignore[attr-defined]  # torch's stub lacks it
        yield theirs.port
    else:
        ours = StoreServer("127.0.0.1")
        yield ours.port
        ours.close()


def connect(port: int, timeout_s: float = 60) -> Any:
    """Return torch's client of a store."""
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=timeout_s)
    return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timeout)
