"""The store interface that this package uses. torch's stores have it, and other objects with these methods are accepted too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that an elastic agent uses."""

    @property
    def timeout(self) -> timedelta:
        """Timeout of blocking calls."""

    def set_timeout(self, timeout: timedelta, /) -> None:
        """Change :attr:`timeout`."""

    def set(self, key: str, value: str | bytes, /) -> None:
        """Set the value of ``key``."""

    def get(self, key: str, /) -> bytes:
        """Wait until ``key`` has a value and return it."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter and return its new value."""

    def wait(self, keys: list[str], timeout: timedelta = ..., /) -> None:
        """Wait until all keys have values."""

    def multi_get(self, keys: list[str], /) -> Sequence[bytes]:
        """Wait until all keys have values and return them."""

    def multi_set(self, keys: list[str], values: list[str], /) -> None:
        """Set the values of several keys."""
