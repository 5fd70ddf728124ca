"""Every way to end is accounted for, exactly, and reaches ferrorun's own exit code."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING
from urllib.request import urlopen

import pytest
from tests.support.harness import ALONE, Launcher, gone_at_ns
from tests.support.ports import free_port
from tests.support.waiting import LONG_S, eventually

from ferroelastic.multiprocessing import DefaultLogsSpecs, PContext, RunProcsResult, start_processes
from ferroelastic.utils.process_state import read_proc_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

pytestmark = pytest.mark.engine

HARMLESS = {
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGURG,
    signal.SIGWINCH,
}
FATAL = sorted(number for number in signal.valid_signals() if number not in HARMLESS)
CORE_DUMPING = [signal.SIGQUIT, signal.SIGILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGSYS]
CROWD = 64


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as closing:
        yield closing


def start(stack: ExitStack, zoo: str, *words: tuple[str, ...]) -> PContext:
    """Start the zoo with these words, one worker for each."""
    ranks = range(len(words))
    context = start_processes(
        "zoo", zoo, {rank: words[rank] for rank in ranks}, {rank: {} for rank in ranks}, DefaultLogsSpecs(os.devnull)
    )
    stack.callback(context.close, signal.SIGKILL, 0)
    return context


def finish(contexts: Iterable[PContext]) -> list[RunProcsResult]:
    results = [context.wait(LONG_S) for context in contexts]
    assert None not in results
    return [result for result in results if result is not None]


# ---- of one worker


def test_all_exit_codes(stack: ExitStack, zoo: str) -> None:
    # Each in a group of its own: in one, the first failure would end the others.
    success, *failed = finish([start(stack, zoo, ("exit", str(code))) for code in range(256)])
    assert not success.is_failed()
    assert success.return_values == {0: None}
    assert [result.failures[0].exitcode for result in failed] == list(range(1, 256))
    accounts = [result.failures[0].exit for result in failed]
    assert [(account.code, account.signal) for account in accounts if account] == [
        (code, None) for code in range(1, 256)
    ]


def test_all_fatal_signals(stack: ExitStack, zoo: str) -> None:
    results = finish([start(stack, zoo, ("signal", str(int(number)))) for number in FATAL])
    assert [result.failures[0].exitcode for result in results] == [-number for number in FATAL]
    accounts = [result.failures[0].exit for result in results]
    assert [(account.code, account.signal, account.core_dumped) for account in accounts if account] == [
        (None, number, False) for number in FATAL
    ]


@pytest.mark.parametrize("code", [0, 1, 2, 77, 126, 127, 128, 143, 254, 255])
def test_the_exit_code_of_ferrorun_is_that_of_the_worker(launch: Launcher, code: int) -> None:
    assert launch("--no-python", launch.zoo, "exit", str(code), launcher=ALONE).end() == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM, *CORE_DUMPING, signal.SIGRTMAX])
def test_the_exit_code_of_ferrorun_tells_the_signal(launch: Launcher, number: int) -> None:
    assert launch("--no-python", launch.zoo, "signal", str(int(number)), launcher=ALONE).end() == 128 + number


def test_the_exit_code_of_ferrorun_is_that_of_the_first_failure(launch: Launcher) -> None:
    """Not that of the lowest rank, nor of a peer that fails because of it."""
    gate = launch.gate()
    script = f"""
        if [ $RANK = 3 ]; then read x < {gate.path}; exit 42; fi
        trap 'exit 9' TERM
        echo ready
        while :; do sleep 1000 & wait; done
    """
    job = launch(*launch.shell(script), nproc=4)
    assert job.lines(3) == ["ready"] * 3
    gate.let_pass()
    assert job.end() == 42
    assert re.findall(r"exitcode  : (\S+)", job.errors) == ["42"]


# ---- of many at once


def test_a_crowd_that_dies_in_the_same_moment_is_accounted_for_one_by_one(stack: ExitStack, zoo: str) -> None:
    at_ns = time.monotonic_ns() + 500_000_000
    codes = [rank % 7 + 1 for rank in range(CROWD)]
    context = start(stack, zoo, *(("exit-at", str(at_ns), str(code)) for code in codes))
    pids = context.pids()
    (result,) = finish([context])

    assert result.is_failed()
    assert {*result.failures} | {*result.stopped} == {*range(CROWD)}
    assert not {*result.failures} & {*result.stopped}
    assert result.return_values == {}
    for rank, ended in {**result.failures, **result.stopped}.items():
        assert ended.pid == pids[rank]
        assert ended.exit is not None
        assert ended.exit.monotonic_ns >= at_ns
        # Who was not quick enough was stopped by SIGTERM, for the failure of another.
        assert ended.exitcode == codes[rank] or (rank in result.stopped and ended.exitcode == -signal.SIGTERM)
    orders = sorted(ended.exit.order for ended in (*result.failures.values(), *result.stopped.values()) if ended.exit)
    assert orders == list(range(CROWD))


def test_a_crowd_that_succeeds_in_the_same_moment_is_a_success(stack: ExitStack, zoo: str) -> None:
    at_ns = time.monotonic_ns() + 500_000_000
    (result,) = finish([start(stack, zoo, *[("exit-at", str(at_ns), "0")] * CROWD)])
    assert result.return_values == dict.fromkeys(range(CROWD))
    assert (result.failures, result.stopped) == ({}, {})


def test_a_job_whose_workers_all_die_in_the_same_moment_comes_back(launch: Launcher) -> None:
    gate = launch.gate()
    script = """
        echo $$
        read x < "$DIR/gate"
        if [ "$TORCHELASTIC_RESTART_COUNT" = 1 ]; then exit 0; fi
        exec "$ZOO" exit-at "$(cat "$DIR/moment")" $((LOCAL_RANK + 1)) > /dev/null
    """
    job = launch("--max-restarts=1", *launch.shell(script), nproc=CROWD)
    first = [job.watch(int(line)) for line in job.lines(CROWD)]
    launch.write("moment", str(time.monotonic_ns() + 1_000_000_000))
    gate.let_pass(CROWD)
    assert len(gone_at_ns(first)) == CROWD
    job.lines(CROWD)
    gate.let_pass(CROWD)
    assert job.end() == 0


# ---- unknown

KEEPS_STATUSES = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 15)
"""Whether a pidfd keeps the status of a process that was reaped."""

REAPED_BY_OTHERS = """
import os, queue, signal, sys, threading
from ferroelastic.multiprocessing import DefaultLogsSpecs, start_processes

