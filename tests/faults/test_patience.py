"""Workers that have been told to end get the time that they were promised, whatever signals come meanwhile, and however often."""

from __future__ import annotations

import os
import random
import re
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import FERRORUN, Job, Launcher, gone_at_ns
from tests.support.waiting import LONG_S, eventually, is_alive, is_parked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.engine

TERM, INT, HUP, QUIT = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
NEVER_KILLS = "--shutdown-timeout=600"
GAP_S = 0.02
HOLD_S = 0.1
"""For so long workers still save after the last signal: a build that does not wait has the time to kill them."""

HEAD = f"""
import os, signal, time
from pathlib import Path

signals = {[int(number) for number in (TERM, INT, HUP, QUIT)]}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
folder, rank, attempt = Path(os.environ["DIR"]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"worker.{{rank}}.{{attempt}}").write_text(str(os.getpid()))

def pass_gate(name):
    with open(folder / name) as gate:
        os.read(gate.fileno(), 1)

os.write(1, b"ready\\n")
if os.environ.get("FAILS") == rank:
    pass_gate("begin")
    os._exit(3)
"""
# Saves when it is told to end, for as long as the gate is closed.
SAVES = f"""{HEAD}
number = signal.sigwait(signals)
os.write(1, b"told %s\\n" % signal.Signals(number).name.encode())
pass_gate("finish")
(folder / f"saved.{{rank}}.{{attempt}}").touch()
"""
# Says what it is told, and goes on.
DEAF = f"""{HEAD}
while True:
    os.write(1, b"told %s\\n" % signal.Signals(signal.sigwait(signals)).name.encode())
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Launcher]:
    """As the fixture ``launch``, for workers that need no other program."""
    launcher = Launcher(tmp_path, zoo="")
    yield launcher
    launcher.clean_up()


def run(
    launcher: Launcher,
    script: str,
    *options: str,
    fails: bool = False,
    prefix: Sequence[str] = (),
    first_lines: Sequence[str] = ("ready",) * 2,
) -> Job:
    """Start a job of two workers, of which the last one fails at the gate ``begin`` if ``fails``; they are ready."""
    launcher.gate("begin"), launcher.gate("finish")
    command = (*prefix, *FERRORUN, "--standalone", "--nproc-per-node=2", "--monitor-interval=600", NEVER_KILLS)
    job = launcher.start(*command, *options, *launcher.python(script), env={"FAILS": "1"} if fails else {})
    assert job.lines(len(first_lines)) == sorted(first_lines)
    return job


def begin(launcher: Launcher) -> None:
    launcher.gates[-2].let_pass()


def finish(launcher: Launcher) -> None:
    select.select([], [], [], HOLD_S)
    launcher.gates[-1].let_pass(2)


def saved(launcher: Launcher) -> int:
    return len(list(launcher.folder.glob("saved.*")))


def settle(job: Job) -> None:
    """Wait until the agent has dealt with what it was sent, and has not ended."""

    def is_settled() -> bool:
        if job.agent.is_gone():
            pytest.fail(f"the agent has ended with {job.process.wait()}: {job.story}")
        lines = Path(f"/proc/{job.agent.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return not int(status["SigPnd"], 16) | int(status["ShdPnd"], 16) and is_parked(job.agent.pid)

    assert eventually(is_settled, LONG_S), job.story


# ---- signals that shorten nothing


@pytest.mark.parametrize(
    "numbers",
    [
        (TERM, TERM),
        (TERM, HUP),
        (HUP, TERM),
        (TERM,) * 10,
        (HUP,) * 10,
        (TERM, INT),
        (TERM, QUIT),
        (INT, TERM),
        (QUIT, HUP, TERM),
    ],
    ids=lambda numbers: "-".join(number.name for number in numbers),
)
def test_signals_in_a_row_keep_the_grace(start: Launcher, numbers: tuple[signal.Signals, ...]) -> None:
    """The first SIGINT and the first SIGQUIT as well."""
    job = run(start, SAVES)
    for number in numbers:
        job.send(number)
        select.select([], [], [], GAP_S)
    assert job.lines(2) == [f"told {numbers[0].name}"] * 2
    settle(job)
    finish(start)
    assert job.end() == 128 + numbers[0], job.story
    assert saved(start) == 2, job.story


@pytest.mark.parametrize("number", [TERM, INT, HUP, QUIT])
@pytest.mark.parametrize(("restarts", "code"), [(0, 3), (1, None)], ids=["failure", "restart"])
def test_a_signal_in_the_stop_after_a_failure_keeps_the_grace(
    start: Launcher, number: signal.Signals, restarts: int, code: int | None
) -> None:
    job = run(start, SAVES, f"--max-restarts={restarts}", fails=True)
    begin(start)
    assert job.lines(1) == ["told SIGTERM"]
    settle(job)
    job.send(number)
    settle(job)
    finish(start)
    assert job.end() == (128 + number if code is None else code), job.story
    assert [path.name for path in start.folder.glob("saved.*")] == ["saved.0.0"]
    assert not list(start.folder.glob("worker.*.1"))


@pytest.mark.parametrize("restarts", [0, 1], ids=["failure", "restart"])
def test_many_signals_in_the_stop_after_a_failure_keep_the_grace(start: Launcher, restarts: int) -> None:
    job = run(start, SAVES, f"--max-restarts={restarts}", fails=True)
    begin(start)
    assert job.lines(1) == ["told SIGTERM"]
    for number in (TERM, HUP, TERM, TERM, HUP):
        job.send(number)
        select.select([], [], [], GAP_S)
    settle(job)
    finish(start)
    assert job.end() in ({3} if restarts == 0 else {128 + TERM}), job.story
    assert saved(start) == 1


def test_timeout_of_coreutils_loses_no_save(start: Launcher) -> None:
    """It signals the agent, and right after it the agent's process group."""
    job = run(start, SAVES, prefix=("timeout", "2"))
    assert job.lines(2) == ["told SIGTERM"] * 2
    finish(start)
    assert job.end() == 124, job.story
    assert saved(start) == 2, job.story


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_signal_to_every_process_of_the_job_loses_no_save(start: Launcher, number: signal.Signals) -> None:
    """As Slurm does, or a terminal: the agent's process group, the agent itself, and each worker."""
    job = run(start, SAVES, prefix=("setsid",))
    agent = job.agent.pid
    assert os.getpgid(agent) == agent
    workers = start.pids("worker.*")
    os.killpg(agent, number)
    if number == TERM:  # a second SIGINT would be meant
        job.send(number)
    for pid in workers:
        os.kill(pid, number)
    assert job.lines(2) == [f"told {number.name}"] * 2
    settle(job)
    finish(start)
    assert job.end() == 128 + number, job.story
    assert saved(start) == 2, job.story


