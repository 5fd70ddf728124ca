"""A client of a ``TCPStore`` that writes and reads the bytes itself, to see what torch's own client does not show or cannot send."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ADD",
    "APPEND",
    "BARRIER",
    "CANCEL_WAIT",
    "CHECK",
    "COMPARE_SET",
    "DELETE_KEY",
    "GET",
    "GET_NUM_KEYS",
    "LIST_KEYS",
    "MULTI_GET",
    "MULTI_SET",
    "PING",
    "QUEUE_LEN",
    "QUEUE_POP",
    "QUEUE_PUSH",
    "SET",
    "VALIDATE",
    "WAIT",
    "RawClient",
    "i64",
    "keys",
    "request",
    "sized",
]

VALIDATE = b"\0" + struct.pack("<I", 0x3C85F7CE)
(SET, COMPARE_SET, GET, ADD, CHECK, WAIT, GET_NUM_KEYS, DELETE_KEY, APPEND, MULTI_GET, MULTI_SET, CANCEL_WAIT, PING) = (
    range(1, 14)
)
QUEUE_PUSH, QUEUE_POP, QUEUE_LEN, LIST_KEYS, BARRIER = range(14, 19)

PATIENCE_S = 60.0


def i64(number: int) -> bytes:
    """Write an integer as the protocol does."""
    return struct.pack("<q", number)


def sized(text: bytes) -> bytes:
    """Write bytes after their length."""
    return i64(len(text)) + text


def keys(*names: bytes) -> bytes:
    """Write a list of keys after their number."""
    return i64(len(names)) + b"".join(map(sized, names))


def request(opcode: int, *arguments: bytes) -> bytes:
    """Write a request. Its arguments are written already."""
    return bytes([opcode]) + b"".join(arguments)


class RawClient:
    """A connection to a store on this machine."""

    def __init__(self, port: int, *, hello: bytes = VALIDATE) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._fences = 0
        self.send(hello)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, size: int) -> bytes:
        """Exactly as many bytes."""
        received = bytearray()
        while len(received) < size:
            more = self._socket.recv(size - len(received))
            assert more, f"the connection ended after {len(received)} bytes of {size}"
            received += more
        return bytes(received)

    def ask(self, data: bytes, size: int) -> bytes:
        """Send a request whose answer has so many bytes."""
        self.send(data)
        return self.receive(size)

    def fence(self) -> bytes:
        """Return what has come before the answer to a ``PING`` that is sent now: the server has seen all that was sent before."""
        self._fences += 1
        nonce = b"\xf3\xfe" + struct.pack("<H", self._fences)  # in nothing else that is sent
        self.send(bytes([PING]) + nonce)
        received = b""
        while not received.endswith(nonce):
            more = self._socket.recv(1 << 16)
            assert more, f"the connection ended after {received!r}"
            received += more
        return received[: -len(nonce)]

    def is_closed(self) -> bool:
        """Whether the server ends the connection, without a byte. It must: this waits for it."""
        try:
            return self._socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def is_open(self) -> bool:
        """Whether the connection is served."""
        try:
            return self.fence() == b""
        except (AssertionError, ConnectionError):
            return False
