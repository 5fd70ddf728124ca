"""A barrier for function workers that have returned."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["Hold"]

_ARRIVAL = b"\0"
_COUNTER_BYTES = 8


class Hold:
    """A barrier at the end of the function workers of one host.

    A process that ends immediately after a collective closes connections that its peers still use. A returned worker therefore waits
    until all workers have returned. A failure or a stop releases all of them.

    Each worker writes one byte to a pipe on arrival. The bytes are counted and never read. The last worker to arrive releases all of them,
    so the barrier does not depend on the agent. Workers wait in a blocking read of an eventfd, which signal handlers interrupt.

    Args:
        number: number of workers.

    Raises:
        OSError: the limit of open descriptors is reached.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        # The agent holds the read end open: without a reader, writes would fail with EPIPE.
        self._read_fd, self._arrival_fd = os.pipe2(os.O_CLOEXEC)
        try:
            self._release_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        except OSError:
            os.close(self._read_fd)
            os.close(self._arrival_fd)
            raise
        self._pipe_id = _file_id(self._arrival_fd)
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        from multiprocessing.reduction import DupFd

        return {
            "number": self._number,
            "pipe_id": self._pipe_id,
            "arrival": DupFd(self._arrival_fd),
            "release": DupFd(self._release_fd),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._number = state["number"]
        self._pipe_id = state["pipe_id"]
        self._arrival_fd = state["arrival"].detach()
        self._release_fd = state["release"].detach()
        self._closed = False

    def wait(self) -> None:
        """Wait until all workers have returned. An exception of a signal handler ends the wait.

        If the function has closed the descriptors, this returns immediately. The agent counts the worker at its exit.
        """
        try:
            if _file_id(self._arrival_fd) != self._pipe_id:
                return
        except OSError:
            return
        self.arrive()
        os.read(self._release_fd, _COUNTER_BYTES)  # retries after EINTR, unlike os.eventfd_read

    def arrive(self) -> None:
        """Count one worker as arrived: the caller, or a worker that has ended with exit code 0 without a return."""
        if self._closed:
            return
        import fcntl
        import struct
        import termios

        os.write(self._arrival_fd, _ARRIVAL)
        (arrived,) = struct.unpack("i", fcntl.ioctl(self._arrival_fd, termios.FIONREAD, bytes(4)))
        if arrived >= self._number:
            self.release()

    def release(self) -> None:
        """Release all workers, also those that arrive later."""
        if not self._closed:
            os.eventfd_write(self._release_fd, self._number)

    def close(self) -> None:
        """Release all workers and close the agent's descriptors. Idempotent."""
        if self._closed:
            return
        self.release()
        self._closed = True
        for fd in (self._read_fd, self._arrival_fd, self._release_fd):
            os.close(fd)


def _file_id(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
