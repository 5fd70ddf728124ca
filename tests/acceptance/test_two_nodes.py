"""The example of two nodes on one machine, run as its text says."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from tests.support.harness import ROOT
from tests.support.ports import port_for_one
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from tests.support.harness import Job, Launcher

_WORKER = """
import os, pathlib, sys, time
folder, rank = pathlib.Path(os.environ["DIR"]), os.environ["RANK"]
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"started.{attempt}.{rank}").touch()
os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']}, attempt {attempt}\\n".encode())
if sys.argv[1] == "wait":
    time.sleep(600)
sys.exit(int(sys.argv[1]) if rank == "3" and attempt in sys.argv[2:] else 0)
"""


def start(launch: Launcher, *arguments: str) -> Job:
    programs = launch.folder / "bin"
    programs.mkdir()
    ferrorun = programs / "ferrorun"
    ferrorun.write_text(f'#!/bin/sh\nexec {sys.executable} -m ferroelastic.run "$@"\n')
    ferrorun.chmod(0o755)
    script = [launch.write("train.py", _WORKER)] if arguments else []
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "PORT": str(port_for_one())}
    return launch.start(str(ROOT / "examples" / "two_nodes.sh"), *script, *arguments, env=env)


def test_four_workers_run_in_one_job(launch: Launcher) -> None:
    job = start(launch, "0")
    assert job.end() == 0, job.story
    assert sorted(job.output.decode().splitlines()) == [f"rank {rank} of 4, attempt 0" for rank in range(4)]


def test_all_workers_start_again_after_a_failure(launch: Launcher) -> None:
    job = start(launch, "5", "0")
    assert job.end() == 0, job.story
    assert {path.name for path in launch.folder.glob("started.1.*")} == {f"started.1.{rank}" for rank in range(4)}


def test_the_exit_code_is_that_of_the_failed_worker(launch: Launcher) -> None:
    job = start(launch, "5", "0", "1", "2", "3")
    assert job.end() == 5, job.story


def test_a_script_must_be_given(launch: Launcher) -> None:
    job = start(launch)
    assert job.end() == 2
    assert "two_nodes.sh SCRIPT [ARGUMENT...]" in job.errors


def test_ctrl_c_ends_both_agents(launch: Launcher) -> None:
    job = start(launch, "wait")
    assert eventually(lambda: len(list(launch.folder.glob("started.0.*"))) == 4, LONG_S), job.story
    # The terminal sends SIGINT to the foreground process group: the script and both agents.
    for pid, command in job.processes().items():
        if "ferroelastic.run" in command or pid == job.process.pid:
            os.kill(pid, signal.SIGINT)
    assert job.end() == 128 + signal.SIGINT, job.story
