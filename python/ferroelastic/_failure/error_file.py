"""Reads the error file of a worker. The worker may have left anything at its path."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

__all__ = ["MAX_BYTES", "read_error_file", "read_json"]

MAX_BYTES = 1 << 20
_ROOT = 0


def read_error_file(path: str) -> tuple[dict[str, Any] | None, str]:
    """Return the content of an error file, or ``None`` and the reason why the file cannot be used. The reason is empty if there is no file.

    Args:
        path: path of the file.
    """
    try:
        data = read_json(path)
    except FileNotFoundError:
        return None, "it is a link to a file that does not exist" if os.path.islink(path) else ""
    except OSError as error:
        return None, error.strerror or str(error)
    except (ValueError, RecursionError) as error:  # the process may have ended during the write
        return None, str(error)
    message: Any = data.get("message") if isinstance(data, dict) else None
    return (data, "") if isinstance(message, str | dict) else (None, "it has no message")


def read_json(path: str) -> Any:
    """Return the content of a file of JSON that a worker has written.

    The call never blocks on a FIFO, reads at most 1 MiB, and does not trust a file that a third user owns.

    Args:
        path: path of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file contains no valid JSON, is too long, is not a regular file or belongs to another user.
        RecursionError: the JSON is nested too deeply.
    """
    if path == os.devnull:
        raise FileNotFoundError(path)
    # O_NONBLOCK: the open of a FIFO waits for a writer. O_NOCTTY: a terminal must not become the agent's.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return json.loads(_content(descriptor))
    finally:
        os.close(descriptor)


def _content(descriptor: int) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_uid not in (os.geteuid(), _ROOT) and os.geteuid() != _ROOT:
        raise ValueError(f"it belongs to another user (uid {status.st_uid})")
    content = b""
    while len(content) <= MAX_BYTES and (part := os.read(descriptor, MAX_BYTES + 1 - len(content))):
        content += part
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    if not content:
        raise ValueError("it is empty")
    return content
