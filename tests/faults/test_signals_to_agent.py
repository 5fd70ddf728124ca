"""A signal to the agent ends the job, wherever it finds the agent."""

from __future__ import annotations

import io
import logging
import os
import random
import select
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.support.harness import ALONE, Job, Launcher
from tests.support.rendezvous_handlers import AloneRendezvous
from tests.support.waiting import LONG_S, eventually

from ferroelastic._signals import Handling
from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec
from ferroelastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException, start_processes
from ferroelastic.multiprocessing.errors import ProcessFailure
from ferroelastic.multiprocessing.tail_log import TailLog
from ferroelastic.utils.process_state import read_proc_state

pytestmark = pytest.mark.engine

NEVER_LOOKS = "--monitor-interval=600"
NEVER_KILLS = "--shutdown-timeout=600"
ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
MOMENTS = 30
STARTED = '"torchelastic.worker.status.START"'

# A handler could be called for just before a pause, and then not until the next signal: these take theirs from the mask.
DEAF = """
import signal

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("ready", flush=True)
while True:
    signal.sigwait([signal.SIGTERM])
    print("told", flush=True)
"""
OBEDIENT = f"""
import signal

signals = {[int(number) for number in ENDING]}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
print("ready", flush=True)
print(signal.sigwait(signals).name, flush=True)
"""


def ready(job: Job, count: int = 2, *, nproc: int = 2) -> None:
    assert job.lines(count) == ["ready"] * count
    job.settle(nproc)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_job_at_once(launch: Launcher, number: signal.Signals) -> None:
    """The agent waits without limit and would not look at its workers by itself."""
    job = launch(NEVER_LOOKS, NEVER_KILLS, "--no-python", launch.zoo, "sleep")
    ready(job)
    job.send(number)
    assert job.end() == 128 + number
    assert job.processes() == {}


@pytest.mark.parametrize("number", ENDING)
def test_workers_get_the_signal_that_the_agent_got(launch: Launcher, number: signal.Signals) -> None:
    job = launch(NEVER_LOOKS, NEVER_KILLS, *launch.python(OBEDIENT))
    ready(job)
    job.send(number)
    assert job.end() == 128 + number
    assert job.lines(2) == [number.name] * 2


