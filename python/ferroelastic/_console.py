"""Writing to a stream that somebody else may have stopped reading."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

__all__ = ["ConsoleHandler", "has_room", "write"]

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # has no parameters before Python 3.11
    _StreamHandler = logging.StreamHandler

_PIECE = 4096  # a pipe that has room takes so much without blocking (PIPE_BUF)
_PATIENCE_S = 1.0


def has_room(fd: int, timeout_s: float) -> bool:
    """Whether ``fd`` takes something, or will within ``timeout_s`` seconds."""
    import select

    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    return bool(poller.poll(timeout_s * 1000))


def write(stream: TextIO, text: str) -> None:
    """Write text to a stream; what it does not take within a second is dropped, so that a reader that hangs holds up nobody."""
    import os

    with suppress(OSError, ValueError):  # closed, or nobody reads it any more
        stream.flush()
        fd = stream.fileno()
        rest = memoryview(text.encode(stream.encoding or "utf-8", "backslashreplace"))
        while rest and has_room(fd, _PATIENCE_S):
            rest = rest[os.write(fd, rest[:_PIECE]) :]


class ConsoleHandler(_StreamHandler):
    """A log handler that drops records rather than wait for a reader that hangs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line for a record."""
        write(self.stream, self.format(record) + self.terminator)