@pytest.mark.parametrize("seed", range(4))
def test_a_burst_over_the_whole_stop_changes_nothing(start: Launcher, seed: int) -> None:
    """From before the workers are told to after the agent has ended."""
    chance = random.Random(seed)
    job = run(start, SAVES)
    open_at = chance.randrange(20, 150)
    for count in range(200):
        if count == open_at:
            assert job.lines(2) == ["told SIGTERM"] * 2
            start.gates[-1].let_pass(2)
        job.send(TERM)
        select.select([], [], [], chance.choice([0, 0, chance.uniform(0, 0.002), chance.uniform(0, 0.01)]))
    assert job.end() == 128 + TERM, job.story
    assert saved(start) == 2, job.story
    assert "Traceback" not in job.errors, job.story


# ---- signals that shorten the grace


@pytest.mark.parametrize(
    "numbers",
    [(INT, INT), (QUIT, QUIT), (INT, QUIT), (QUIT, INT), (TERM, INT, INT), (HUP, QUIT, INT), (INT, TERM, INT)],
    ids=lambda numbers: "-".join(number.name for number in numbers),
)
def test_the_second_interrupt_kills_at_once(start: Launcher, numbers: tuple[signal.Signals, ...]) -> None:
    job = run(start, DEAF)
    workers = [job.watch(pid) for pid in start.pids("worker.*")]
    for number in numbers[:-1]:
        job.send(number)
        settle(job)
    assert not any(worker.is_gone() for worker in workers), job.story
    job.send(numbers[-1])
    assert job.end() == 128 + numbers[0], job.story
    assert all(worker.is_gone() for worker in workers)


