"""What a failed worker has left in its process group is gone before the next attempt starts, and when the job is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.support.waiting import is_alive

if TYPE_CHECKING:
    from tests.support.harness import Launcher

pytestmark = pytest.mark.engine

# Attempt 0 leaves children and fails; attempt 1 looks for them before anything else, leaves its own and fails as well.
SCRIPT = """
import os, subprocess, sys
from pathlib import Path

folder, attempt, rank = Path(os.environ["DIR"]), os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]

def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"

if attempt == "1":
    before = [path.read_text().strip() for path in folder.glob("0.*")]
    (folder / f"found.{rank}").write_text(" ".join(state(pid) for pid in before))

for kind in ("orphan", "deaf-orphan"):
    with open(folder / f"{attempt}.{rank}.{kind}", "w") as file:
        subprocess.run([os.environ["ZOO"], kind, "0"], stdout=file, check=True)
print("ready", flush=True)
with open(folder / "gate") as gate:
    os.read(gate.fileno(), 1)
sys.exit(int(rank) + 7)
"""


def test_nothing_of_a_failed_attempt_is_left_for_the_next_one_nor_after_the_job(launch: Launcher) -> None:
    gate = launch.gate()
    job = launch("--max-restarts=1", "--shutdown-timeout=1", *launch.python(SCRIPT))
    for attempt in (0, 1):
        assert job.lines(2) == ["ready"] * 2
        children = launch.pids(f"{attempt}.*")
        assert len(children) == 4
        assert all(map(is_alive, children))
        gate.let_pass(1)  # one fails, its peer is stopped; both have left children
    assert job.end() in {7, 8}
    for rank in (0, 1):
        states = launch.read(f"found.{rank}").split()
        assert len(states) == 4
        assert set(states) <= {"gone", "Z", "X"}
    assert not any(map(is_alive, launch.pids("[01].*")))


def test_nothing_of_a_worker_that_succeeded_is_left_after_the_job(launch: Launcher) -> None:
    script = '"$ZOO" deaf-orphan 0 > "$DIR/child.$RANK"; exit 0'
    job = launch("--shutdown-timeout=1", *launch.shell(script))
    assert job.end() == 0
    children = launch.pids("child.*")
    assert len(children) == 2
    assert not any(map(is_alive, children))


@pytest.mark.parametrize("kind", ["signal", "exit"])
def test_children_of_a_worker_that_was_alone_are_found_too(launch: Launcher, kind: str) -> None:
    """No peer has to be stopped here, and the leader of the only group is dead."""
    last = "kill -KILL $$" if kind == "signal" else "exit 9"
    job = launch("--shutdown-timeout=1", *launch.shell(f'"$ZOO" orphan 0 > "$DIR/child"; {last}'), nproc=1)
    assert job.end() == (137 if kind == "signal" else 9)
    assert not is_alive(int(launch.read("child")))
