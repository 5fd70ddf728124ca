"""The core file of a worker: where the kernel has put it, and the sender of the fatal signal that it records."""

from __future__ import annotations

import os
import re
import struct

__all__ = ["CoreFile", "find_core", "signal_origin"]

_SPECIFIER = re.compile(r"%(.)")
_SEARCHED_BEFORE_S = 120
_MAX_ENTRIES = 10_000
_MAX_NOTES = 1 << 20
_MAX_HEADERS = 64
_ELF_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_PT_NOTE = 4
_NT_SIGINFO = 0x53494749
_SI_USER, _SI_QUEUE, _SI_TKILL = 0, -1, -6


class CoreFile:
    """Where the core of a process is.

    Attributes:
        text: its path, or the way to it, for the report.
        path: its path; ``None`` if a program has received the core, or the file was not found.
    """

    def __init__(self, text: str, path: str | None = None) -> None:
        self.text = text
        self.path = path


def find_core(pid: int, died_at_s: float, folder: str, root: str = "/") -> CoreFile:
    """Return where the core of a process is. Call this only if the kernel has reported that it wrote one.

    Args:
        pid: process id.
        died_at_s: time of the end of the process in seconds since the epoch.
        folder: working directory in which the process was started.
        root: root of the file system, for tests.
    """
    pattern = _line(os.path.join(root, "proc/sys/kernel/core_pattern")) or "core"
    if pattern.startswith("|"):
        program = pattern[1:].split()[0] if pattern[1:].split() else "a program"
        name = os.path.basename(program)
        if name == "systemd-coredump":
            return CoreFile(f"in the journal of systemd: coredumpctl info {pid}")
        return CoreFile(f"given to {program} (kernel.core_pattern)")
    if pattern.startswith("@"):
        return CoreFile(f"sent to the socket {pattern.lstrip('@')} (kernel.core_pattern)")
    if (
        "%p" not in pattern
        and "%P" not in pattern
        and _line(os.path.join(root, "proc/sys/kernel/core_uses_pid")) == "1"
    ):
        pattern += ".%p"
    place = os.path.join(folder, pattern)
    found = _newest(place, pid, died_at_s)
    return CoreFile(f"not found; kernel.core_pattern is {pattern!r}") if found is None else CoreFile(found, found)


def _newest(place: str, pid: int, died_at_s: float) -> str | None:
    """Return the newest file that the pattern describes. Names of threads, times and numbers in it may be any text."""
    directory, name = os.path.split(place)
    if "%" in directory:
        return None
    known = {"p": re.escape(str(pid)), "%": "%", "u": str(os.getuid()), "g": str(os.getgid())}
    parts = _SPECIFIER.split(name)
    # Texts and specifiers alternate.
    pattern = "".join(known.get(part, "[^/]*") if index % 2 else re.escape(part) for index, part in enumerate(parts))
    newest: tuple[float, str] | None = None
    try:
        with os.scandir(directory) as entries:
            for number, entry in enumerate(entries):
                if number == _MAX_ENTRIES:
                    break
                if re.fullmatch(pattern, entry.name) is None or not entry.is_file(follow_symlinks=False):
                    continue
                written = entry.stat(follow_symlinks=False).st_mtime
                if written >= died_at_s - _SEARCHED_BEFORE_S and (newest is None or written > newest[0]):
                    newest = (written, entry.path)
    except OSError:
        return None
    return None if newest is None else newest[1]


def _line(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.readline().rstrip("\n")
    except OSError:
        return ""


def signal_origin(path: str) -> tuple[int, int] | None:
    """Return pid and uid of the process that sent the fatal signal; ``None`` if a fault raised it, or the core does not record it.

    Args:
        path: a core file of a 64-bit, little-endian process.
    """
    try:
        with open(path, "rb") as file:
            return _origin(file.read(1 << 16), file)
    except (OSError, struct.error, ValueError):
        return None


def _origin(head: bytes, file: object) -> tuple[int, int] | None:
    if head[:6] != _ELF_MAGIC:
        return None
    (headers_at,) = struct.unpack_from("<Q", head, 32)
    size, number = struct.unpack_from("<HH", head, 54)
    for index in range(min(number, _MAX_HEADERS)):
        kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", head, headers_at + index * size)
        if kind == _PT_NOTE:
            file.seek(at)  # type: ignore[attr-defined]
            return _sender_in(file.read(min(length, _MAX_NOTES)))  # type: ignore[attr-defined]
    return None


def _sender_in(notes: bytes) -> tuple[int, int] | None:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        content = at + 12 + (name_size + 3) // 4 * 4
        if kind == _NT_SIGINFO:
            _, _, code = struct.unpack_from("<iii", notes, content)
            pid, uid = struct.unpack_from("<iI", notes, content + 16)
            return (pid, uid) if code in (_SI_USER, _SI_QUEUE, _SI_TKILL) else None
        at = content + (size + 3) // 4 * 4
    return None