@pytest.mark.parametrize("number", [INT, QUIT])
@pytest.mark.parametrize(("restarts", "code"), [(0, 3), (1, None)], ids=["failure", "restart"])
def test_the_second_interrupt_in_the_stop_after_a_failure_kills_at_once(
    start: Launcher, number: signal.Signals, restarts: int, code: int | None
) -> None:
    job = run(start, DEAF, f"--max-restarts={restarts}", fails=True)
    peer = job.watch(int(start.read("worker.0.0")))
    begin(start)
    assert job.lines(1) == ["told SIGTERM"]
    settle(job)
    job.send(number)
    settle(job)
    assert not peer.is_gone(), job.story
    job.send(number)
    assert job.end() == (128 + number if code is None else code), job.story
    assert peer.is_gone()
    assert not list(start.folder.glob("worker.*.1"))


# ---- what a worker that succeeded leaves in its process group

LEAVES = f"""{HEAD}
if rank == "1" and os.fork() == 0:
    (folder / "helper").write_text(str(os.getpid()))
    pass_gate("finish")
    (folder / "helped").write_text(" ".join(map(str, map(int, signal.sigpending()))))
    os._exit(0)
pass_gate("begin")
"""


def test_a_helper_left_by_a_worker_that_succeeded_finishes_without_a_signal(start: Launcher) -> None:
    job = run(start, LEAVES)
    start.gates[-2].let_pass(2)
    workers = start.pids("worker.*")
    assert eventually(lambda: not any(map(is_alive, workers)), LONG_S), job.story
    settle(job)
    finish(start)
    assert job.end() == 0, job.story
    assert start.read("helped") == ""


def test_a_helper_that_does_not_finish_in_the_grace_is_ended_and_named(start: Launcher) -> None:
    job = run(start, LEAVES, "--shutdown-timeout=1")
    assert eventually(lambda: (start.folder / "helper").exists() and start.read("helper") != "", LONG_S)
    helper = job.watch(int(start.read("helper")))
    start.gates[-2].let_pass(2)
    begun = time.monotonic()
    assert job.end() == 0, job.story
    assert gone_at_ns([helper], 0)
    assert time.monotonic() - begun >= 1.0
    naming = [line for line in job.errors.splitlines() if re.search(rf"\b{helper.pid}\b", line)]
    assert len(naming) == 1, job.story


# ---- signals that end nothing


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGRTMIN + 1], ids=str)
def test_a_signal_that_ends_nothing_is_ignored_and_reported_once(start: Launcher, number: int) -> None:
    job = run(start, SAVES)
    for _ in range(3):
        os.kill(job.agent.pid, number)
        settle(job)
    names = r"SIGRT|signal 35\b" if number == signal.SIGRTMIN + 1 else signal.Signals(number).name
    assert sum(bool(re.search(names, line)) for line in job.errors.splitlines()) == 1, job.story
    job.send(TERM)
    assert job.lines(2) == ["told SIGTERM"] * 2
    finish(start)
    assert job.end() == 128 + TERM, job.story
    assert saved(start) == 2


FORWARDED = f"""{HEAD}
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
child = os.fork()
if child == 0:
    pass_gate("finish")
    (folder / f"child.{{rank}}").write_text(" ".join(map(str, map(int, signal.sigpending()))))
    os._exit(0)
os.write(1, b"waits\\n")
signal.sigwait([signal.SIGUSR1])
os.write(1, b"told SIGUSR1\\n")
os.waitpid(child, 0)
"""


def test_a_signal_to_forward_reaches_the_workers_only(start: Launcher) -> None:
    job = run(start, FORWARDED, "--signals-to-forward=SIGUSR1", first_lines=["ready", "waits"] * 2)
    job.send(signal.SIGUSR1)
    assert job.lines(2) == ["told SIGUSR1"] * 2
    finish(start)
    assert job.end() == 0, job.story
    assert [start.read(f"child.{rank}") for rank in range(2)] == ["", ""]
