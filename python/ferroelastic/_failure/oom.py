"""The kernel's counters of processes that its OOM killer has ended: of the workers' cgroup, v1 or v2, and of the host."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

__all__ = ["MemoryCgroup", "OomCounts", "OomKill", "count", "find_cgroup", "kills_between"]

_UNLIMITED = 1 << 60  # v1 shows the largest page-aligned number
_MAX_BYTES = 1 << 16


class MemoryCgroup(NamedTuple):
    """The memory cgroup of the workers.

    Attributes:
        folder: its folder.
        top: the folder of the hierarchy that this process can see. Limits are searched up to it.
        version: version of the interface.
    """

    folder: str
    top: str
    version: Literal[1, 2]


class OomCounts(NamedTuple):
    """Counters at one moment. ``None`` is a counter that cannot be read.

    Attributes:
        cgroup: processes of the cgroup and its descendants that an OOM killer has ended.
        limit_reached: how often the limit of the cgroup or of an ancestor has called the OOM killer.
        host: processes of the host that an OOM killer has ended.
    """

    cgroup: int | None = None
    limit_reached: int | None = None
    host: int | None = None


class OomKill(NamedTuple):
    """Kills by the OOM killer between two moments.

    Attributes:
        number: number of killed processes.
        scope: whose limit was reached.
        limit_bytes: this limit.
        peak_bytes: peak memory of the cgroup with the limit.
        is_of_workers: whether the killed processes belonged to the cgroup of the workers. If not, they may be any process of the host.
    """

    number: int
    scope: Literal["cgroup", "host"]
    limit_bytes: int | None
    peak_bytes: int | None
    is_of_workers: bool


def find_cgroup(pid: int | str = "self", root: str = "/") -> MemoryCgroup | None:
    """Return the memory cgroup of a process; ``None`` if it cannot be found.

    Args:
        pid: process id.
        root: root of the file system, for tests.
    """
    paths = _paths_of(_text(os.path.join(root, f"proc/{pid}/cgroup")))
    mounts = _mounts(_text(os.path.join(root, "proc/self/mountinfo")))
    for kind, version in (("memory", 1), ("", 2)):
        if kind not in paths or kind not in mounts:
            continue
        inside, mount_point = mounts[kind]
        top = os.path.join(root, mount_point.lstrip("/"))
        path = paths[kind]
        # In a container the mount may begin below the root of the hierarchy, and the path may lie outside of it.
        relative = path[len(inside) :] if inside != "/" and path.startswith(inside) else path
        folder = os.path.join(top, relative.strip("/")) if not relative.startswith("/..") else top
        if not os.path.isdir(folder):
            folder = top
        names = ("memory.events",) if version == 2 else ("memory.oom_control",)  # noqa: PLR2004 - the version
        while folder != top and not os.path.exists(os.path.join(folder, names[0])):
            folder = os.path.dirname(folder)  # the controller is not enabled in this folder
        if os.path.exists(os.path.join(folder, names[0])):
            return MemoryCgroup(folder.rstrip("/"), top.rstrip("/"), 1 if version == 1 else 2)
    return None


def count(cgroup: MemoryCgroup | None, root: str = "/") -> OomCounts:
    """Return the counters of now.

    Args:
        cgroup: the cgroup of the workers, ``None`` if it is not known.
        root: root of the file system, for tests.
    """
    host = _fields(_text(os.path.join(root, "proc/vmstat"))).get("oom_kill")
    if cgroup is None:
        return OomCounts(host=host)
    if cgroup.version == 1:
        return OomCounts(_fields(_text(f"{cgroup.folder}/memory.oom_control")).get("oom_kill"), None, host)
    events = _fields(_text(f"{cgroup.folder}/memory.events"))
    # `oom` of an ancestor counts the limits of the folders below it too, so the topmost one has all.
    reached = [_fields(_text(f"{folder}/memory.events")).get("oom") for folder in _folders(cgroup)]
    known = [number for number in reached if number is not None]
    return OomCounts(events.get("oom_kill"), known[-1] if known else None, host)


def kills_between(before: OomCounts, after: OomCounts, cgroup: MemoryCgroup | None, root: str = "/") -> OomKill | None:
    """Return the kills between two moments; ``None`` if no counter has risen.

    Args:
        before: counters of the first moment.
        after: counters of the second moment.
        cgroup: the cgroup of the workers.
        root: root of the file system, for tests.
    """
    if before.cgroup is not None and after.cgroup is not None and cgroup is not None:
        number = after.cgroup - before.cgroup
        if number <= 0:
            return None
        limit, peak = limit_of(cgroup)
        # v2 counts the kills of the host's OOM killer too, but not as a limit that was reached.
        is_host = after.limit_reached is not None and after.limit_reached == before.limit_reached
        if limit is None or is_host:
            return OomKill(number, "host", _host_bytes(root), None, is_of_workers=True)
        return OomKill(number, "cgroup", limit, peak, is_of_workers=True)
    if before.host is not None and after.host is not None and after.host > before.host:
        return OomKill(after.host - before.host, "host", _host_bytes(root), None, is_of_workers=False)
    return None


def limit_of(cgroup: MemoryCgroup) -> tuple[int | None, int | None]:
    """Return the smallest memory limit of a cgroup and its ancestors, and the peak of the cgroup that has it, in bytes."""
    names = (
        ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if cgroup.version == 1 else ("memory.max", "memory.peak")
    )
    found: tuple[int | None, int | None] = (None, None)
    for folder in _folders(cgroup):
        limit = _number(f"{folder}/{names[0]}")
        if limit is not None and limit < _UNLIMITED and (found[0] is None or limit < found[0]):
            found = (limit, _number(f"{folder}/{names[1]}"))
    return found


def _folders(cgroup: MemoryCgroup) -> list[str]:
    """Return the folder of a cgroup and those of its ancestors."""
    folders = [cgroup.folder]
    while folders[-1] != cgroup.top and folders[-1].startswith(cgroup.top + "/"):
        folders.append(os.path.dirname(folders[-1]))
    return folders


def _paths_of(text: str) -> dict[str, str]:
    """Return the paths in ``/proc/PID/cgroup``: of v2 for the key ``""``, of v1 for each controller."""
    paths = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _mounts(text: str) -> dict[str, tuple[str, str]]:
    """Return root and mount point of the hierarchies in ``/proc/PID/mountinfo``: v2 for the key ``""``, v1's ``memory``."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        place, kind = before.split(" "), after.split(" ")
        if len(place) < 5 or not kind[0].startswith("cgroup"):  # noqa: PLR2004 - number of fields
            continue
        if kind[0] == "cgroup2":
            mounts.setdefault("", (place[3], place[4]))
        elif "memory" in kind[-1].split(","):
            mounts.setdefault("memory", (place[3], place[4]))
    return mounts


def _host_bytes(root: str) -> int | None:
    for line in _text(os.path.join(root, "proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _fields(text: str) -> dict[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}  # noqa: PLR2004 - a pair


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return (file.read(_MAX_BYTES) or b"").decode(errors="replace")
    except OSError:
        return ""
