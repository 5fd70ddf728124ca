"""Holding function workers that have returned until all of them have."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["Hold"]

_ARRIVAL = b"\0"
_COUNTER_BYTES = 8


class Hold:
    """A barrier at the end of the function workers of one host.

    A process that ends right after a collective takes its connections from peers that are still in it. A worker that has returned
    therefore waits until all have, and a rank that fails, or a stop, lets all of them go.

    Each worker that arrives writes one byte to a pipe that nobody reads. The worker that finds the bytes of all ranks there lets everybody
    go, so the agent need not be awake. Waiting is a blocking read of an eventfd, which signal handlers interrupt.

    Args:
        number: how many workers there are.

    Raises:
        OSError: there is no descriptor left.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        # The agent's own read end keeps the pipe from breaking.
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
        """Wait for the other workers; called by a worker that has returned. A signal handler may raise out of it.

        A worker whose function has closed the descriptors does not wait. The agent counts it when it ends.
        """
        try:
            if _file_id(self._arrival_fd) != self._pipe_id:
                return
        except OSError:
            return
        self.arrive()
        os.read(self._release_fd, _COUNTER_BYTES)  # unlike os.eventfd_read, it goes on after a signal

    def arrive(self) -> None:
        """Count one worker as arrived: the caller, or one that has ended with exit code 0 without having returned."""
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
        """Let all workers go, those that wait and those that arrive later."""
        if not self._closed:
            os.eventfd_write(self._release_fd, self._number)

    def close(self) -> None:
        """Release, and let go of the agent's descriptors. Safe to call again."""
        if self._closed:
            return
        self.release()
        self._closed = True
        for fd in (self._read_fd, self._arrival_fd, self._release_fd):
            os.close(fd)


def _file_id(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
