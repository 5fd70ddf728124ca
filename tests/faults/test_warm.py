"""Faults of warm workers: zygotes and parked workers are killed and suspended, scripts change, processes run out, agents are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import pytest
from tests.support.harness import ALONE, Launcher, gone_at_ns
from tests.support.ports import free_port
from tests.support.waiting import LONG_S, eventually, is_alive
from tests.support.warm import WORKER, cold_lines, expect_parked, start_warm, warm_processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.harness import Job

pytestmark = pytest.mark.skipif(os.environ.get("FERROELASTIC_PIDFD") == "0", reason="warm workers need pidfds")

HOLD_FIRST = """
import os
folder = os.environ["DIR"]
if not os.path.exists(folder + "/importing"):
    with open(folder + "/importing.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, folder + "/importing")
    open(folder + "/hold", "rb", buffering=0).read(1)
"""
"""A module whose first import waits for the test. The process id is in a file."""


def importing(launch: Launcher) -> int:
    """Wait for a zygote that imports :data:`HOLD_FIRST`; its process id."""
    assert eventually((launch.folder / "importing").exists, LONG_S)
    return int(launch.read("importing"))


def kinds(attempt: int, *expected: str) -> list[str]:
    return sorted(f"{attempt} {kind}" for kind in expected)


def events(job: Job, text: str) -> list[str]:
    """Lines of the log with a text, without the events."""
    return [line for line in job.errors.splitlines() if not line.startswith("{") and text in line]


# ---- usage


@pytest.mark.parametrize("value", ["-1", "x", "1.5"])
def test_a_number_of_parked_workers_that_is_none_is_a_usage_error(launch: Launcher, value: str) -> None:
    job = start_warm(launch, f"--warm-workers={value}", worker="open(__file__ + '.ran', 'w')")
    assert job.end() == 2
    assert f"--warm-workers={value!r} is not a number of parked workers" in job.errors
    assert "Traceback" not in job.errors
    assert not (launch.folder / "worker.py.ran").exists()


@pytest.mark.parametrize("imports", ["", "light,", "1light", "light:", "a b"])
def test_an_import_that_is_none_is_a_usage_error(launch: Launcher, imports: str) -> None:
    job = start_warm(launch, imports=imports, worker="open(__file__ + '.ran', 'w')")
    assert job.end() == 2
    assert "is not the name of a module; give e.g. torch" in job.errors
    assert not (launch.folder / "worker.py.ran").exists()
    assert "Traceback" not in job.errors


# ---- the zygote


def test_a_zygote_that_is_killed_during_the_import_is_replaced(launch: Launcher) -> None:
    gate = launch.gate()
    launch.gate("hold")
    job = start_warm(launch, light=HOLD_FIRST, restarts=2)
    assert job.lines(1) == ["0 cold"]
    zygote = importing(launch)
    job.watch(zygote).kill()
    assert eventually(lambda: bool(cold_lines(job)), LONG_S)
    gate.let_pass()
    assert job.lines(1) == ["1 cold"]
    expect_parked(job, 1)
    gate.let_pass()
    assert job.lines(1) == ["2 warm"]
    assert job.end() == 0
    assert cold_lines(job) == [f"the zygote (pid {zygote}) was killed by signal 9"]


def test_the_parked_workers_of_a_killed_zygote_are_used_and_it_is_replaced(launch: Launcher) -> None:
    gate = launch.gate()
    job = start_warm(launch, restarts=2, nproc=2)
    assert job.lines(2) == kinds(0, "cold", "cold")
    (zygote,), _ = expect_parked(job, 2)
    job.watch(zygote).kill()
    assert eventually(lambda: bool(cold_lines(job)), LONG_S)
    gate.let_pass()
    assert job.lines(2) == kinds(1, "warm", "warm")
    assert expect_parked(job, 2).zygotes != [zygote]
    gate.let_pass()
    assert job.lines(2) == kinds(2, "warm", "warm")
    assert job.end() == 0
    assert cold_lines(job) == [f"the zygote (pid {zygote}) was killed by signal 9"]


def test_a_zygote_that_dies_again_and_again_is_given_up(launch: Launcher) -> None:
    gate = launch.gate()
    job = start_warm(launch, light="import os\nos.abort()", restarts=7)
    for attempt in range(8):
        assert job.lines(1) == [f"{attempt} cold"]
        if attempt < 7:
            assert eventually(lambda n=attempt: len(cold_lines(job)) >= min(n + 1, 6), LONG_S), job.story  # type: ignore[misc]
            gate.let_pass()
    assert job.end() == 0
    *lost, last = cold_lines(job)
    assert len(lost) == 5
    assert all(re.fullmatch(r"the zygote \(pid \d+\) was killed by signal 6", reason) for reason in lost), lost
    assert last == "5 zygotes have ended or do not fit the workers any more"


def test_a_suspended_zygote_is_replaced(launch: Launcher) -> None:
    gate = launch.gate()
    job = start_warm(launch, restarts=3)
    assert job.lines(1) == ["0 cold"]
    (zygote,), _ = expect_parked(job, 1)
    job.watch(zygote)
    os.kill(zygote, signal.SIGSTOP)
    gate.let_pass()
    assert job.lines(1) == ["1 warm"]
    gate.let_pass()
    assert job.lines(1) == ["2 cold"]
    assert expect_parked(job, 1).zygotes != [zygote]
    gate.let_pass()
    assert job.lines(1) == ["3 warm"]
    assert job.end() == 0
    assert cold_lines(job) == ["the zygote has forked no worker within 1 s"]


# ---- parked workers


def test_a_killed_parked_worker_is_replaced(launch: Launcher) -> None:
    gate = launch.gate()
    job = start_warm(launch, nproc=2)
    assert job.lines(2) == kinds(0, "cold", "cold")
    victim = expect_parked(job, 2).parked[0]
    job.watch(victim).kill()
    assert eventually(lambda: bool(events(job, "A parked process")), LONG_S)
    assert victim not in expect_parked(job, 2).parked
    gate.let_pass()
    assert job.lines(2) == kinds(1, "warm", "warm")
    assert job.end() == 0
    (line,) = events(job, "A parked process")
    assert f"(pid {victim}) was killed by signal 9 before it was used" in line
    assert not cold_lines(job)


def test_the_restart_survives_the_end_of_all_that_is_warm(launch: Launcher) -> None:
    gate = launch.gate()
    job = start_warm(launch, nproc=2, restarts=2)
    assert job.lines(2) == kinds(0, "cold", "cold")
    found = expect_parked(job, 2)
    victims = [job.watch(pid) for pid in (*found.zygotes, *found.parked)]
    for victim in victims:
        os.kill(victim.pid, signal.SIGSTOP)  # so that none of them reacts to the end of another one
    for victim in victims:
        victim.kill()
    gate.let_pass()
    assert job.lines(2) == kinds(1, "cold", "cold")
    expect_parked(job, 2)
    gate.let_pass()
    assert job.lines(2) == kinds(2, "warm", "warm")
    assert job.end() == 0
    assert cold_lines(job) == [f"the zygote (pid {found.zygotes[0]}) was killed by signal 9"]


@pytest.mark.parametrize("count", [1, 4])
def test_suspended_parked_workers_are_not_used(launch: Launcher, count: int) -> None:
    gate = launch.gate()
    job = start_warm(launch, nproc=4, restarts=2)
    assert job.lines(4) == kinds(0, *["cold"] * 4)
    suspended = expect_parked(job, 4).parked[:count]
    for pid in suspended:
        job.watch(pid)
        os.kill(pid, signal.SIGSTOP)
    gate.let_pass()
    assert job.lines(4) == kinds(1, *["cold"] * count, *["warm"] * (4 - count))
    expect_parked(job, 4)  # so many ends do not end the zygote
    gate.let_pass()
    assert job.lines(4) == kinds(2, *["warm"] * 4)
    assert job.end() == 0
    lines = events(job, "A parked process")
    assert len(lines) == count
    assert all(any(f"(pid {pid}) was suspended" in line for line in lines) for pid in suspended), lines
    assert not cold_lines(job)


# ---- the script


@pytest.mark.parametrize("preload", [False, True], ids=["restart", "preload"])
def test_a_script_that_is_not_valid_ends_as_under_the_interpreter(launch: Launcher, *, preload: bool) -> None:
    if preload:
        job = start_warm(launch, "--preload", worker="def f(:\n", restarts=0)
    else:
        gate = launch.gate()
        job = start_warm(launch)
        job.lines(1)
        expect_parked(job, 1)
        launch.write("worker.py", "def f(:\n")
        gate.let_pass()
    assert job.end() == 1
    script = launch.folder / "worker.py"
    assert re.search(rf'  File "{script}", line 1\n    def f\(:\n +\^\nSyntaxError: ', job.errors), job.errors
    assert not cold_lines(job)


def test_a_script_that_is_deleted_ends_as_under_the_interpreter(launch: Launcher) -> None:
    gate = launch.gate()
    job = start_warm(launch)
    job.lines(1)
    expect_parked(job, 1)
    (launch.folder / "worker.py").unlink()
    gate.let_pass()
    assert job.end() == 2
    assert f"can't open file '{launch.folder}/worker.py': [Errno 2] No such file or directory" in job.errors
    assert not cold_lines(job)


def test_a_script_that_is_replaced_runs_as_it_is(launch: Launcher) -> None:
    gate = launch.gate()
    job = start_warm(launch)
    job.lines(1)
    expect_parked(job, 1)
    launch.write("worker.py", "import sys\nprint('new', 'light' in sys.modules)\n")
    gate.let_pass()
    assert job.lines(1) == ["new True"]
    assert job.end() == 0


# ---- many workers, few processes


def test_many_workers_on_few_cores_all_come_back(launch: Launcher) -> None:
    gate = launch.gate()
    job = start_warm(launch, "--preload", nproc=64, restarts=2)
    for attempt in range(3):
        assert job.lines(64) == kinds(attempt, *["warm"] * 64)
        if attempt < 2:
            expect_parked(job, 64)
            gate.let_pass()
    assert job.end() == 0
    assert not cold_lines(job)


@pytest.fixture
def launch_in_public(zoo: str) -> Iterator[Launcher]:
    """As ``launch``, in a folder that other users can read."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv")
    folder = Path(tempfile.mkdtemp(prefix="ferro-public-"))
    folder.chmod(0o777)
    launcher = Launcher(folder, zoo)
    yield launcher
    launcher.clean_up()
    shutil.rmtree(folder)


