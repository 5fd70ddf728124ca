"""Resources of the test process: a test that leaves more of them than it found fails."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children() -> dict[int, str]:
    """Processes whose parent is this one, zombies included."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        command, _, fields = stat.rpartition(")")
        if int(fields.split()[1]) == os.getpid():
            found[int(name)] = f"{command}) {fields.split()[0]}"
    return found


def threads() -> dict[int, str]:
    """Python's threads, and the native ones of this package."""
    found = {thread.native_id or 0: thread.name for thread in threading.enumerate()}
    for task in os.listdir("/proc/self/task"):
        try:
            name = Path(f"/proc/self/task/{task}/comm").read_text(encoding="utf-8").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith("ferro"):
            found[int(task)] = name
    return found


def snapshot() -> dict[str, dict[int, str]]:
    return {"descriptors": descriptors(), "children": children(), "threads": threads()}
