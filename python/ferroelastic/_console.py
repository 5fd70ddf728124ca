"""Writing to a stream that somebody else may have stopped reading."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

__all__ = ["Console", "ConsoleHandler", "stderr"]

if TYPE_CHECKING:
    from ferroelastic import _rust

_MOST_KEPT_BYTES = 1 << 16


class Console:
    """Writes text to a stream and never waits for its reader.

    What the stream does not take is kept, up to 64 KiB, and tried again with the next write. Lines beyond that are lost; their number is
    written once the reader is back.

    Args:
        stream: where the text goes; ``None`` (closed when the interpreter started) takes nothing.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self._kept = bytearray()
        self._lost_lines = 0

    def write(self, text: str) -> None:
        """Write text, as far as there is room for it."""
        stream = self.stream
        if stream is None:
            return
        data = text.encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")
        self.flush()
        if self._kept and len(self._kept) + len(data) > _MOST_KEPT_BYTES:
            self._lost_lines += data.count(b"\n")
            return
        self._kept += data
        self.flush()
        # A long text goes to a reader that keeps up, whatever its length; only what is kept has a limit.
        self._lost_lines += self._kept.count(b"\n", _MOST_KEPT_BYTES)
        del self._kept[_MOST_KEPT_BYTES:]

    def flush(self) -> None:
        """Write what was kept, as far as there is room for it."""
        if self.stream is None or not self._kept:
            return
        try:
            descriptor = self.stream.fileno()
        except (AttributeError, OSError, ValueError):  # a stream of Python's own, which has no reader to wait for
            self._write_plainly(self.stream)
            return
        if "ferroelastic._rust" not in sys.modules:  # nothing was started yet that could be held up
            self._write_plainly(self.stream)
            return
        from ferroelastic import _rust

        try:
            # Opened each time: to hold a descriptor of somebody else's pipe would hide its end from the reader.
            console = _rust.Console(descriptor)
            self._take(console)
            if not self._kept and self._lost_lines:
                lost, self._lost_lines = self._lost_lines, 0
                self._kept += f"ferrorun: {lost} log lines were lost here, because standard error was full\n".encode()
                self._take(console)
        except OSError:  # nobody will read it any more, or the disk is full
            self._kept.clear()

    def _write_plainly(self, stream: TextIO) -> None:
        text = self._kept.decode(errors="replace")
        self._kept.clear()
        with suppress(OSError, ValueError):  # it is closed
            stream.write(text)
            stream.flush()

    def _take(self, console: _rust.Console) -> None:
        del self._kept[: console.write(bytes(self._kept))]


_stderr: Console | None = None


def stderr() -> Console:
    """Return the one console of this process's standard error."""
    global _stderr  # noqa: PLW0603 - what was kept for the stream is the process's
    if _stderr is None or _stderr.stream is not sys.stderr:
        _stderr = Console(sys.stderr)
    return _stderr


class ConsoleHandler(logging.Handler):
    """A log handler for standard error that never waits for its reader."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line for a record."""
        stderr().write(self.format(record) + "\n")
