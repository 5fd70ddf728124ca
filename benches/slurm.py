"""Jobs on a real Slurm of four nodes on this machine, under torchrun and ferrorun, alternately in one run.

    just bench-slurm
    just bench-slurm --only restart

``start``: from ``srun`` to the first line of the last worker. torchrun gets the options that its documentation gives for Slurm. ferrorun
takes them from Slurm's variables. ``restart``: from the death of a worker to the first line of the last worker of the next round, on all
nodes. For ``scontrol requeue`` the clock starts at the command, which some process of the job must give.
Needs root and Debian's packages of Slurm. Prints a Markdown table: median and range of each side, and the ratios.
"""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from side_by_side import compare

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.ports import free_port  # noqa: E402  # needs the path above
from tests.support.slurm import Cluster  # noqa: E402  # needs the path above
from tests.support.waiting import LONG_S, eventually  # noqa: E402  # needs the path above

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BIN = Path(sys.executable).parent
NODES = 4
START, RESTART = "srun to the first line of all workers, ms", "failure to the first line of all workers, s"

# Each worker notes its start, and the one of rank 1 its death. In the last attempt all end.
WORKER = """
import os, signal, sys, time
now = time.monotonic_ns()
folder, rank = sys.argv[1], os.environ["RANK"]
# Not TORCHELASTIC_RESTART_COUNT: torchrun counts the failures of each node for itself, and a requeued job begins from 0.
attempt = int(os.path.exists(f"{folder}/started.0.{rank}"))
def note(kind, number, at):
    path = f"{folder}/{kind}.{attempt}.{number}"
    with open(path + "~", "w") as file:
        file.write(str(at))
    os.rename(path + "~", path)
note("started", rank, now)
if attempt == int(sys.argv[2]):
    sys.exit()
while not all(os.path.exists(f"{folder}/started.{attempt}.{one}") for one in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)
if sys.argv[3] == "kill" and rank == "1":
    note("failed", rank, time.monotonic_ns())
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


def agent(side: str, *arguments: str) -> list[str]:
    """Return the command of each node."""
    if side != "torchrun":
        return [str(BIN / "ferrorun"), *arguments]
    # On one machine each node has the address of the endpoint. torchrun then tries to host on all of them, and one succeeds.
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=bench"]
    return [str(BIN / "torchrun"), f"--nnodes={NODES}", "--nproc-per-node=1", *rendezvous, *arguments]


@contextmanager
def job(cluster: Cluster, folder: Path, *command: str) -> Iterator[None]:
    """Run a client of Slurm to its end."""
    (folder / "worker.py").write_text(WORKER)
    environment = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"}
    errors = folder / "errors"
    with errors.open("wb") as file:
        client = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
    try:
        yield
        assert client.wait(timeout=LONG_S) == 0
    except (AssertionError, subprocess.TimeoutExpired):
        sys.stderr.write(errors.read_text())
        raise
    finally:
        client.kill()  # no effect on a job that has ended
        client.wait()


def started_ns(folder: Path, attempt: int) -> int:
    """Wait for the workers of all nodes. Return the time at which the last one has started (monotonic clock, nanoseconds)."""
    assert eventually(lambda: len(list(folder.glob(f"started.{attempt}.?"))) == NODES, LONG_S), (
        f"attempt {attempt} has not started"
    )
    return max(int(path.read_text()) for path in folder.glob(f"started.{attempt}.?"))


def measure_start(cluster: Cluster, side: str) -> dict[str, list[float]]:
    """Return the milliseconds from srun to the first line of the last worker."""
    if side == "requeue":
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = agent(side, "worker.py", name, "0", "none")
        begun = time.monotonic_ns()
        with job(cluster, folder, "srun", f"--nodes={NODES}", *command):
            return {START: [(started_ns(folder, 0) - begun) / 1e6]}


def measure_restart(cluster: Cluster, side: str) -> dict[str, list[float]]:
    """Return the seconds from a failure to the first line of the last worker of the next round."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        how = "none" if side == "requeue" else "kill"
        command = agent(side, "--max-restarts=1", "worker.py", name, "1", how)
        if side != "requeue":
            with job(cluster, folder, "srun", f"--nodes={NODES}", *command):
                restarted = started_ns(folder, 1)
            return {RESTART: [(restarted - int((folder / "failed.0.1").read_text())) / 1e9]}
        (folder / "job.sh").write_text("#!/bin/sh\nexec srun " + " ".join(command) + "\n")
        options = (f"--nodes={NODES}", "--ntasks-per-node=1", "--requeue", "--job-name=bench", "--output=/dev/null")
        with job(cluster, folder, "sbatch", "--wait", *options, "job.sh"):
            started_ns(folder, 0)
            begun = time.monotonic_ns()
            cluster.run("scontrol", "requeue", cluster.job_id("bench"))
            assert eventually((folder / f"started.1.{NODES - 1}").exists, 4 * LONG_S)
            return {RESTART: [(started_ns(folder, 1) - begun) / 1e9]}


def main() -> None:
    """Measure on a cluster of its own."""
    # pip also compiles the packages that it installs, including torch.
    compileall.compile_dir(ROOT / "python", quiet=1)
    with tempfile.TemporaryDirectory() as name:
        cluster = Cluster(Path(name))
        try:

            def on_cluster(
                measure: Callable[[Cluster, str], dict[str, list[float]]],
            ) -> Callable[[str], dict[str, list[float]]]:
                return lambda side: measure(cluster, side)

            measurements = {"start": (on_cluster(measure_start), 10), "restart": (on_cluster(measure_restart), 3)}
            compare(("torchrun", "ferrorun", "requeue"), measurements, __doc__ or "")
        finally:
            cluster.close()


if __name__ == "__main__":
    main()
