"""Reads the error file of a worker. The worker may have left anything at its path."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

__all__ = ["MAX_BYTES", "read_error_file"]

MAX_BYTES = 1 << 20
_ROOT = 0


def read_error_file(path: str) -> tuple[dict[str, Any] | None, str]:
    """Return the content of an error file, and why it cannot be used. The second value is empty if it can, or if there is no file.

    The call never blocks on a FIFO, reads at most 1 MiB, and does not trust a file that a third user owns.

    Args:
        path: path of the file.
    """
    if path in ("", os.devnull):
        return None, ""
    try:
        # O_NONBLOCK: the open of a FIFO waits for a writer. O_NOCTTY: a terminal must not become the agent's.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, "it is a link to a file that does not exist" if os.path.islink(path) else ""
    except (OSError, ValueError) as error:
        return None, getattr(error, "strerror", None) or str(error)
    try:
        return _read(descriptor)
    except OSError as error:
        return None, error.strerror or str(error)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> tuple[dict[str, Any] | None, str]:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return None, "it is not a regular file"
    if status.st_uid not in (os.geteuid(), _ROOT) and os.geteuid() != _ROOT:
        return None, f"it belongs to another user (uid {status.st_uid})"
    content = b""
    while len(content) <= MAX_BYTES and (part := os.read(descriptor, MAX_BYTES + 1 - len(content))):
        content += part
    if len(content) > MAX_BYTES:
        return None, f"it has more than {MAX_BYTES} bytes"
    return _parse(content)


def _parse(content: bytes) -> tuple[dict[str, Any] | None, str]:
    if not content:
        return None, "it is empty"
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:  # the process may have ended during the write
        return None, str(error)
    message: Any = data.get("message") if isinstance(data, dict) else None
    return (data, "") if isinstance(message, str | dict) else (None, "it has no message")
