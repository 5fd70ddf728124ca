"""Counts the CPUs that this process may use: its affinity, the limits of its control groups, and the CPUs of a Slurm job on this node."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["cpu_count"]


def cpu_count(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> int:
    """Return the number of CPUs that this process may use. At least 1.

    Args:
        environ: environment with the variables of Slurm. ``None`` uses the environment of this process.
        root: folder that holds ``proc`` and ``sys``.

    Raises:
        ValueError: ``SLURM_CPUS_ON_NODE`` is not a number.
    """
    environ = os.environ if environ is None else environ
    # The kernel applies a cpuset to the affinity.
    counts = [len(os.sched_getaffinity(0)), *map(int, _quotas(root))]
    # Only slurmd sets the node's name: a login node has no CPUs of the job.
    of_job = environ.get("SLURM_CPUS_ON_NODE") if environ.get("SLURMD_NODENAME") else None
    if of_job:
        if not of_job.isdecimal():
            raise ValueError(f"SLURM_CPUS_ON_NODE={of_job!r} is not a whole number; unset it, or give --nproc-per-node")
        counts.append(int(of_job))
    return max(1, min(counts))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU limit of each control group that holds this process, for version 2 and version 1 of control groups."""
    for group in _groups(root):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)  # "max" sets no limit
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota = (group / "cpu.cfs_quota_us").read_text()
            if int(quota) > 0:  # -1 sets no limit
                yield int(quota) / int((group / "cpu.cfs_period_us").read_text())


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups with a CPU controller that hold this process, from the innermost to the outermost.

    In a container, a path may be that of the host. Its folders do not exist there, and the outermost folder is the container's own group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has no name of controllers.
        mount = mounts / controllers if controllers else mounts
        group = mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))
