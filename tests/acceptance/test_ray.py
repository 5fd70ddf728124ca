"""The example for Ray, on a cluster of two Ray nodes on this machine. It needs the package ray, which `just setup` does not install."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import ROOT
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ray")

_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
_WORKER = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(__file__).parent, os.environ["RANK"]
def save(*_):
    (folder / f"saved.{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / f"started.{rank}.{os.environ['WORLD_SIZE']}").touch()
if sys.argv[1] == "wait":
    time.sleep(600)
sys.exit(int(sys.argv[1]) if rank == "1" else 0)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster that ends with the tests."""
    command = [sys.executable, "-W", "ignore", "-c", _CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdout is not None
        yield cluster.stdout.readline().strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(_WORKER)
    return tmp_path


def start(address: str, folder: Path, argument: str) -> subprocess.Popen[bytes]:
    example = str(ROOT / "examples" / "ray_agents.py")
    command = [sys.executable, "-W", "ignore", example, "--nodes", "2", "--", "--nproc-per-node=1"]
    path = f"{ROOT / 'python'}:{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": path}
    return subprocess.Popen([*command, str(folder / "train.py"), argument], env=env, cwd=folder)


@pytest.mark.parametrize("code", [0, 3])
def test_the_job_has_one_agent_on_each_node(address: str, folder: Path, code: int) -> None:
    with start(address, folder, str(code)) as job:
        assert job.wait(LONG_S) == code
    assert sorted(path.name for path in folder.glob("started.*")) == ["started.0.2", "started.1.2"]


def test_the_script_needs_arguments_of_ferrorun(folder: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "ray_agents.py"), "--nodes", "2"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=LONG_S)
    assert ended.returncode == 2
    assert "the following arguments are required: arguments" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_gives_workers_time_to_save(address: str, folder: Path, number: signal.Signals) -> None:
    with start(address, folder, "wait") as job:
        assert eventually(lambda: len(list(folder.glob("started.*"))) == 2, LONG_S)
        job.send_signal(number)
        assert job.wait(LONG_S) == 128 + signal.SIGTERM
    assert sorted(path.name for path in folder.glob("saved.*")) == ["saved.0", "saved.1"]
