"""A client of the agents' store in a round, with the methods of ``torch.distributed.Store`` that agents use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferroelastic.utils.store import DistStoreError

if TYPE_CHECKING:
    from datetime import timedelta  # not at run time: an agent that does not use the store saves 0.2 MB

    from ferroelastic import _rust

__all__ = ["AgentStore"]

_DEFAULT_TIMEOUT_S = 300.0


class AgentStore:
    """A client of the round's store. Mirrors ``torch.distributed.PrefixStore``.

    The client connects on first use, because an agent of this package does not use the store itself. Every method raises
    ``ConnectionError`` if the store is lost or does not answer within the timeout. All later calls then raise it too.

    Args:
        host: host name or address of the store.
        port: port of the store.
        prefix: prefix of all keys, followed by a slash.
        timeout: timeout of each operation: connection, wait for keys, request and reply; ``None`` is 300 s.
    """

    def __init__(self, host: str, port: int, prefix: str, timeout: timedelta | None = None) -> None:
        self.host = host
        self.port = port
        self._timeout_s = _DEFAULT_TIMEOUT_S if timeout is None else timeout.total_seconds()
        self._prefix = prefix
        self._connected: _rust.StoreClient | None = None

    def set(self, key: str, value: str | bytes) -> None:
        """Set the value of ``key``."""
        self._client.set(self._key(key), _bytes(value))

    def get(self, key: str) -> bytes:
        """Wait until ``key`` has a value and return it.

        Raises:
            DistStoreError: the timeout has passed.
        """
        return self.multi_get([key])[0]

    def add(self, key: str, amount: int) -> int:
        """Add to the counter ``key`` and return the sum. A new counter is 0."""
        return self._client.add(self._key(key), amount)

    def append(self, key: str, value: str | bytes) -> None:
        """Append to the value of ``key``."""
        self._client.append(self._key(key), _bytes(value))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set ``key`` to ``desired`` if its value is ``expected``; return the value after the operation."""
        return self._client.compare_set(self._key(key), _bytes(expected), _bytes(desired))

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys have values."""
        return self._client.check([self._key(key) for key in keys])

    def delete_key(self, key: str) -> bool:
        """Delete ``key`` and return whether it had a value."""
        return self._client.delete(self._key(key))

    def num_keys(self) -> int:
        """Return the number of keys in the whole store."""
        return self._client.num_keys()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait until all keys have values and return the values.

        Raises:
            DistStoreError: the timeout has passed.
        """
        values: list[bytes] = self._call_with_timeout(
            self._client.get, [self._key(key) for key in keys], self._timeout_s
        )
        return values

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        """Set several keys in one request."""
        self._client.multi_set([(self._key(key), _bytes(value)) for key, value in zip(keys, values, strict=True)])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys have values.

        Args:
            keys: the keys.
            timeout: timeout of this call; ``None`` uses :attr:`timeout`.

        Raises:
            DistStoreError: the timeout has passed.
        """
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        self._call_with_timeout(self._client.wait, [self._key(key) for key in keys], timeout_s)

    @property
    def timeout(self) -> timedelta:
        """Timeout of each operation."""
        from datetime import timedelta

        return timedelta(seconds=self._timeout_s)

    def set_timeout(self, timeout: timedelta) -> None:
        """Change :attr:`timeout`."""
        self._timeout_s = timeout.total_seconds()
        if self._connected is not None:
            self._connected.set_timeout(self._timeout_s)

    def clone(self) -> AgentStore:
        """Return another client of the same store with its own connection."""
        return AgentStore(self.host, self.port, self._prefix, self.timeout)

    @property
    def _client(self) -> _rust.StoreClient:
        if self._connected is None:
            from ferroelastic import _rust

            self._connected = _rust.StoreClient(self.host, self.port, self._timeout_s)
        return self._connected

    def _key(self, key: str) -> bytes:
        return f"/{self._prefix}/{key}".encode()

    @staticmethod
    def _call_with_timeout(method: Any, keys: list[bytes], timeout_s: float) -> Any:
        from ferroelastic import _rust

        try:
            return method(keys, timeout_s)
        except _rust.StoreTimeoutError as error:
            raise DistStoreError(str(error)) from None


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