@pytest.mark.parametrize("restarts", [0, 1])
@pytest.mark.parametrize("first", ["workers", "agent"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_die_of_the_signal_at_the_same_instant_have_not_failed(
    launch: Launcher, number: signal.Signals, first: str, restarts: int
) -> None:
    """Slurm signals all processes of a step at one instant."""
    job = launch(NEVER_LOOKS, f"--max-restarts={restarts}", *launch.shell("echo $$; exec sleep 600"))
    workers = [job.watch(int(pid)) for pid in job.lines(2)]
    job.settle(2)
    job.send(signal.SIGSTOP)
    assert eventually(lambda: read_proc_state(job.process.pid) == "T")
    targets = [job.process.pid, *(worker.pid for worker in workers)]
    for pid in targets if first == "agent" else reversed(targets):
        os.kill(pid, number)
    # Zombies: the agent sees the ends of the workers and its own signal together.
    assert eventually(lambda: [read_proc_state(worker.pid) for worker in workers] == ["Z", "Z"])
    job.send(signal.SIGCONT)
    assert job.end() == 128 + number
    assert job.errors.count(STARTED) == 2
    assert f"Received {int(number)} death signal" in job.errors
    assert "Root Cause" not in job.errors


def test_a_signal_to_the_workers_alone_is_a_failure(launch: Launcher) -> None:
    job = launch(NEVER_LOOKS, "--max-restarts=1", *launch.shell("echo $$; exec sleep 600"))
    os.kill(int(job.lines(2)[0]), signal.SIGTERM)
    job.settle(4)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM


def test_a_signal_that_is_not_handled_by_default_ends_the_job_if_asked_to(launch: Launcher) -> None:
    job = launch("--signals-to-handle=SIGUSR1", NEVER_LOOKS, "--no-python", launch.zoo, "sleep", launcher=ALONE)
    ready(job)
    job.send(signal.SIGUSR1)
    assert job.end() == 128 + signal.SIGUSR1
    assert job.processes() == {}


def test_nohup_keeps_the_job_alive(launch: Launcher) -> None:
    gate = launch.gate()
    command = [
        "nohup",
        *ALONE,
        "--event-log-handler=console",
        "--nproc-per-node=2",
        NEVER_LOOKS,
        *launch.shell('echo ready; read x < "$DIR/gate"'),
    ]
    job = launch.start(*command)
    ready(job)
    job.send(signal.SIGHUP)
    # The kernel drops an ignored signal when it is sent, so that there is nothing to wait for.
    status = Path(f"/proc/{job.process.pid}/status").read_text()
    (ignored,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn:"))
    assert ignored & 1 << signal.SIGHUP - 1
    gate.let_pass(2)
    assert job.end() == 0


@pytest.mark.parametrize("last", [signal.SIGINT, signal.SIGQUIT])
def test_a_second_interrupt_ends_the_grace(launch: Launcher, last: signal.Signals) -> None:
    job = launch(NEVER_KILLS, NEVER_LOOKS, *launch.python(DEAF))
    ready(job)
    job.send(signal.SIGTERM)
    assert job.lines(2) == ["told"] * 2
    job.send(signal.SIGINT)
    job.send(last)
    while last == signal.SIGINT and job.process.poll() is None:
        job.send(last)  # two at once are one to the kernel
    assert job.end() == 128 + signal.SIGTERM
    assert job.processes() == {}


def test_an_interrupt_in_the_stop_after_a_failure_keeps_its_grace_and_the_second_ends_it(launch: Launcher) -> None:
    gate = launch.gate()
    script = f"""
        [ $RANK = 0 ] && {{ read x < {gate.path}; exit 3; }}
        trap 'echo told' TERM
        echo ready
        while :; do sleep 1000 & wait; done
    """
    job = launch("--max-restarts=5", NEVER_KILLS, NEVER_LOOKS, *launch.shell(script))
    ready(job, 1)
    gate.let_pass()
    assert job.lines(1) == ["told"]
    job.send(signal.SIGTERM)
    while job.process.poll() is None:
        job.send(signal.SIGINT)
    # Of two that wait for the interpreter it takes the lower number first.
    assert job.end() in {128 + signal.SIGTERM, 128 + signal.SIGINT}
    assert job.processes() == {}


@pytest.mark.parametrize("seed", range(MOMENTS))
def test_a_signal_at_any_moment_is_neither_lost_nor_leaves_a_worker(launch: Launcher, seed: int) -> None:
    """Of a job that does nothing but start workers, see one fail, stop the others, and start again."""
    chance = random.Random(seed)
    is_storm = seed % 3 == 0
    peer, grace_s = chance.choice([("sleep", 600), ("deaf", 0)])
    script = f'echo started; [ $RANK = 1 ] && exec "$ZOO" exit 1; exec "$ZOO" {peer} > /dev/null'
    job = launch.start(
        *ALONE,
        "--nproc-per-node=4",
        "--max-restarts=1000000",
        "--restart-backoff=0",
        f"--shutdown-timeout={grace_s}",
        NEVER_LOOKS,
        *launch.shell(script),
    )
    number = chance.choice(ENDING)
    if chance.random() < 0.7:
        job.lines(1)
    # Not to wait for something: the moment is the fault that is injected.
    select.select([], [], [], chance.uniform(0.0, 0.2))
    job.send(number)
    while is_storm and job.process.poll() is None:
        job.send(number)
    code = job.end()
    # Where the agent was killed after its work was done, its guard may still look for somebody to end.
    assert not job.processes() if code > 0 else eventually(lambda: not job.processes(), LONG_S), job.story
    # Before there are workers, and after them, a signal does to the agent what it does to any Python program.
    assert code == 128 + number or (code == -number and is_storm) or (code != 0 and not job.output), job.story


# ---- signals that something swallows, or that find the agent starting


class Bell(io.StringIO):
    """Rings, once, when something is written to it."""

    has_rung = False

    def write(self, text: str) -> int:
        if not self.has_rung:
            self.has_rung = True
            signal.raise_signal(signal.SIGTERM)
        return super().write(text)


def test_a_signal_while_a_log_record_is_written_is_not_lost(
    zoo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    bell = Bell()
    handler = logging.StreamHandler(bell)
    logger = logging.getLogger("ferroelastic")
    logger.addHandler(handler)
    spec = WorkerSpec("a", 1, AloneRendezvous(), entrypoint=zoo, args=("exit", "1"), max_restarts=10_000)
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(str(tmp_path)))
    try:
        with pytest.raises(SignalException):
            agent.run()
    finally:
        logger.removeHandler(handler)
        del agent
    assert bell.has_rung


def test_a_signal_while_the_last_lines_are_copied_is_not_lost(tmp_path: Path) -> None:
    tail = TailLog("a", {0: str(tmp_path / "log")}, sys.__stdout__).start()
    native = tail._tail
    assert native is not None

    def finish(timeout_s: float) -> object:
        signal.raise_signal(signal.SIGTERM)
        return native.finish(timeout_s)

    tail._tail = mock.Mock(finish=finish)
    try:
        with Handling("SIGTERM"), pytest.raises(SignalException):
            tail.stop()
    finally:
        native.finish(0.0)


def test_a_signal_while_detached_helpers_are_looked_for_does_not_spare_them(
    zoo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shutdown looks for them again. The worker had failed before the signal came, and that is the outcome."""

    class Run:
        keep_detached = end_detached = False
        looks = 0

        def hold_detached(self, _sessions: list[int], *, are_native: bool) -> None:
            assert are_native
            self.looks += 1
            if self.looks == 1:
                signal.raise_signal(signal.SIGTERM)

    run = Run()
    monkeypatch.setattr("ferroelastic._leftovers.current", lambda: run)
    spec = WorkerSpec("a", 1, AloneRendezvous(), entrypoint=zoo, args=("exit", "3"), max_restarts=0)
    result = LocalElasticAgent(spec, DefaultLogsSpecs(str(tmp_path))).run()
    assert run.looks == 2
    assert [failure.exitcode for failure in result.failures.values()] == [3]


def test_a_signal_while_a_failure_is_noted_does_not_lose_it(
    zoo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def failure(**fields: Any) -> ProcessFailure:
        made.append(fields)
        if len(made) == 1:
            signal.raise_signal(signal.SIGTERM)
        return ProcessFailure(**fields)

    monkeypatch.setattr("ferroelastic.multiprocessing._context.ProcessFailure", failure)
    spec = WorkerSpec("a", 1, AloneRendezvous(), entrypoint=zoo, args=("exit", "3"), max_restarts=0)
    result = LocalElasticAgent(spec, DefaultLogsSpecs(str(tmp_path))).run()
    assert made
    assert [failure.exitcode for failure in result.failures.values()] == [3]


def test_a_signal_during_the_start_is_handed_on_with_the_grace_that_was_asked_for(zoo: str) -> None:
    closed: list[tuple[object, ...]] = []

    def arm(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    def close(context: PContext, death_sig: signal.Signals = signal.SIGTERM, timeout: float = 30) -> None:
        closed.append((death_sig, timeout))
        original(context, death_sig, timeout)

    original = PContext.close
    with (
        mock.patch.object(PContext, "_arm", arm),
        mock.patch.object(PContext, "close", close),
        pytest.raises(SignalException),
    ):
        start_processes("a", zoo, {0: ("sleep",)}, {0: {}}, DefaultLogsSpecs(os.devnull), shutdown_timeout=7)
    assert closed == [(signal.SIGINT, 7)]
