"""The event handler ``jsonl``: events as lines of a file.

A thread writes the file. The agent waits for the disk only at the end of a run, for up to half a second. Lines that the file does not take
are lost, and a warning gives their number.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from ferroelastic.utils import _threads
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from queue import SimpleQueue

__all__ = ["EVENT_FILE_ENV", "JsonLinesHandler"]

EVENT_FILE_ENV = "FERROELASTIC_EVENT_FILE"
"""Environment variable: path of the file. Default ``events.jsonl`` in the log folder of the run."""

_NAME = "events.jsonl"
_MAX_PENDING_BYTES = 16 << 20
_CLOSE_TIMEOUT_S = 0.5

logger = get_logger(__name__)


class JsonLinesHandler(logging.Handler):
    """Appends each event to a file as one line of JSON, in one write.

    A line is the event with one more field, ``time_ns``: the time in nanoseconds since the epoch. Events before the start of the workers
    are kept in memory until the log folder of the run exists, up to 16 MiB. Not in torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._writer: _Writer | None = None
        self._early: list[bytes] = []
        self._early_bytes = 0
        self._early_lost = 0
        self._folder: str | None = None
        self._pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand an event to the thread, and return at once."""
        text = record.getMessage()
        if text.startswith("{"):
            text = f'{{"time_ns": {time.time_ns()}, {text[1:]}'
        line = text.replace("\n", " ").encode("utf-8", "backslashreplace") + b"\n"
        if self._pid != os.getpid():  # a forked child has no thread
            self._writer, self._pid = None, os.getpid()
        path = os.environ.get(EVENT_FILE_ENV) or (self._folder and os.path.join(self._folder, _NAME))
        if self._writer is None and path:
            self._writer = _Writer(path)
        if self._writer is not None:
            self._writer.put(line)
        elif self._early_bytes + len(line) > _MAX_PENDING_BYTES:
            self._early_lost += 1
        else:
            self._early.append(line)
            self._early_bytes += len(line)

    def use_folder(self, folder: str | None) -> None:
        """Write the events to ``events.jsonl`` in a folder, unless the environment names a file. Calls with ``None`` have no effect.

        Args:
            folder: log folder of the run. A file that is already in use stays.
        """
        self.acquire()
        try:
            self._folder = self._folder or folder
            if self._folder and self._writer is None and self._early:
                self._writer = _Writer(os.path.join(self._folder, _NAME))
                self._hand_over()
        finally:
            self.release()

    def finish(self) -> None:
        """Write the remaining events and close the file. Waits for up to half a second. A later event opens the file again."""
        self.acquire()
        try:
            writer, self._writer, self._folder = self._writer, None, None
            unplaced, self._early = len(self._early) + self._early_lost, []
            self._early_bytes = self._early_lost = 0
        finally:
            self.release()
        if unplaced:
            logger.warning("%d events were not written: the run has no log folder. Set %s", unplaced, EVENT_FILE_ENV)
        if writer is not None:
            writer.close()

    def _hand_over(self) -> None:
        if self._writer is not None:
            self._writer.lost += self._early_lost
            for line in self._early:
                self._writer.put(line)
        self._early, self._early_bytes, self._early_lost = [], 0, 0


class _Writer:
    """Writes lines to a file on a thread of its own."""

    def __init__(self, path: str) -> None:
        from queue import SimpleQueue

        self.path = path
        self.lost = 0
        # `None` ends the thread. A `SimpleQueue` has no lock that an interrupted call could hold.
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        # Each counter has one writer: the handler, and the thread.
        self._put_bytes = 0
        self._done_bytes = 0
        self._descriptor = -1
        self._is_torn = False
        self._has_warned = False
        self._thread = threading.Thread(target=self._run, name="ferro-events", daemon=True)
        _threads.start(self._thread)

    def put(self, line: bytes) -> None:
        if self._put_bytes - self._done_bytes + len(line) > _MAX_PENDING_BYTES:
            self.lost += 1
            return
        self._put_bytes += len(line)
        self._lines.put(line)

    def close(self) -> None:
        self._lines.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning(
                "The file of events %s does not take data: the last events are lost if that does not change", self.path
            )
        elif self.lost:
            logger.warning("%d events were not written to %s", self.lost, self.path)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
            except OSError as error:
                self.lost += 1
                if not self._has_warned:
                    self._has_warned = True
                    logger.warning("Failed to write an event to %s: %s", self.path, error)
            self._done_bytes += len(line)
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _write(self, line: bytes) -> None:
        if self._descriptor < 0:
            # O_NONBLOCK: a named pipe without a reader is an error, and one with a slow reader loses lines.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.open(self.path, flags, 0o666)
        rest = b"\n" + line if self._is_torn else line
        while rest:
            written = os.write(self._descriptor, rest)
            self._is_torn = written < len(rest)  # until the rest is written, too
            rest = rest[written:]
