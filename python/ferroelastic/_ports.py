"""Processes that listen on ports of this host, for messages about a port in use."""

from __future__ import annotations

import contextlib
import os
from typing import Any

__all__ = ["NO_OWNER", "port_owner"]

NO_OWNER = "this process or a process of another user"
"""Text for the owner of a port in use if :func:`port_owner` does not find it."""


def port_owner(port: int) -> str:
    """Return the process that listens on a TCP port of this host, as ``pid 123 (python train.py)``.

    Args:
        port: the port.

    Returns:
        The process. Empty if no process listens, if it is this process, or if it belongs to another user.
    """
    import psutil

    pids: set[int | None] = set()
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            local: Any = connection.laddr
            if connection.status == psutil.CONN_LISTEN and local and local.port == port:
                pids.add(connection.pid)
    owners = sorted(pid for pid in pids if pid is not None and pid != os.getpid())
    if not owners:
        return ""
    return ", ".join(f"pid {pid} ({_command_of(pid)})" for pid in owners)


def _command_of(pid: int, length: int = 60) -> str:
    import psutil

    try:
        process = psutil.Process(pid)
        program, *arguments = process.cmdline() or [process.name()]
    except psutil.Error:
        return "?"
    from ferroelastic import _rust

    line = _rust.printable(" ".join(" ".join([program.rpartition("/")[2], *arguments]).split()))
    return line if len(line) <= length else line[: length - 1] + "…"
