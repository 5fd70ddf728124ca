"""What helpers of workers become when the agent is killed and when it ends by itself, and the guard process that sees to it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from tests.support.harness import FERRORUN, Job, Launcher, Process, gone_at_ns
from tests.support.waiting import LONG_S, eventually, is_alive

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


def has_cgroup(job: Job) -> bool:
    """Whether the workers of a job are in a cgroup of their own."""
    tasks = Path(f"/proc/{job.process.pid}/task").iterdir()  # a thread of the agent has spawned them
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    return any("/ferrorun-" in Path(f"/proc/{pid}/cgroup").read_text() for pid in children)


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


WITHOUT_CGROUP = {"FERROELASTIC_CGROUP": "0"}


def test_helpers_without_the_mark_are_found_by_the_cgroup(launch: Launcher) -> None:
    """They have left the session, and their environment tells nothing."""
    job = launch(*launch.shell('env -i "$ZOO" escape 0 > "$DIR/escaped.$RANK"; exec "$ZOO" sleep'))
    ready(job, 2)
    escaped = [job.watch(pid) for pid in launch.pids("escaped.*")]
    guard = job.guard()
    if not has_cgroup(job):
        launch.survivors += escaped
        pytest.skip("no cgroup can be made here")
    job.send(signal.SIGKILL)
    assert len(gone_at_ns([*escaped, guard])) == 3


def test_helpers_in_a_worker_s_session_are_found_without_mark_and_cgroup(launch: Launcher) -> None:
    script = 'env -i "$ZOO" regroup 0 > "$DIR/helper.$RANK"; exec "$ZOO" sleep'
    job = launch(*launch.shell(script), env=WITHOUT_CGROUP)
    ready(job, 2)
    helpers = [job.watch(pid) for pid in launch.pids("helper.*")]
    groups = {os.getpgid(helper.pid) for helper in helpers}
    assert groups == {helper.pid for helper in helpers}, "they have groups of their own"
    job.send(signal.SIGKILL)
    assert len(gone_at_ns(helpers)) == 2


def test_helpers_of_a_nested_job_end_too(launch: Launcher) -> None:
    inner = launch.write("inner.sh", '"$ZOO" escape 0 > "$DIR/escaped.$PPID"; exec "$ZOO" sleep')
    command = " ".join((*FERRORUN, "--standalone", "--nproc-per-node=1", "--no-python", "/bin/sh", inner))
    job = launch(*launch.shell(f"exec {command}"), env=WITHOUT_CGROUP)
    ready(job, 2)
    escaped = [job.watch(pid) for pid in launch.pids("escaped.*")]
    assert len(escaped) == 2
    job.send(signal.SIGKILL)
    assert len(gone_at_ns(escaped)) == 2
    assert eventually(lambda: not job.processes(), LONG_S), job.processes()


def test_helpers_that_are_to_be_kept_outlive_a_killed_agent(launch: Launcher) -> None:
    script = '"$ZOO" escape 0 > "$DIR/escaped.$RANK"; "$ZOO" orphan 0 > "$DIR/orphan.$RANK"; exec "$ZOO" sleep'
    job = launch("--keep-detached", *launch.shell(script))
    ready(job, 2)
    launch.survivors += [job.watch(pid) for pid in launch.pids("escaped.*")]
    orphans = [job.watch(pid) for pid in launch.pids("orphan.*")]
    guard = job.guard()
    job.send(signal.SIGKILL)
    assert len(gone_at_ns([*orphans, guard])) == 3
    assert len(launch.survivors) == 2
    assert not any(process.is_gone() for process in launch.survivors)


END_OF = {"success": 0, "failure": 3, "signal": 128 + signal.SIGTERM}


@pytest.mark.parametrize("option", ["", "--keep-detached", "--end-detached"])
@pytest.mark.parametrize("end", END_OF)
@pytest.mark.parametrize("env", [{}, WITHOUT_CGROUP], ids=["cgroup", "marks"])
def test_an_escaped_helper_when_the_agent_ends_by_itself(
    launch: Launcher, end: str, option: str, env: dict[str, str]
) -> None:
    gate = launch.gate()
    code = 3 if end == "failure" else 0
    script = f'"$ZOO" escape 0 > "$DIR/escaped.$RANK"; echo ready; read x < {gate.path}; exit {code}'
    options = [option] if option else []
    job = launch(*options, *launch.shell(script), env=env)
    ready(job, 2)
    helpers = [job.watch(pid) for pid in launch.pids("escaped.*")]
    guard = job.guard()
    job.settle(2)
    if end == "signal":
        job.send(signal.SIGTERM)
    else:
        gate.let_pass(2)
    assert job.end() == END_OF[end]
    assert guard.is_gone()
    named = [line for line in job.errors.splitlines() if all(f"{helper.pid} (" in line for helper in helpers)]
    is_kept = option == "--keep-detached" or (end == "success" and option == "")
    if is_kept:
        launch.survivors += helpers
        assert not any(helper.is_gone() for helper in helpers)
    else:
        assert all(helper.is_gone() for helper in helpers)
    assert len(named) == (0 if option == "--keep-detached" else 1), job.errors


def test_escaped_helpers_of_an_attempt_are_gone_before_the_next_one(launch: Launcher) -> None:
    gate = launch.gate()
    script = f"""
        if [ "$TORCHELASTIC_RESTART_COUNT" = 1 ]; then
            # One that init has yet to reap is gone.
            grep -q '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$(cat "$DIR/escaped.$RANK")/status" && touch "$DIR/found"
            exit 0
        fi
        "$ZOO" escape 0 > "$DIR/escaped.$RANK"
        echo ready
        read x < {gate.path}
        exit 3
    """
    job = launch("--max-restarts=1", *launch.shell(script))
    ready(job, 2)
    gate.let_pass(2)
    assert job.end() == 0
    assert len(launch.pids("escaped.*")) == 2
    assert not (launch.folder / "found").exists()


def test_a_deaf_escaped_helper_has_the_rest_of_the_grace_period(launch: Launcher) -> None:
    script = 'trap "" TERM; setsid sleep 1000 & echo $! > "$DIR/escaped"; exit 3'
    job = launch("--shutdown-timeout=1", *launch.shell(script), nproc=1)
    assert job.end() == 3
    assert not is_alive(int(launch.read("escaped")))


DAEMON = """
import os, signal, sys, time