zoo, how, code = sys.argv[1:]
# From Linux 6.15 on a pidfd keeps the status.
release = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))
is_kept = release >= (6, 15) and os.environ.get("FERROELASTIC_PIDFD") != "0"
reaped = queue.Queue()

def reap(started, pid):
    started.wait()
    try:
        while os.waitpid(-1, 0)[0] != pid[0]:
            pass
        reaped.put(True)
    except ChildProcessError:  # the engine was faster
        reaped.put(False)

if how == "ignore":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    started, pid = threading.Event(), []
    thread = threading.Thread(target=reap, args=(started, pid))
    thread.start()
    script = f"read x < {os.environ['DIR']}/gate; exec {zoo} exit {code}"
    context = start_processes("a", "/bin/sh", {0: ("-c", script)}, {0: {}}, DefaultLogsSpecs(os.devnull))
    pid.append(context.pids()[0])
    started.set()
    with open(f"/proc/{thread.native_id}/stat") as stat:
        while how == "reap" and stat.read().rpartition(")")[2].split()[0] != "S":
            stat.seek(0)
    os.write(gate := os.open(os.environ["DIR"] + "/gate", os.O_WRONLY), b"\\n")
    os.close(gate)
    result = context.wait(60)
    thread.join()
    is_lost = reaped.get() or how == "ignore"
    # Lost or not, a status is never made up: who knows it says so, who does not says failure.
    expected = 255 if is_lost and not is_kept else int(code)
    assert result.is_failed() == (expected != 0), result
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == ({0: expected} if expected else {})
    if is_lost:
        break
print("lost")
"""


@pytest.mark.parametrize("how", ["reap", "ignore"])
@pytest.mark.parametrize("code", ["0", "3"])
def test_a_status_that_another_reaper_took_is_reported_or_is_a_failure(launch: Launcher, how: str, code: str) -> None:
    """``subprocess.Popen`` says 0 then."""
    if how == "reap" and os.environ.get("FERROELASTIC_PIDFD") == "0":
        pytest.skip("a thread of the engine waits for the status in the kernel, and nearly always gets it first")
    launch.gate()
    job = launch.start(sys.executable, "-c", REAPED_BY_OTHERS, launch.zoo, how, code)
    assert job.end() == 0, job.errors
    assert job.lines(1) == ["lost"]
    is_told = KEEPS_STATUSES and os.environ.get("FERROELASTIC_PIDFD") != "0"
    assert ("exit status of process" in job.errors) != is_told


# ---- at the same time as something else


def test_a_probe_that_comes_with_an_exit_is_answered(launch: Launcher) -> None:
    """The engine finds both in one turn: it is stopped while they happen."""
    port = free_port()
    job = launch(
        "--max-restarts=1",
        *launch.shell("echo $$; exec sleep 1000"),
        nproc=1,
        launcher=ALONE,
        env={"TORCHELASTIC_HEALTH_CHECK_PORT": str(port)},
    )
    worker = job.watch(int(job.lines(1)[0]))
    job.settle(1)
    with socket.create_connection(("127.0.0.1", port), LONG_S) as probe:
        # Connections are accepted in their order: with this answer, the probe's has been too.
        urlopen(f"http://127.0.0.1:{port}/readyz", timeout=LONG_S).close()
        job.send(signal.SIGSTOP)
        assert eventually(lambda: read_proc_state(job.process.pid) == "T")
        worker.kill()
        probe.sendall(b"GET /readyz HTTP/1.1\r\nHost: the-agent\r\n\r\n")
        job.send(signal.SIGCONT)
        assert probe.recv(4096).startswith(b"HTTP/1.1 "), job.story
    job.watch(int(job.lines(1)[0])).kill()
    assert job.end() == 128 + signal.SIGKILL, job.story
