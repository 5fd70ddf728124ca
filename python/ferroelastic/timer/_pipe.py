"""The client's end of a timer server's named pipe: it never blocks, and what it cannot send it keeps."""

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
"""What a server of this package adds to the path of its pipe for the page of its heartbeats."""

_CLOSED = -1
_TRIES = 10
_BETWEEN_TRIES_S = 0.1
_MOST_UNSENT = 4096


class Pipe:
    """Sends lines to whoever reads a named pipe.

    The pipe is opened by the first line of each process, also of a forked one, and kept open; a server of torch's takes an open pipe
    for a request that is on its way, so there it is opened for each line. A line that cannot be sent, because the pipe is full or nobody
    reads it, waits for the next call; of lines with the same key the newest. May be used by several threads.

    Args:
        path: path of the named pipe.
    """

    _fd = _CLOSED

    def __init__(self, path: str) -> None:
        self.path = path
        self.delayed = 0
        """Lines that could not be sent when they were given."""
        self._was_open = False
        self._has_waited = False
        self._has_warned = False
        self._begin(getpid())

    def _begin(self, pid: int) -> None:
        """Start over in a new process: what its parent has not sent is not its own to send."""
        # Of its own: a thread of the parent may have held the parent's during the fork.
        self._lock = threading.RLock()
        self._fd = _CLOSED
        self._inode = (0, 0)
        self._is_torn = False
        self._unsent: dict[Hashable, bytes] = {}
        self._pid = pid
        arm_stack_dump()

    @property
    def unsent(self) -> int:
        """Lines that wait for the next call."""
        return len(self._unsent)

    def withdraw(self, pid: int, scope: Hashable) -> bool:
        """Forget a line that could not be sent so far; ``False`` if there is none."""
        return self._unsent.pop((pid, scope), None) is not None

    def send(self, pid: int, scope: Hashable, text: str) -> None:
        """Send a line in one piece, after those that wait. Never blocks, once the pipe has been open.

        Args:
            pid: whom the line is about.
            scope: of lines about the same process and scope only the newest is worth sending.
            text: ASCII, without the line's end.

        Raises:
            BrokenPipeError: there never was a server, for the last second or so.
            RuntimeError: the line is too long to be written in one piece.
        """
        line = f"{text}\n".encode()
        if len(line) > PIPE_BUF:
            raise RuntimeError(f"FileTimerRequest larger than {PIPE_BUF} bytes is not supported: {text}")
        if self._pid != getpid():
            self._forsake()
            self._begin(getpid())
        with self._lock:
            if not self._unsent and self._fd != _CLOSED:
                try:
                    written = write(self._fd, line)
                except OSError:
                    written = 0
                if written == len(line):
                    return
                self._is_torn = written > 0
            self._send_slowly((pid, scope), line)

    def _send_slowly(self, key: Hashable, line: bytes) -> None:
        if self._fd == _CLOSED:
            self._connect()
        self._unsent.pop(key, None)
        self._unsent[key] = line
        while len(self._unsent) > _MOST_UNSENT:
            del self._unsent[next(iter(self._unsent))]
        reason = self._flush()
        if reason is not None:
            self.delayed += 1
            if not self._has_warned:
                self._has_warned = True
                logger.warning("timer server at %s cannot be told now (%s); it is told later", self.path, reason)
        if not os.path.exists(self.path + BEATS_SUFFIX):
            self._forsake()

    def _flush(self) -> str | None:
        """Send what waits, in its order; why something is left, if it is."""
        reopened = False
        while self._unsent:
            key, line = next(iter(self._unsent.items()))
            try:
                if self._is_torn:
                    write(self._fd, b"\n")
                    self._is_torn = False
                # A pipe takes a line of this length as a whole or not at all; other files may not.
                written = write(self._fd, line)
                if written < len(line):
                    self._is_torn = written > 0
                    return "the pipe is full"
            except BlockingIOError:
                return "the pipe is full"
            except OSError as error:  # nobody reads it any more, or somebody has closed this process's descriptors
                self._forsake()
                if reopened:
                    return str(error)
                try:
                    self._open()
                except OSError as gone:
                    return str(gone)
                reopened = True
                continue
            # A signal handler may have come here, too.
            if self._unsent.get(key) is line:
                del self._unsent[key]
        return None

    def _connect(self) -> None:
        """Open the pipe; wait for it for a moment if it has never been open."""
        is_first = not self._was_open
        tries = _TRIES if is_first and not self._has_waited else 1
        for number in range(tries):
            try:
                self._open()
            except OSError as error:
                reason = error
            else:
                return
            if number < tries - 1:
                self._has_waited = True
                threading.Event().wait(_BETWEEN_TRIES_S)
        if is_first:
            raise BrokenPipeError(
                "Could not send the FileTimerRequest because FileTimerServer is not available."
            ) from reason

    def _open(self) -> None:
        # Without waiting for a reader: without one, this is ENXIO.
        fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(fd)
        if not stat.S_ISFIFO(found.st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is no named pipe", self.path)
        self._fd, self._inode = fd, (found.st_dev, found.st_ino)
        self._is_torn = False
        self._was_open = True

    def _forsake(self) -> None:
        """Close the pipe, unless the descriptor has come to be something else: a daemon closes all that it has inherited."""
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
        self._forsake()
