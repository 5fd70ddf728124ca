"""A signal may come between any two instructions of the agent, and its workers still get their grace period."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.harness import Launcher

WORKER = """
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
folder = os.environ["DIR"]
open(folder + "/ready", "w").close()
signal.sigwait([signal.SIGINT, signal.SIGTERM])
time.sleep(0.1)
open(folder + "/saved", "w").close()
"""

# The last instructions of a start: it returns the running workers, and the agent assigns them to an attribute.
START = "_start_workers,start_processes"
START_INSTRUCTIONS = range(1, 8)
# The first instructions of the final stop.
STOP = "shut_down"
STOP_INSTRUCTIONS = range(1, 6)

FAILING_WORKER = """
import os
open(os.environ["DIR"] + "/ready", "w").close()
os._exit(3)
"""
# The first instruction after the decision to restart.
RESTART = "_restart_workers"


def interrupted(launch: Launcher, worker: str, functions: str, instruction: int = 1, **env: str) -> int:
    """Run a job with one worker and one restart, whose agent gets SIGINT before an instruction; the exit code."""
    command = (sys.executable, "-m", "tests.faults.interrupting", "--rdzv-backend=alone", "--nproc-per-node=1")
    env = {"FUNCTIONS": functions, "INSTRUCTION": str(instruction), **env}
    job = launch.start(*command, "--max-restarts=1", *launch.python(worker), env=env)
    code = job.end()
    assert launch.read("place"), job.story
    assert (launch.folder / "saved").exists() == (worker == WORKER), f"{launch.read('place')}: {job.story}"
    return code


@pytest.mark.parametrize("instruction", START_INSTRUCTIONS)
def test_signal_while_the_start_returns(launch: Launcher, instruction: int) -> None:
    """The workers run, and the caller of the start does not have them yet."""
    assert interrupted(launch, WORKER, START, instruction) == 130


@pytest.mark.parametrize("instruction", STOP_INSTRUCTIONS)
def test_signal_while_the_stop_begins(launch: Launcher, instruction: int) -> None:
    """Another error ends the agent, and the signal comes before the stop of the workers has begun."""
    assert interrupted(launch, WORKER, STOP, instruction, IS_BROKEN="1") == 1


def test_signal_after_the_decision_to_restart(launch: Launcher) -> None:
    """No restart is left, because the last one has just begun. The signal ends the job, and the failure does not."""
    assert interrupted(launch, FAILING_WORKER, RESTART) == 130
