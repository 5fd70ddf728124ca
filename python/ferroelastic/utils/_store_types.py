"""What this package asks of a store: any object with these methods will do, torch's stores among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that an elastic agent uses."""

    @property
    def timeout(self) -> timedelta:
        """How long a blocking call waits."""

    def set_timeout(self, timeout: timedelta, /) -> None:
        """Change :attr:`timeout`."""

    def set(self, key: str, value: str | bytes, /) -> None:
        """Store ``value``."""

    def get(self, key: str, /) -> bytes:
        """Return the value, waiting until there is one."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter and return its new value."""

    def wait(self, keys: list[str], timeout: timedelta = ..., /) -> None:
        """Block until all keys exist."""

    def multi_get(self, keys: list[str], /) -> Sequence[bytes]:
        """Return several values, waiting until all exist."""

    def multi_set(self, keys: list[str], values: list[str], /) -> None:
        """Store several values."""
