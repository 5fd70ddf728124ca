"""Jobs on a real Slurm, with one agent on each node of a cluster on this machine: ``srun ferrorun train.py``.

The batch scripts of the documentation are in ``tests/docs/test_slurm_recipes.py``.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import FERRORUN, ROOT, Job, Launcher
from tests.support.slurm import NODES, Batch, Cluster, slurm
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["slurm"]

EXAMPLE = str(ROOT / "examples" / "train.py")
ENDED_BY_SIGTERM = 128 + signal.SIGTERM

# Rank 1 kills itself once, when all ranks of the round have begun.
COME_BACK = """
import os, select, signal
rank, size, attempt = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
def begun(number):
    return f"{os.environ['DIR']}/begun.{attempt}.{number}"
open(begun(rank), "w").close()
while not all(os.path.exists(begun(number)) for number in range(int(size))):
    select.select([], [], [], 0.01)
if attempt == "0":
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    select.select([], [], [])
os.write(1, f"{rank} of {size} in attempt {attempt}\\n".encode())
"""

# Saves for some hundred milliseconds on the signal $SAVE_ON, and ends. Other signals have no effect.
SAVE = """
import os, signal, time
rank, signals = os.environ["RANK"], {signal.SIGTERM, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
os.write(1, f"{rank} is ready\\n".encode())
while signal.sigwait(signals) != signal.Signals[os.environ["SAVE_ON"]]:
    pass
time.sleep(0.4)
open(f"{os.environ['DIR']}/saved.{rank}", "w").close()
"""
ALL_SAVED = {f"saved.{rank}" for rank in range(4)}

FAIL = """
import os, select, sys
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), int(os.environ["NUMBER"])) if "NUMBER" in os.environ else sys.exit(int(os.environ["CODE"]))
select.select([], [], [])
"""

# bash handles a signal while it waits, and the wait is over then.
FORWARDING = """
    #!/bin/bash
    trap 'kill -USR1 $step' USR1
    srun {command} &
    step=$!
    while wait $step; code=$?; kill -0 $step 2> /dev/null; do :; done
    exit $code
"""


def ferrorun(*arguments: str) -> tuple[str, ...]:
    return (*FERRORUN, *arguments)


def srun(launch: Launcher, cluster: Cluster, *command: str, **env: str) -> Job:
    return launch.start("srun", *command, env={**cluster.environment, **env})


def saved(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("saved.*")}


READY = [f"{rank} is ready" for rank in range(4)]


@pytest.mark.parametrize("nodes", [2, 4])
def test_all_nodes_come_back_after_a_failure(launch: Launcher, slurm: Cluster, nodes: int) -> None:
    command = ferrorun("--max-restarts=1", launch.write("train.py", COME_BACK))
    job = srun(launch, slurm, f"--nodes={nodes}", *command)
    assert job.end() == 0, job.story
    assert sorted(job.output.decode().splitlines()) == [f"{rank} of {nodes} in attempt 1" for rank in range(nodes)]


def test_a_training_on_two_nodes_comes_back_after_a_failure(launch: Launcher, slurm: Cluster) -> None:
    pytest.importorskip("torch")
    kill = ("--kill-rank=1", "--kill-step=35", f"--checkpoint={launch.folder}/model.pt")
    job = srun(launch, slurm, "--nodes=2", *ferrorun("--max-restarts=1", EXAMPLE, *kill))
    assert job.end(timeout_s=3 * LONG_S) == 0, job.story
    *attempts, result = job.output.decode().splitlines()
    assert attempts == ["attempt 0: 2 ranks from step 0 to 60", "attempt 1: 2 ranks from step 30 to 60"]
    assert json.loads(result)["attempt"] == 1


@pytest.mark.parametrize(("env", "code"), [({"CODE": "7"}, 7), ({"NUMBER": "9"}, 128 + 9)], ids=["exit", "signal"])
def test_srun_ends_with_the_code_of_the_failed_worker(
    launch: Launcher, slurm: Cluster, env: dict[str, str], code: int
) -> None:
    job = srun(launch, slurm, "--nodes=2", *ferrorun(launch.write("fail.py", FAIL)), **env)
    assert job.end() == code, job.story


def test_scancel_loses_no_save(launch: Launcher, slurm: Cluster) -> None:
    command = ferrorun("--nproc-per-node=2", launch.write("save.py", SAVE))
    job = srun(launch, slurm, "--nodes=2", "--job-name=cancelled", *command, SAVE_ON="SIGTERM")
    assert job.lines(4) == READY
    slurm.run("scancel", slurm.job_id("cancelled"))
    assert job.end() == ENDED_BY_SIGTERM, job.story
    assert saved(launch.folder) == ALL_SAVED, job.story


def test_time_limits_and_their_warnings_lose_no_save(launch: Launcher, slurm: Cluster) -> None:
    """One test for all, because Slurm looks at the limits of all jobs every 30 s."""
    command = ferrorun("--nproc-per-node=2", launch.write("save.py", SAVE))
    folders = [launch.folder / name for name in ("limit", "warning", "batch_warning", "script_warning")]
    for folder in folders:
        folder.mkdir()
    options = [("--nodes=2", "--time=1", f"--job-name={folder.name}") for folder in folders]
    limit = srun(launch, slurm, *options[0], *command, DIR=str(folders[0]), SAVE_ON="SIGTERM")
    warning = srun(launch, slurm, *options[1], "--signal=USR1@10", *command, DIR=str(folders[1]), SAVE_ON="SIGUSR1")
    script = textwrap.dedent(FORWARDING.format(command=shlex.join(command))).lstrip()
    batches = [
        Batch(
            launch,
            slurm,
            script,
            "--ntasks-per-node=1",
            *options[at],
            f"--signal={which}",
            DIR=str(folders[at]),
            SAVE_ON="SIGUSR1",
        )
        for at, which in ((2, "USR1@10"), (3, "B:USR1@10"))
    ]
    assert limit.lines(4) == warning.lines(4) == READY
    for batch in batches:
        batch.wait_for(*READY)
    slurm.end_time_limit(slurm.job_id("limit"))
    jobs = [limit, warning, *(batch.job for batch in batches)]
    codes = [job.end(timeout_s=2 * LONG_S) for job in jobs]
    stories = "\n".join([limit.story, warning.story, *(batch.story for batch in batches)])
    assert [saved(folder) for folder in folders] == [ALL_SAVED] * 4, stories
    assert codes == [ENDED_BY_SIGTERM, 0, 0, 0], stories


def test_no_process_of_a_cluster_outlives_a_killed_test_run(launch: Launcher, slurm: Cluster) -> None:
    (launch.folder / "cluster").mkdir()
    program = launch.write(
        "run.py",
        f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.support.slurm import Cluster
cluster = Cluster(pathlib.Path({str(launch.folder / "cluster")!r}))
cluster.run("sbatch", "--nodes=2", "--ntasks-per-node=1", "--output=/dev/null", "--wrap=srun sleep infinity")
cluster.job_id("wrap")
print("runs", flush=True)
sys.stdin.read()
""",
    )
    reader, writer = os.pipe()
    run = launch.start(sys.executable, program, stdin=reader)
    try:
        assert run.lines(1) == ["runs"]
        assert len(run.processes()) > 1 + len(NODES)
        run.send(signal.SIGKILL)
        run.end(drain=False)
        assert eventually(lambda: not run.processes(), LONG_S), run.story
    finally:
        os.close(reader)
        os.close(writer)
