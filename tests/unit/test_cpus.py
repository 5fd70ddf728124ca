"""The number of CPUs, on fake control groups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ferroelastic._cpus import cpu_count

if TYPE_CHECKING:
    from pathlib import Path

CPUS = 16


@pytest.fixture(autouse=True)
def _affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CPUS)))


def root_with(folder: Path, cgroup: str, limits: dict[str, str]) -> Path:
    for path, text in {
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": text for name, text in limits.items()},
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


V1 = "4:memory:/job\n3:cpu,cpuacct:/job/task\n1:name=systemd:/job\n0::/job\n"


@pytest.mark.parametrize(
    ("cgroup", "limits", "count"),
    [
        ("0::/\n", {}, CPUS),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, CPUS),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, CPUS),
        ("0::/\n", {"cpu.max": "nonsense\n"}, CPUS),
        ("0::/job/task\n", {"job/cpu.max": "300000 100000\n", "job/task/cpu.max": "max 100000\n"}, 3),
        ("0::/job/task\n", {"job/cpu.max": "max 100000\n", "job/task/cpu.max": "500000 100000\n"}, 5),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            V1,
            {"cpu,cpuacct/job/task/cpu.cfs_quota_us": "700000\n", "cpu,cpuacct/job/task/cpu.cfs_period_us": "100000\n"},
            7,
        ),
        (V1, {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, CPUS),
        (V1, {"memory/job/cpu.cfs_quota_us": "100000\n", "memory/job/cpu.cfs_period_us": "100000\n"}, CPUS),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, cgroup: str, limits: dict[str, str], count: int) -> None:
    assert cpu_count({}, root_with(tmp_path, cgroup, limits)) == count


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert cpu_count({}, tmp_path) == CPUS


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({"SLURM_CPUS_ON_NODE": "6", "SLURMD_NODENAME": "n1"}, 6),
        ({"SLURM_CPUS_ON_NODE": "64", "SLURMD_NODENAME": "n1"}, CPUS),
        ({"SLURM_CPUS_ON_NODE": "6"}, CPUS),
        ({"SLURMD_NODENAME": "n1"}, CPUS),
    ],
)
def test_the_cpus_of_a_slurm_job_count_on_its_nodes(tmp_path: Path, environ: dict[str, str], count: int) -> None:
    assert cpu_count(environ, tmp_path) == count


def test_a_count_of_slurm_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SLURM_CPUS_ON_NODE='6\(x2\)' is not a whole number"):
        cpu_count({"SLURM_CPUS_ON_NODE": "6(x2)", "SLURMD_NODENAME": "n1"}, tmp_path)
