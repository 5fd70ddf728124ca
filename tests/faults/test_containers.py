"""The statements of docs/recipes/containers.md, in a pid namespace with a ``/dev/shm`` of its own: ``ferrorun`` is process 1."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import FERRORUN
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from tests.support.harness import Job, Launcher

_SHM_KB = 256
_CONTAINER = ("unshare", "--pid", "--mount", "--fork", "--mount-proc")
_ENTRYPOINT = f'mount -t tmpfs -o size={_SHM_KB}k tmpfs /dev/shm && exec "$@"'

_SAVES = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["DIR"])
def save(*_):
    (folder / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "started").touch()
time.sleep(600)
"""
_SHARES = """
import mmap, os, sys
fd = os.open("/dev/shm/batch", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, int(sys.argv[1]) * 1024)
memory = mmap.mmap(fd, 0)
for at in range(0, len(memory), mmap.PAGESIZE):
    memory[at] = 1
"""
_DETACHES = """
import os, pathlib, time
folder = pathlib.Path(os.environ["DIR"])
if os.fork() == 0:
    os.setsid()
    (folder / "detached").touch()
    time.sleep(600)
while not (folder / "detached").exists():
    time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if os.geteuid() != 0 or subprocess.run([*_CONTAINER, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no pid and mount namespace to be had")


def start(launch: Launcher, script: str, *arguments: str, options: tuple[str, ...] = ()) -> Job:
    agent = (*FERRORUN, "--standalone", "--nproc-per-node=1", *options, launch.write("train.py", script), *arguments)
    return launch.start(*_CONTAINER, "sh", "-c", _ENTRYPOINT, "sh", *agent)


def first_process(job: Job) -> int:
    """Process 1 of the container, by its number outside."""
    pid = job.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def test_sigterm_to_process_1_gives_workers_time_to_save(launch: Launcher) -> None:
    job = start(launch, _SAVES)
    assert eventually((launch.folder / "started").exists, LONG_S), job.story
    os.kill(first_process(job), signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM, job.story
    assert (launch.folder / "saved").exists()


def test_the_exit_code_of_the_container_is_that_of_the_worker(launch: Launcher) -> None:
    job = start(launch, "raise SystemExit(7)")
    assert job.end() == 7, job.story


def test_all_processes_end_with_process_1(launch: Launcher) -> None:
    job = start(launch, _SAVES)
    assert eventually((launch.folder / "started").exists, LONG_S), job.story
    os.kill(first_process(job), signal.SIGKILL)
    job.end()
    assert eventually(lambda: not job.processes()), job.story
    assert not (launch.folder / "saved").exists()


def test_a_detached_process_ends_with_the_container_after_a_success(launch: Launcher) -> None:
    job = start(launch, _DETACHES)
    assert job.end() == 0, job.story
    assert eventually(lambda: not job.processes()), job.story
    assert "end with the container: " in job.errors
    assert "keep running" not in job.errors


def test_a_batch_that_fits_into_dev_shm_is_shared(launch: Launcher) -> None:
    job = start(launch, _SHARES, str(_SHM_KB // 2))
    assert job.end() == 0, job.story


def test_a_full_dev_shm_ends_the_worker_with_sigbus(launch: Launcher) -> None:
    job = start(launch, _SHARES, str(_SHM_KB * 2))
    assert job.end() == 128 + signal.SIGBUS, job.story
    assert "SIGBUS" in job.errors


@pytest.mark.parametrize("options", [(), ("--warm-workers",)], ids=["cold", "warm"])
def test_workers_start_again_in_a_container(launch: Launcher, options: tuple[str, ...]) -> None:
    fails_once = "import os; raise SystemExit(3 if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else 0)"
    job = start(launch, fails_once, options=("--max-restarts=1", *options))
    assert job.end() == 0, job.story
