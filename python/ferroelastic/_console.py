"""Writes to standard error without waiting for its reader."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

__all__ = ["Console", "ConsoleHandler", "stderr"]

if TYPE_CHECKING:
    from ferroelastic import _rust

_MAX_PENDING_BYTES = 1 << 16


class Console:
    """Writes text to a stream and never waits for its reader.

    Text that the stream does not accept is kept, up to 64 KiB, and retried with the next write. Further lines are dropped. Their number is
    written when the reader continues.

    Args:
        stream: the stream. ``None`` (closed when the interpreter started) discards the text.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self._pending = bytearray()
        self._lost_lines = 0

    def write(self, text: str) -> None:
        """Write text and keep the part that the stream does not accept."""
        stream = self.stream
        if stream is None:
            return
        data = text.encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")
        self.flush()
        if self._pending and len(self._pending) + len(data) > _MAX_PENDING_BYTES:
            self._lost_lines += data.count(b"\n")
            return
        self._pending += data
        self.flush()
        # After the write, because the limit applies only to pending text: a fast reader gets a text of any length.
        self._lost_lines += self._pending.count(b"\n", _MAX_PENDING_BYTES)
        del self._pending[_MAX_PENDING_BYTES:]

    def flush(self) -> None:
        """Write the pending text, as far as the stream accepts it."""
        if self.stream is None or not self._pending:
            return
        try:
            descriptor = self.stream.fileno()
        except (AttributeError, OSError, ValueError):  # an in-memory stream, which cannot block
            self._write_blocking(self.stream)
            return
        if "ferroelastic._rust" not in sys.modules:  # no workers yet that a blocking write could delay
            self._write_blocking(self.stream)
            return
        from ferroelastic import _rust

        try:
            # Opened for each write: an additional descriptor of a pipe would keep it open after the other writers closed it.
            console = _rust.Console(descriptor)
            self._write_pending(console)
            if not self._pending and self._lost_lines:
                lost, self._lost_lines = self._lost_lines, 0
                self._pending += (
                    f"ferrorun: {lost} log lines were lost here, because standard error was full\n".encode()
                )
                self._write_pending(console)
        except OSError:  # the reader closed the stream, or the disk is full
            self._pending.clear()

    def finish(self, stall_timeout_s: float) -> bool:
        """Write the pending text, and wait for a reader that continues.

        Args:
            stall_timeout_s: timeout in seconds for a stream that accepts nothing.

        Returns:
            Whether no text is left: the stream has accepted it, or has failed.
        """
        self.flush()
        if not self._pending or self.stream is None:
            return True
        import select
        import time

        poll = select.poll()
        poll.register(self.stream.fileno(), select.POLLOUT)
        size, deadline_s = len(self._pending), time.monotonic() + stall_timeout_s
        while self._pending and time.monotonic() < deadline_s:
            poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000)
            self.flush()
            if len(self._pending) != size:
                size, deadline_s = len(self._pending), time.monotonic() + stall_timeout_s
            else:
                time.sleep(0.005)  # there is less room than a part of the text needs
        return not self._pending

    def _write_blocking(self, stream: TextIO) -> None:
        text = self._pending.decode(errors="replace")
        self._pending.clear()
        with suppress(OSError, ValueError):  # the stream is closed
            stream.write(text)
            stream.flush()

    def _write_pending(self, console: _rust.Console) -> None:
        del self._pending[: console.write(bytes(self._pending))]


_stderr: Console | None = None


def stderr() -> Console:
    """Return the console of this process's standard error."""
    global _stderr  # noqa: PLW0603 - one stream per process has one buffer of pending text
    if _stderr is None or _stderr.stream is not sys.stderr:
        _stderr = Console(sys.stderr)
    return _stderr


class ConsoleHandler(logging.Handler):
    """A log handler for standard error that never waits for its reader."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line for a record."""
        stderr().write(self.format(record) + "\n")