def start_limited(launch: Launcher, processes: int, light: str = "") -> Job:
    """Start a warm job of a user that may have so many processes and threads. The user keeps the right to read the package."""
    launch.write("light.py", light)
    right = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    limit = ("bash", "-c", f'ulimit -u {processes}; exec "$@"', "bash")
    prefix = (*limit, "setpriv", "--reuid=64321", "--clear-groups", *right)
    flags = ("--warm-workers=16", "--warm-imports=light", "--max-restarts=2")
    return launch(*flags, launch.write("worker.py", WORKER), launcher=(*prefix, *ALONE), nproc=1)


def test_a_zygote_that_cannot_fork_lets_workers_start_cold(launch_in_public: Launcher) -> None:
    gate = launch_in_public.gate()
    light = "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
    job = start_limited(launch_in_public, 1000, light)
    text = "The zygote cannot fork another worker ("
    for attempt in range(3):
        assert job.lines(1) == [f"{attempt} cold"], job.story
        assert eventually(lambda n=attempt: len(events(job, text)) >= n + 1, LONG_S), job.story  # type: ignore[misc]
        if attempt < 2:
            gate.let_pass()
    assert job.end() == 0
    assert all("; 0 of 16 are parked" in line for line in events(job, text)), events(job, text)
    assert not cold_lines(job)