if os.fork():
    while not os.path.exists(os.environ["DIR"] + "/daemon"):
        time.sleep(0.01)
    sys.exit(3)
os.setsid()
if os.fork():
    sys.exit()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with open(os.environ["DIR"] + "/daemon.part", "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, os.environ["DIR"] + "/daemon")
if signal.sigtimedwait([signal.SIGTERM], 120) is None:
    sys.exit()
time.sleep(0.3)
open(os.environ["DIR"] + "/saved", "w").close()
"""


@pytest.mark.parametrize("env", [{}, WITHOUT_CGROUP], ids=["cgroup", "marks"])
def test_a_daemon_that_leads_no_group_has_the_grace_period_too(launch: Launcher, env: dict[str, str]) -> None:
    job = launch(*launch.python(DAEMON), nproc=1, env=env)
    assert job.end() == 3
    daemon = int(launch.read("daemon"))
    assert not is_alive(daemon)
    assert (launch.folder / "saved").exists()
    assert f"{daemon} (" in job.errors


# ---- the guard


def another_guard(job: Job, former: Process) -> bool:
    return any(pid != former.pid for pid in job.guards())


@pytest.mark.parametrize("how", ["success", "failure", "signal"])
@pytest.mark.parametrize("fault", ["killed", "suspended"])
def test_the_guard_decides_nothing(launch: Launcher, how: str, fault: str) -> None:
    gate = launch.gate()
    code = 7 if how == "failure" else 0
    job = launch(*launch.shell(f"echo ready; read x < {gate.path}; exit {code}"))
    ready(job, 2)
    job.settle(2)
    guard = job.guard()
    if fault == "killed":
        guard.kill()
        assert eventually(lambda: another_guard(job, guard), LONG_S)
    else:
        job.watch(guard.pid)
        os.kill(guard.pid, signal.SIGSTOP)
    if how == "signal":
        job.send(signal.SIGTERM)
    else:
        gate.let_pass(2)
    assert job.end() == {"success": 0, "failure": 7, "signal": 128 + signal.SIGTERM}[how]
    lines = [line for line in job.errors.splitlines() if not line.startswith("{")]  # without the events
    assert not any("Traceback" in line for line in lines)
    lost = [line for line in lines if "guard process" in line]
    assert len(lost) == (1 if fault == "killed" else 0), lost


def test_the_guard_that_replaces_a_killed_one_does_its_work(launch: Launcher) -> None:
    job = launch(*launch.shell(FAMILY))
    ready(job, 2)
    job.settle(2)
    guard = job.guard()
    guard.kill()
    assert eventually(lambda: another_guard(job, guard), LONG_S)
    children = [job.watch(pid) for kind in ("orphan", "deaf", "escaped") for pid in launch.pids(f"{kind}.*")]
    job.send(signal.SIGKILL)
    assert len(gone_at_ns(children)) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGRTMIN])
def test_the_guard_ignores_all_signals_that_can_be_ignored(launch: Launcher, number: int) -> None:
    job = launch(*launch.shell("echo ready; exec sleep 1000"))
    ready(job, 2)
    guard = job.guard()
    status = Path(f"/proc/{guard.pid}/status").read_text()
    (ignored,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn:"))
    assert ignored & 1 << number - 1
    job.settle(2)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM


def test_a_process_with_a_second_thread_has_a_guard_too(launch: Launcher) -> None:
    """As with a sitecustomize, a debugger or a monitoring agent."""
    program = launch.write(
        "threaded.py",
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
        "from ferroelastic.run import console\nconsole()\n",
    )
    job = launch(*launch.shell(FAMILY), launcher=(sys.executable, program, "--standalone"))
    ready(job, 2)
    children = [job.watch(pid) for kind in ("orphan", "deaf", "escaped") for pid in launch.pids(f"{kind}.*")]
    assert eventually(lambda: len(job.guards()) == 1, LONG_S)
    job.send(signal.SIGKILL)
    assert len(gone_at_ns(children)) == 6
    assert eventually(lambda: not job.processes(), LONG_S), job.processes()


def descriptors(pid: int) -> set[str]:
    """The targets of a process's descriptors above 0, without those that are closed meanwhile."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if descriptor.name != "0":
                found.add(os.readlink(descriptor))
    return found


def test_the_guard_does_not_keep_the_output_open(launch: Launcher) -> None:
    """It holds none of the agent's descriptors but its line and the lease; the rest are processes and a timer."""
    job = launch(*launch.shell("echo ready; exec sleep 1000"))
    ready(job, 2)
    guard = job.guard()
    assert os.readlink(f"/proc/{guard.pid}/fd/0").startswith("socket:")
    kinds = {"anon_inode:[pidfd]", "anon_inode:[timerfd]", "/memfd:ferroelastic-lease (deleted)"}
    # The guard reads /proc for a moment when it is told of a worker.
    assert eventually(lambda: descriptors(guard.pid) <= kinds, LONG_S), descriptors(guard.pid)
    job.settle(2)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM


def test_control_characters_in_the_name_of_a_helper_are_escaped(launch: Launcher) -> None:
    script = """
import os, sys, time
if os.fork():
    while not os.path.exists(os.environ["DIR"] + "/there"):
        time.sleep(0.01)
    sys.exit(3)
os.setsid()
open(os.environ["DIR"] + "/there", "w").close()
os.execv(sys.executable, ["\\x1b]0;owned\\x07", "-c", "import time; time.sleep(1000)"])
"""
    job = launch(*launch.python(script), nproc=1)
    assert job.end() == 3
    assert "\x1b" not in job.errors
    assert r"\u{1b}]0;owned\u{7}" in job.errors, job.errors
