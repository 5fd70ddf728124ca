"""The client's end of a timer server's named pipe. Writes never block; unsent lines are queued."""

from __future__ import annotations

import errno
import os
import stat
import threading
from os import getpid, write
from select import PIPE_BUF
from typing import TYPE_CHECKING

from ferroelastic.timer._stacks import arm_stack_dump
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["BEATS_SUFFIX", "Pipe"]

logger = get_logger(__name__)

BEATS_SUFFIX = ".beats"
"""Suffix of the heartbeat page. Servers of this package append it to the path of their pipe."""

_CLOSED = -1
_CONNECT_ATTEMPTS = 10
_CONNECT_RETRY_S = 0.1
_MAX_UNSENT = 4096


class Pipe:
    """Sends lines to the reader of a named pipe. Thread-safe.

    The first line of a process opens the pipe, and the pipe stays open. For torch's server it is opened for each line, because that server
    expects a request while the pipe is open. A forked process opens the pipe again.

    If the pipe is full or has no reader, the line is queued until the next call. A newer line replaces a queued line with the same key.

    Args:
        path: path of the named pipe.
    """

    _fd = _CLOSED

    def __init__(self, path: str) -> None:
        self.path = path
        self.delayed = 0
        """Number of lines that were not sent by their own call."""
        self._was_open = False
        self._has_waited = False
        self._has_warned = False
        self._reset(getpid())

    def _reset(self, pid: int) -> None:
        """Reset the state in a new process. The queued lines belong to its parent."""
        # A new lock, because a thread of the parent may have held the lock during the fork.
        self._lock = threading.RLock()
        self._fd = _CLOSED
        self._inode = (0, 0)
        self._has_partial_line = False
        self._unsent: dict[Hashable, bytes] = {}
        self._pid = pid
        arm_stack_dump()

    @property
    def unsent(self) -> int:
        """Number of queued lines."""
        return len(self._unsent)

    def withdraw(self, pid: int, scope: Hashable) -> bool:
        """Remove a queued line; return ``False`` if it is not in the queue."""
        return self._unsent.pop((pid, scope), None) is not None

    def send(self, pid: int, scope: Hashable, text: str) -> None:
        """Send a line atomically, after the queued lines. Never blocks after the first successful open.

        Args:
            pid: process id in the line.
            scope: scope in the line. Process id and scope are the key of the line.
            text: ASCII text without the line end.

        Raises:
            BrokenPipeError: no server has ever served the pipe. The first call waits for a server for 0.9 s.
            RuntimeError: the line is longer than ``PIPE_BUF`` bytes.
        """
        line = f"{text}\n".encode()
        if len(line) > PIPE_BUF:
            raise RuntimeError(f"FileTimerRequest larger than {PIPE_BUF} bytes is not supported: {text}")
        if self._pid != getpid():
            self._close_fd()
            self._reset(getpid())
        with self._lock:
            if not self._unsent and self._fd != _CLOSED:
                try:
                    written = write(self._fd, line)
                except OSError:
                    written = 0
                if written == len(line):
                    return
                self._has_partial_line = written > 0
            self._queue_and_flush((pid, scope), line)

    def _queue_and_flush(self, key: Hashable, line: bytes) -> None:
        if self._fd == _CLOSED:
            self._connect()
        self._unsent.pop(key, None)
        self._unsent[key] = line
        while len(self._unsent) > _MAX_UNSENT:
            del self._unsent[next(iter(self._unsent))]
        reason = self._flush()
        if reason is not None:
            self.delayed += 1
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "failed to send a request to the timer server at %s (%s): it is queued and sent before the next request",
                    *(self.path, reason),
                )
        if not os.path.exists(self.path + BEATS_SUFFIX):
            self._close_fd()

    def _flush(self) -> str | None:
        """Send the queued lines in order; return the reason if lines remain, else ``None``."""
        reopened = False
        while self._unsent:
            key, line = next(iter(self._unsent.items()))
            try:
                if self._has_partial_line:
                    write(self._fd, b"\n")
                    self._has_partial_line = False
                # Only a pipe guarantees an atomic write of this length.
                written = write(self._fd, line)
                if written < len(line):
                    self._has_partial_line = written > 0
                    return "the pipe is full"
            except BlockingIOError:
                return "the pipe is full"
            except OSError as error:  # the reader has gone, or the program has closed the descriptor
                self._close_fd()
                if reopened:
                    return str(error)
                try:
                    self._open()
                except OSError as open_error:
                    return str(open_error)
                reopened = True
                continue
            # A signal handler may have sent and replaced the line.
            if self._unsent.get(key) is line:
                del self._unsent[key]
        return None

    def _connect(self) -> None:
        """Open the pipe. Retry for a short time if this object has never opened it."""
        is_first = not self._was_open
        attempts = _CONNECT_ATTEMPTS if is_first and not self._has_waited else 1
        for number in range(attempts):
            try:
                self._open()
            except OSError as error:
                reason = error
            else:
                return
            if number < attempts - 1:
                self._has_waited = True
                threading.Event().wait(_CONNECT_RETRY_S)
        if is_first:
            raise BrokenPipeError(
                "Could not send the FileTimerRequest because FileTimerServer is not available."
            ) from reason

    def _open(self) -> None:
        # O_NONBLOCK: without a reader, the call fails with ENXIO instead of blocking.
        fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(fd)
        if not stat.S_ISFIFO(found.st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a named pipe", self.path)
        self._fd, self._inode = fd, (found.st_dev, found.st_ino)
        self._has_partial_line = False
        self._was_open = True

    def _close_fd(self) -> None:
        """Close the pipe, unless its descriptor refers to another file: a daemon closes and reuses all inherited descriptors."""
        fd, self._fd = self._fd, _CLOSED
        if fd == _CLOSED:
            return
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) == self._inode:
                os.close(fd)
        except OSError:
            pass

    def __del__(self) -> None:
        self._close_fd()