def test_a_limit_of_processes_leaves_as_many_parked_workers_as_it_permits(launch_in_public: Launcher) -> None:
    gate = launch_in_public.gate()
    job = start_limited(launch_in_public, 14)
    text = "The zygote cannot fork another worker ("
    assert job.lines(1) == ["0 cold"], job.story
    assert eventually(lambda: bool(events(job, text)) and bool(warm_processes(job).parked), LONG_S), job.story
    for attempt in (1, 2):
        gate.let_pass()
        assert job.lines(1) == [f"{attempt} warm"], job.story
    assert job.end() == 0
    assert not cold_lines(job)


# ---- the end of the agent


def test_nothing_warm_survives_an_agent_that_is_killed(launch: Launcher) -> None:
    launch.gate()
    job = start_warm(launch, nproc=8)
    job.lines(8)
    found = expect_parked(job, 8)
    job.settle(8)
    processes = [job.watch(pid) for pid in (*found.zygotes, *found.parked)]
    job.send(signal.SIGKILL)
    assert len(gone_at_ns(processes)) == 9
    assert eventually(lambda: not job.processes(), LONG_S), job.processes()


def test_a_zygote_that_imports_ends_with_an_agent_that_is_killed(launch: Launcher) -> None:
    launch.gate()
    launch.gate("hold")
    job = start_warm(launch, light=HOLD_FIRST)
    job.lines(1)
    zygote = job.watch(importing(launch))
    job.send(signal.SIGKILL)
    assert gone_at_ns([zygote])
    assert eventually(lambda: not job.processes(), LONG_S), job.processes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_nothing_that_is_warm(launch: Launcher, number: signal.Signals) -> None:
    launch.gate()
    job = start_warm(launch, nproc=2)
    job.lines(2)
    found = expect_parked(job, 2)
    job.settle(2)
    processes = [job.watch(pid) for pid in (*found.zygotes, *found.parked)]
    job.send(number)
    assert job.end() == 128 + number
    assert all(process.is_gone() for process in processes)
    assert not job.processes()
    assert not events(job, "A parked process")
    assert not cold_lines(job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_preload_ends_the_job(launch: Launcher, number: signal.Signals) -> None:
    launch.gate("hold")
    job = start_warm(launch, "--preload", light=HOLD_FIRST, worker="open(__file__ + '.ran', 'w')")
    zygote = job.watch(importing(launch))
    job.send(number)
    assert job.end() == 128 + number
    assert zygote.is_gone()
    assert not job.processes()
    assert not (launch.folder / "worker.py.ran").exists()
    assert not cold_lines(job)


# ---- helpers

WITHOUT_CGROUP = {"FERROELASTIC_CGROUP": "0"}

DAEMON = """
import time
if attempt and not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    with open(os.environ["DIR"] + "/daemon.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, f"{os.environ['DIR']}/daemon{attempt}")
    time.sleep(1000)
while attempt and not os.path.exists(f"{os.environ['DIR']}/daemon{attempt}"):
    time.sleep(0.005)
"""
DAEMON_WORKER = WORKER.replace("if attempt <", DAEMON + "if attempt <")


@pytest.mark.parametrize("env", [{}, WITHOUT_CGROUP], ids=["cgroup", "marks"])
def test_the_daemon_of_a_warm_worker_is_ended_and_the_warm_processes_are_not(
    launch: Launcher, env: dict[str, str]
) -> None:
    gate = launch.gate()
    job = start_warm(launch, "--max-restarts=3", worker=DAEMON_WORKER + "sys.exit(4)", restarts=2, env=env)
    assert job.lines(1) == ["0 cold"]
    found = expect_parked(job, 1)
    gate.let_pass()
    assert job.lines(1) == ["1 warm"]
    assert eventually((launch.folder / "daemon1").exists, LONG_S)
    daemon = int(launch.read("daemon1"))
    assert expect_parked(job, 1).zygotes == found.zygotes
    gate.let_pass()
    assert job.lines(1) == ["2 warm"]
    assert not is_alive(daemon)
    assert eventually((launch.folder / "daemon2").exists, LONG_S)
    gate.let_pass()
    assert job.lines(1) == ["3 warm"]
    assert job.end() == 4
    assert not is_alive(int(launch.read("daemon3")))
    lines = events(job, "Ending helper processes")
    assert len(lines) == 3
    assert f"{daemon} (" in lines[0]
    assert not any(f"{pid} (" in line for pid in (*found.zygotes, *found.parked) for line in lines)


@pytest.mark.parametrize("env", [{}, WITHOUT_CGROUP], ids=["cgroup", "marks"])
@pytest.mark.parametrize("option", [(), ("--end-detached",), ("--keep-detached",)], ids=["", "end", "keep"])
def test_zygotes_are_no_helpers_whatever_their_name(
    launch: Launcher, option: tuple[str, ...], env: dict[str, str]
) -> None:
    gate, hold = launch.gate(), launch.gate("hold")
    light = "import ctypes\nctypes.CDLL(None).prctl(15, b'upload')\n" + HOLD_FIRST
    job = start_warm(launch, *option, light=light, restarts=2, env=env)
    assert job.lines(1) == ["0 cold"]
    zygote = importing(launch)
    gate.let_pass()
    assert job.lines(1) == ["1 cold"]
    assert is_alive(zygote)
    hold.let_pass()
    assert expect_parked(job, 1).zygotes == [zygote]
    gate.let_pass()
    assert job.lines(1) == ["2 warm"]
    assert job.end() == 0
    assert not events(job, "elper processes")


def test_the_status_has_the_parked_the_used_and_the_refused(launch: Launcher) -> None:
    gate = launch.gate()
    port = free_port()
    job = start_warm(launch, restarts=3, env={"TORCHELASTIC_HEALTH_CHECK_PORT": str(port)})

    def status() -> dict[str, Any]:
        with urlopen(f"http://127.0.0.1:{port}/status", timeout=LONG_S) as answer:
            warm: dict[str, Any] = json.load(answer)["warm"]
            return warm

    assert job.lines(1) == ["0 cold"]
    expect_parked(job, 1)
    assert eventually(lambda: status()["parked"] == 1, LONG_S)
    none = {"ready_zygotes": 1, "parked": 1, "used": 0, "refused": 0, "last_refusal": None}
    assert status() == none
    gate.let_pass()
    assert job.lines(1) == ["1 warm"]
    assert eventually(lambda: status()["parked"] == 1, LONG_S)
    assert status() == {**none, "used": 1}
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONG_S) as answer:
        metrics = answer.read().decode()
    assert 'ferroelastic_restart_phase_seconds_count{phase="release"} 1' in metrics
    (launch.folder / "light.py").write_text("changed = True\n")
    gate.let_pass()
    assert job.lines(1) == ["2 cold"]
    reason = f"{launch.folder}/light.py has changed since its import"
    assert cold_lines(job) == [reason]
    found = status()
    assert (found["used"], found["refused"], found["last_refusal"]["reason"]) == (1, 1, reason)
    expect_parked(job, 1)  # the next zygote imports the new file
    gate.let_pass()
    assert job.lines(1) == ["3 warm"]
    assert job.end() == 0
