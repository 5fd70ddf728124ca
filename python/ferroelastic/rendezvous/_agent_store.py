"""The store that agents share in a round, as the methods of ``torch.distributed.Store`` that agents use."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ferroelastic.utils.store import DistStoreError

if TYPE_CHECKING:
    from ferroelastic import _rust

__all__ = ["AgentStore"]

_DEFAULT_TIMEOUT = timedelta(seconds=300)


class AgentStore:
    """A client of the round's store. It connects when it is used: an agent of this package needs it for nothing of its own.

    Every method raises ``ConnectionError`` if the store is gone, or does not answer within the timeout; then so does each one after it.

    Args:
        host: name or address of the store's host.
        port: its port.
        prefix: what the keys have before them, with a slash between.
        timeout: how long it takes at most to connect, to wait for keys, and to ask and be answered.
    """

    def __init__(self, host: str, port: int, prefix: str, timeout: timedelta = _DEFAULT_TIMEOUT) -> None:
        self.host = host
        self.port = port
        self._timeout = timeout
        self._prefix = prefix
        self._connected: _rust.StoreClient | None = None

    def set(self, key: str, value: str | bytes) -> None:
        """Give ``key`` a value."""
        self._client.set(self._key(key), _bytes(value))

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, once there is one.

        Raises:
            DistStoreError: there was none within the timeout.
        """
        return self.multi_get([key])[0]

    def add(self, key: str, amount: int) -> int:
        """Add to the number under ``key``, which begins as 0; return the sum."""
        return self._client.add(self._key(key), amount)

    def append(self, key: str, value: str | bytes) -> None:
        """Append to the value of ``key``."""
        self._client.append(self._key(key), _bytes(value))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Give ``key`` the value ``desired`` if it has ``expected``; return what it has then."""
        return self._client.compare_set(self._key(key), _bytes(expected), _bytes(desired))

    def check(self, keys: list[str]) -> bool:
        """Tell whether all keys have values."""
        return self._client.check([self._key(key) for key in keys])

    def delete_key(self, key: str) -> bool:
        """Forget ``key``; tell whether it had a value."""
        return self._client.delete(self._key(key))

    def num_keys(self) -> int:
        """Return the number of keys in the whole store."""
        return self._client.num_keys()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return the values of ``keys``, once all have one.

        Raises:
            DistStoreError: they had not within the timeout.
        """
        values: list[bytes] = self._timed(self._client.get, [self._key(key) for key in keys], self.timeout)
        return values

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        """Give each key its value."""
        self._client.multi_set([(self._key(key), _bytes(value)) for key, value in zip(keys, values, strict=True)])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys have values.

        Raises:
            DistStoreError: they had not within the timeout.
        """
        self._timed(self._client.wait, [self._key(key) for key in keys], self.timeout if timeout is None else timeout)

    @property
    def timeout(self) -> timedelta:
        """How long anything takes at most."""
        return self._timeout

    def set_timeout(self, timeout: timedelta) -> None:
        """Wait for so long from now on."""
        self._timeout = timeout
        if self._connected is not None:
            self._connected.set_timeout(timeout.total_seconds())

    def clone(self) -> AgentStore:
        """Return another client of the same store, with a connection of its own."""
        return AgentStore(self.host, self.port, self._prefix, self.timeout)

    @property
    def _client(self) -> _rust.StoreClient:
        if self._connected is None:
            from ferroelastic import _rust

            self._connected = _rust.StoreClient(self.host, self.port, self.timeout.total_seconds())
        return self._connected

    def _key(self, key: str) -> bytes:
        return f"/{self._prefix}/{key}".encode()

    @staticmethod
    def _timed(method: Any, keys: list[bytes], timeout: timedelta) -> Any:
        from ferroelastic import _rust

        try:
            return method(keys, timeout.total_seconds())
        except _rust.StoreTimeoutError as error:
            raise DistStoreError(str(error)) from None


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
