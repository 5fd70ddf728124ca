"""The batch scripts of ``docs/recipes/slurm.md`` run on a real Slurm."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.docs.pages import ROOT, blocks
from tests.support.harness import launch, zoo
from tests.support.ports import free_port
from tests.support.slurm import Batch, Cluster, slurm
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from tests.support.harness import Launcher

__all__ = ["launch", "slurm", "zoo"]

_SCRIPTS = {
    block.caption: block.text for block in blocks(ROOT / "docs" / "recipes" / "slurm.md") if block.language == "bash"
}
_DONE = "import os\nos.write(1, '{RANK} of {WORLD_SIZE}\\n'.format(**os.environ).encode())"

# All ranks but one fail with that one.
_FAIL_ONCE = """
import os, sys
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
if attempt == "0" and os.environ["RANK"] == "1":
    sys.exit(1)
os.write(1, f"{os.environ['RANK']} in attempt {attempt}\\n".encode())
"""

_WAIT = """
import os, select
os.write(1, "{SLURMD_NODENAME} is {RANK} of {WORLD_SIZE}\\n".format(**os.environ).encode())
while not os.path.exists("finish"):
    select.select([], [], [], 0.01)
"""

# Saves for some hundred milliseconds on SIGTERM, and ends. With all checkpoints at the start, the training is complete.
_SAVE = """
import os, signal, time
rank, size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
if all(os.path.exists(f"saved.{one}") for one in range(size)):
    os.write(1, f"{rank} is complete\\n".encode())
else:
    os.write(1, f"{rank} is ready\\n".encode())
    signal.sigwait({signal.SIGTERM})
    time.sleep(0.4)
    open(f"saved.{rank}", "w").close()
"""


def start(launch: Launcher, slurm: Cluster, name: str, train: str, *options: str) -> Batch:
    """Submit a script of the page. The nodes of the cluster have no GPUs."""
    launch.write("train.py", train)
    script = re.sub(r"^#SBATCH --gpus-per-node=.*\n", "", _SCRIPTS[name], flags=re.MULTILINE)
    script = script.replace("29400", str(free_port())).replace("--nproc-per-node=8", "--nproc-per-node=1")
    return Batch(launch, slurm, script, *options)


def test_each_script_has_a_test() -> None:
    assert _SCRIPTS.keys() == {"train.sbatch", "explicit.sbatch", "requeue.sbatch", "elastic.sbatch"}


def test_train_comes_back_after_a_failure(launch: Launcher, slurm: Cluster) -> None:
    batch = start(launch, slurm, "train.sbatch", _FAIL_ONCE)
    assert batch.job.end() == 0, batch.story
    assert set(re.findall(r"^\d in attempt 1$", batch.output, re.MULTILINE)) == {
        f"{rank} in attempt 1" for rank in range(4)
    }


def test_explicit_runs_on_all_nodes(launch: Launcher, slurm: Cluster) -> None:
    batch = start(launch, slurm, "explicit.sbatch", _DONE)
    assert batch.job.end() == 0, batch.story
    batch.wait_for(*(f"{rank} of 4" for rank in range(4)))


def test_requeue_saves_at_the_warning_and_completes_the_training_in_another_run(
    launch: Launcher, slurm: Cluster
) -> None:
    batch = start(launch, slurm, "requeue.sbatch", _SAVE)
    batch.wait_for(*(f"{rank} is ready" for rank in range(4)))
    number = slurm.job_id("requeue")
    # As Slurm does 90 s before the end.
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    slurm.begin_at_once(number)
    assert batch.job.end() == 0, batch.story
    batch.wait_for(*(f"{rank} is complete" for rank in range(4)))


def test_elastic_goes_on_without_a_lost_node(launch: Launcher, slurm: Cluster) -> None:
    batch = start(launch, slurm, "elastic.sbatch", _WAIT, "--nodelist=n[3-6]")
    batch.wait_for(*(f"n{rank + 3} is {rank} of 4" for rank in range(4)))
    slurm.lose("n6")
    try:
        batch.wait_for(*(f"n{rank + 3} is {rank} of 3" for rank in range(3)))
        slurm.mark_down("n6")
        assert eventually(lambda: "Node failure on n6" in batch.output, LONG_S), batch.story
        (launch.folder / "finish").touch()
        assert batch.job.end() == 0, batch.story
    finally:
        slurm.bring_back("n6")
