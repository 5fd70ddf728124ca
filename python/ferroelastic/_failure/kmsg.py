"""New lines of the kernel log: errors of GPUs (Xid) and kills by the OOM killer. Needs ``/dev/kmsg`` to be readable."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from ferroelastic._failure.text import clean, shortened

__all__ = ["KernelLog", "oom_victims", "xid_line"]

_PATH = "/dev/kmsg"
_MAX_RECORDS = 2000
_RECORD_BYTES = 8192  # the longest record of the kernel
_MAX_LINE = 300
# pid and name are missing in the lines of older drivers.
_XID = re.compile(r"NVRM: Xid \(")
_XID_PID = re.compile(r"\bpid='?(\d+)")
_OOM_VICTIM = re.compile(r"(?:[Oo]ut of memory|Memory cgroup out of memory)[^\n]*?: Kill(?:ed)? process (\d+)")


class KernelLog:
    """Reads the lines that the kernel writes after the creation of the object.

    Args:
        path: the log. If it cannot be read, there are no lines.
    """

    def __init__(self, path: str = _PATH) -> None:
        self._descriptor: int | None = None
        with suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the log. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    def lines(self) -> list[str]:
        """Return the texts of the new records. Each record is returned once."""
        found: list[str] = []
        if self._descriptor is None:
            return found
        for _ in range(_MAX_RECORDS):
            try:
                record = os.read(self._descriptor, _RECORD_BYTES)
            except BrokenPipeError:  # records were overwritten before they were read
                continue
            except OSError:  # no further record
                break
            if not record:
                break
            # "priority,number,time,flags;text", then lines with details.
            _, _, text = record.partition(b";")
            found.append(clean(text.partition(b"\n")[0]))
        return found


def xid_line(lines: list[str], pid: int | None) -> str | None:
    """Return the first line about an error of a GPU that names the worker, else the first one that names no process; ``None`` without one.

    Args:
        lines: lines of the kernel log.
        pid: process id of the failed worker.
    """
    unnamed = None
    for line in filter(_XID.search, lines):
        named = _XID_PID.search(line)
        if named is not None and pid is not None and int(named[1]) == pid:
            return shortened(line, _MAX_LINE)
        if named is None and unnamed is None:
            unnamed = shortened(line, _MAX_LINE)
    return unnamed


def oom_victims(lines: list[str]) -> set[int]:
    """Return the process ids, as the host counts them, of the processes that the OOM killer has ended."""
    return {int(match[1]) for line in lines if (match := _OOM_VICTIM.search(line))}
