"""An agent that is killed leaves nobody behind; one that ends in the ordinary way leaves alone what has left its job."""

from __future__ import annotations

import os
import signal

import pytest
from tests.faults.harness import Job, Launcher, gone_at_ns

pytestmark = pytest.mark.engine

NPROC = 8
NOTICEABLY_S = 1.0

# Each worker has a child in its group, one there that ignores SIGTERM, and one in a session of its own.
FAMILY = """
"$ZOO" orphan 0 > "$DIR/orphan.$RANK"
"$ZOO" deaf-orphan 0 > "$DIR/deaf.$RANK"
"$ZOO" escape 0 > "$DIR/escaped.$RANK"
echo $$ > "$DIR/worker.$RANK"
exec "$ZOO" sleep
"""


def ready(job: Job, count: int) -> None:
    assert job.lines(count) == ["ready"] * count


def test_no_worker_and_no_child_of_a_worker_outlives_a_killed_agent(launch: Launcher) -> None:
    job = launch(*launch.shell(FAMILY), nproc=NPROC)
    ready(job, NPROC)
    workers = [job.watch(pid) for pid in launch.pids("worker.*")]
    children = [job.watch(pid) for kind in ("orphan", "deaf", "escaped") for pid in launch.pids(f"{kind}.*")]
    guard = job.guard()
    assert len(workers) == NPROC
    assert len(children) == 3 * NPROC

    job.send(signal.SIGKILL)
    assert len(gone_at_ns(workers, NOTICEABLY_S)) == NPROC
    assert len(gone_at_ns(children)) == 3 * NPROC
    assert gone_at_ns([guard])
    assert job.end() == -signal.SIGKILL


def test_workers_of_a_restart_do_not_outlive_a_killed_agent_either(launch: Launcher) -> None:
    job = launch("--max-restarts=1", *launch.shell('[ "$TORCHELASTIC_RESTART_COUNT" = 0 ] && exit 3' + FAMILY))
    ready(job, 2)
    workers = [job.watch(pid) for pid in launch.pids("worker.*")]
    children = [job.watch(pid) for kind in ("orphan", "deaf", "escaped") for pid in launch.pids(f"{kind}.*")]
    guard = job.guard()
    job.send(signal.SIGKILL)
    assert len(gone_at_ns(workers, NOTICEABLY_S)) == 2
    assert len(gone_at_ns([*children, guard])) == 7


def test_who_takes_the_mark_off_outlives_a_killed_agent(launch: Launcher) -> None:
    script = """
        env -u FERROELASTIC_RUN "$ZOO" escape 0 > "$DIR/free.$RANK"
        "$ZOO" escape 0 > "$DIR/escaped.$RANK"
        exec "$ZOO" sleep
    """
    job = launch(*launch.shell(script))
    ready(job, 2)
    launch.survivors += [job.watch(pid) for pid in launch.pids("free.*")]
    escaped = [job.watch(pid) for pid in launch.pids("escaped.*")]
    guard = job.guard()
    job.send(signal.SIGKILL)
    assert len(gone_at_ns([*escaped, guard])) == 3
    assert not any(process.is_gone() for process in launch.survivors)


@pytest.mark.parametrize(("code", "number"), [(0, None), (3, None), (0, signal.SIGTERM)])
def test_an_escaped_helper_is_not_touched_when_the_agent_ends_by_itself(
    launch: Launcher, code: int, number: signal.Signals | None
) -> None:
    gate = launch.gate()
    script = f'"$ZOO" escape 0 > "$DIR/escaped.$RANK"; echo ready; read x < {gate.path}; exit {code}'
    job = launch(*launch.shell(script))
    ready(job, 2)
    launch.survivors += [job.watch(pid) for pid in launch.pids("escaped.*")]
    guard = job.guard()
    job.settle(2)
    if number is None:
        gate.let_pass(2)
    else:
        job.send(number)
    assert job.end() == (code if number is None else 128 + number)
    assert guard.is_gone()
    assert len(launch.survivors) == 2
    assert not any(process.is_gone() for process in launch.survivors)


def test_the_guard_is_no_hindrance_to_who_waits_for_the_end_of_the_output(launch: Launcher) -> None:
    """It holds none of the agent's descriptors but its line."""
    job = launch(*launch.shell("echo ready; exec sleep 1000"))
    ready(job, 2)
    guard = job.guard()
    assert os.listdir(f"/proc/{guard.pid}/fd") == ["0"]
    job.settle(2)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
