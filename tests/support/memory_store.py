"""A store for tests: torch's interface over a dictionary, shared by threads."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING

from ferroelastic.utils.store import DistStoreError

if TYPE_CHECKING:
    from collections.abc import Sequence


class MemoryStore:
    underlying_store: MemoryStore

    def __init__(self, timeout_s: float = 60.0, shared: MemoryStore | None = None, prefix: str = "") -> None:
        self.timeout = timedelta(seconds=timeout_s)
        self.prefix = prefix
        self.values: dict[str, bytes] = shared.values if shared else {}
        self.changed: threading.Condition = shared.changed if shared else threading.Condition()

    def below(self, prefix: str) -> MemoryStore:
        """The same store under a prefix, as ``PrefixStore`` gives."""
        below = MemoryStore(self.timeout.total_seconds(), self, f"{self.prefix}{prefix}/")
        below.underlying_store = self
        return below

    def clone(self) -> MemoryStore:
        return MemoryStore(self.timeout.total_seconds(), self, self.prefix)

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeout = timeout

    def set(self, key: str, value: str | bytes) -> None:
        with self.changed:
            self.values[self.prefix + key] = value.encode() if isinstance(value, str) else value
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self.values[self.prefix + key]

    def add(self, key: str, amount: int) -> int:
        with self.changed:
            total = int(self.values.get(self.prefix + key, b"0")) + amount
            self.values[self.prefix + key] = str(total).encode()
            self.changed.notify_all()
            return total

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        wanted = [self.prefix + key for key in keys]
        with self.changed:
            found = self.changed.wait_for(
                lambda: all(key in self.values for key in wanted), (timeout or self.timeout).total_seconds()
            )
        if not found:
            raise DistStoreError(f"wait timeout, keys: {wanted}")

    def multi_get(self, keys: list[str]) -> Sequence[bytes]:
        self.wait(keys)
        return [self.values[self.prefix + key] for key in keys]

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def delete_key(self, key: str) -> bool:
        with self.changed:
            return self.values.pop(self.prefix + key, None) is not None

    def list_keys(self) -> list[str]:
        with self.changed:
            return [key.removeprefix(self.prefix) for key in self.values if key.startswith(self.prefix)]
