"""Reads the end of a worker's log file."""

from __future__ import annotations

import os
import stat

__all__ = ["MAX_BYTES", "read_end"]

MAX_BYTES = 1 << 16


def read_end(path: str) -> bytes:
    """Return the last 64 KiB of a regular file; ``b""`` for another kind of file, or if it cannot be read.

    Args:
        path: path of the file; ``""`` for a stream that is not redirected.
    """
    if not path:
        return b""
    try:
        # O_NONBLOCK: the open of a FIFO waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return b""
        return os.pread(descriptor, MAX_BYTES, max(0, status.st_size - MAX_BYTES))
    except OSError:
        return b""
    finally:
        os.close(descriptor)
