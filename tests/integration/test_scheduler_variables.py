"""Two agents as commands without options of the rendezvous, with the variables of a scheduler."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.waiting import LONG_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SCRIPT = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "FERROELASTIC_JOB_END_S", "NODE")
with open(f"{sys.argv[1]}/{os.environ['NODE']}.{os.environ['LOCAL_RANK']}", "w") as file:
    json.dump({name: os.environ.get(name) for name in names}, file)
"""
_OF_OTHERS = (
    "PET_",
    "TORCHELASTIC_",
    "SLURM",
    "SKYPILOT_",
    "DSTACK_",
    "FLUX_",
    "OMPI_",
    "JOB_COMPLETION",
    "CUDA_",
    "LOGLEVEL",
)

SLURM = {
    # Different numbers of jobs have different ports.
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    # Two names of this machine.
    "SLURM_STEP_NODELIST": "localhost,127.0.0.1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_JOB_END_TIME": "1795900000",
}
SLURM_NODES = [
    {**SLURM, "SLURM_NODEID": "0", "SLURMD_NODENAME": "localhost"},
    {**SLURM, "SLURM_NODEID": "1", "SLURMD_NODENAME": "127.0.0.1"},
]


def started(variables: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OF_OTHERS)}
    return subprocess.Popen(
        [sys.executable, "-m", "ferroelastic.run", *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(nodes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and standard error of each node."""
    try:
        return [(node.returncode, errors) for node in nodes for _, errors in [node.communicate(timeout=LONG_S)]]
    finally:
        for node in nodes:
            node.kill()
            node.wait()


@pytest.mark.parametrize("first", [0, 1], ids=["first node starts first", "first node starts last"])
def test_two_nodes_of_slurm_complete_a_job_without_options(tmp_path: Path, first: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    order = [first, 1 - first]
    nodes = [started({**SLURM_NODES[node], "NODE": str(node)}, str(script), str(tmp_path)) for node in order]
    outcomes = dict(zip(order, ended(nodes), strict=True))

    assert [code for code, _ in outcomes.values()] == [0, 0], outcomes
    seen = {name: json.loads((tmp_path / name).read_text()) for name in ("0.0", "0.1", "1.0", "1.1")}
    # The nodes have the ranks of Slurm, whichever comes first.
    assert {name: one["GROUP_RANK"] for name, one in seen.items()} == {"0.0": "0", "0.1": "0", "1.0": "1", "1.1": "1"}
    assert sorted(one["RANK"] for one in seen.values()) == ["0", "1", "2", "3"]
    assert {one["WORLD_SIZE"] for one in seen.values()} == {"4"}
    assert {one["TORCHELASTIC_RUN_ID"] for one in seen.values()} == {f"{SLURM['SLURM_JOB_ID']}.3"}
    assert {one["FERROELASTIC_JOB_END_S"] for one in seen.values()} == {"1795900000"}
    assert "Slurm: --nnodes=2 (SLURM_STEP_NUM_NODES), node rank 0 (SLURM_NODEID), " in outcomes[0][1]
    assert outcomes[1][1] == ""


def test_a_shell_of_an_allocation_waits_for_no_other_node(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    shell = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NODEID": "0",
        "SLURMD_NODENAME": "n1",
        "NODE": "0",
    }
    ((code, errors),) = ended([started(shell, str(script), str(tmp_path))])
    assert code == 0
    assert json.loads((tmp_path / "0.0").read_text())["WORLD_SIZE"] == "1"
    assert "job 7 has 2 nodes (SLURM_JOB_NUM_NODES), but this process is not in a step of it" in errors
    assert "ferrorun runs on this node alone" in errors


def test_a_ferrorun_that_a_worker_starts_is_a_job_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    inner = f"{shlex.quote(sys.executable)} -m ferroelastic.run {script} {tmp_path}; exit $$?"
    outer = {**SLURM_NODES[1], "NODE": "1"}
    ((code, errors),) = ended([started(outer, "--standalone", "--no-python", "/bin/sh", "-c", inner)])
    assert (code, errors) == (0, "")
    assert json.loads((tmp_path / "1.0").read_text())["WORLD_SIZE"] == "1"


def test_several_tasks_of_a_node_are_a_usage_error() -> None:
    task = {**SLURM_NODES[0], "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    ((code, errors),) = ended([started(task, "--no-python", "/bin/true")])
    assert code == 2
    assert errors.startswith("ferrorun: error: SLURM_STEP_TASKS_PER_NODE=2(x2) starts 2 agents on one node")
    assert errors.count("\n") == 1


def test_no_scheduler_runs_on_this_node(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    ((code, errors),) = ended([started({**SLURM_NODES[1], "NODE": "1"}, "--no-scheduler", str(script), str(tmp_path))])
    assert (code, errors) == (0, "")
    assert json.loads((tmp_path / "1.0").read_text())["WORLD_SIZE"] == "1"
