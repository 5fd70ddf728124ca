"""TorchX finds the component ``ferro.ddp`` by its entry point, and runs jobs with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import ROOT
from tests.support.ports import free_port
from tests.support.waiting import LONG_S

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchx")

_WORKER = """
import os, sys
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"rank {rank} of {os.environ['WORLD_SIZE']}, attempt {attempt}: {' '.join(sys.argv[1:])}", flush=True)
sys.exit(3 if (rank, attempt) == ("1", "0") and "fails" in sys.argv else 0)
"""
_DEFINITIONS = """
import dataclasses, json
from torchx.specs.finder import get_component
arguments = dict(script="train.py", j="2:4x8", env={"A": "b"}, h=None, gpu=8, max_retries=1, tee=1, rdzv_port=29400)
definitions = [get_component(name).fn("--lr", "a b", **arguments) for name in ("ferro.ddp", "dist.ddp")]
print(json.dumps([dataclasses.asdict(one) for one in definitions], default=str))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(_WORKER)
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'python'}:{os.environ.get('PYTHONPATH', '')}",
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONG_S, check=False
    )


def torchx(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "torchx.cli.main", *arguments)


def run_locally(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return torchx(folder, "run", "-s", "local_cwd", "ferro.ddp", f"--rdzv_port={free_port()}", *arguments)


def test_the_component_is_listed_beside_those_of_torchx(folder: Path) -> None:
    listed = torchx(folder, "builtins").stdout.split()
    assert {"ferro.ddp", "dist.ddp", "utils.python"} <= set(listed)


def test_the_definition_is_that_of_dist_ddp_with_another_launcher(folder: Path) -> None:
    ours, of_torchx = json.loads(python(folder, "-c", _DEFINITIONS).stdout)
    (role,) = ours["roles"]
    assert role["args"][1].startswith("exec ferrorun --max_restarts 0 --rdzv_backend c10d ")
    role["args"][1] = role["args"][1].replace("exec ferrorun --max_restarts 0", "torchrun")
    assert ours == of_torchx


def test_two_agents_run_one_job(folder: Path) -> None:
    ended = run_locally(folder, "-j", "2x2", "--script", "train.py", "--", "--lr", "a b")
    assert ended.returncode == 0, ended.stderr
    for rank in range(4):
        assert f"rank {rank} of 4, attempt 0: --lr a b\n" in ended.stderr


def test_a_module_runs(folder: Path) -> None:
    ended = run_locally(folder, "-j", "1", "-m", "train", "--", "word")
    assert ended.returncode == 0, ended.stderr
    assert "rank 0 of 1, attempt 0: word\n" in ended.stderr


def test_workers_start_again_as_often_as_requested(folder: Path) -> None:
    ended = run_locally(folder, "-j", "2", "--max_restarts", "1", "--script", "train.py", "fails")
    assert ended.returncode == 0, ended.stderr
    assert "rank 1 of 2, attempt 1: fails\n" in ended.stderr


def test_a_failure_of_a_worker_fails_the_job(folder: Path) -> None:
    ended = run_locally(folder, "-j", "2x1", "--script", "train.py", "fails")
    assert ended.returncode == 1
    assert "Job finished: FAILED" in ended.stderr
    assert "exitcode  : 3" in ended.stderr


def test_variables_are_options_of_ferrorun(folder: Path) -> None:
    ended = run_locally(folder, "-j", "2", "--env", "PET_LOCAL_RANKS_FILTER=1", "--script", "train.py")
    assert ended.returncode == 0, ended.stderr
    assert "rank 1 of 2" in ended.stderr
    assert "rank 0 of 2" not in ended.stderr


def test_a_batch_script_for_slurm_starts_one_agent_per_node(folder: Path) -> None:
    ended = torchx(folder, "run", "-s", "slurm", "--dryrun", "ferro.ddp", "-j", "2x8", "--script", "train.py")
    assert ended.returncode == 0, ended.stderr
    _, _, script = ended.stdout.partition("SBATCH_SCRIPT\n#---")
    assert script.count("bash -c 'exec ferrorun --max_restarts 0 --rdzv_backend c10d") == 2
    assert script.count("--nnodes 2 --nproc_per_node 8") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-j", "2x2"), "--script is None and -m is None. Give one of them"),
        (("--script", "train.py", "-m", "train"), "--script is 'train.py' and -m is 'train'. Give one of them"),
        (("-j", "2xx2", "--script", "train.py"), "-j is '2xx2'. Give WORKERS, NODESxWORKERS or MIN:MAXxWORKERS"),
        (("-j", "2x", "--script", "train.py"), "-j is '2x'. Give WORKERS, NODESxWORKERS or MIN:MAXxWORKERS"),
        (("-j", "0x2", "--script", "train.py"), "-j is '0x2'. Each number must be at least 1"),
        (("-j", "0:2x2", "--script", "train.py"), "-j is '0:2x2'. Each number must be at least 1"),
        (("-j", "2x0", "--script", "train.py"), "-j is '2x0'. Each number must be at least 1"),
        (("-j", "4:2x2", "--script", "train.py"), "the minimum of nodes at most the maximum"),
        (("--max_restarts", "-1", "--script", "train.py"), "--max_restarts is -1. Give 0 or a positive number"),
    ],
)
def test_bad_input_is_one_message(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    ended = run_locally(folder, *arguments)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_script_that_is_missing_is_named(folder: Path) -> None:
    ended = run_locally(folder, "-j", "1", "--script", "missing.py")
    assert ended.returncode == 1
    assert "missing.py" in ended.stderr
