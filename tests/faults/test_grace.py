"""One deadline for the whole group: the grace is kept to the end by those who need it, and nobody gets more."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import Launcher, gone_at_ns
from tests.support.waiting import LONG_S, eventually

from ferroelastic.utils.process_state import read_proc_state

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.engine

NPROC = 8
GRACE_NS = 2_000_000_000
LATE_NS = 200_000_000

# Notes when SIGTERM reaches it and goes on; rank 8, where there is one, passes the gate and fails.
DEAF = """
import os, signal, sys, time
from pathlib import Path

folder, attempt, rank = Path(os.environ["DIR"]), os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
if attempt == "1":
    sys.exit(0)
signalled = open(folder / f"signalled.{rank}", "wb", 0)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print(os.getpid(), flush=True)
if rank == "8":
    with open(folder / "gate") as gate:
        os.read(gate.fileno(), 1)
    (folder / "failed").write_text(str(time.monotonic_ns()))
    os._exit(5)
while True:
    signal.sigwait([signal.SIGTERM])
    signalled.write(b"%d" % time.monotonic_ns())
"""

# Notes that SIGTERM has reached it, and obeys.
OBEDIENT = """
import os, signal
from pathlib import Path

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print(os.getpid(), flush=True)
if os.environ["RANK"] == "0":
    os.kill(os.getpid(), signal.SIGSTOP)
signal.sigwait([signal.SIGTERM])
(Path(os.environ["DIR"]) / f"obeyed.{os.environ['RANK']}").touch()
"""


def check(gone_ns: Sequence[int], signalled_ns: Sequence[int], earliest_ns: int) -> None:
    """Nobody was killed before the grace was over, which began at ``earliest_ns`` or later, and nobody lived on after it."""
    assert len(gone_ns) == len(signalled_ns) == NPROC
    assert min(signalled_ns) >= earliest_ns
    assert min(gone_ns) >= earliest_ns + GRACE_NS
    assert max(gone_ns) <= min(signalled_ns) + GRACE_NS + LATE_NS


@pytest.mark.parametrize(("restarts", "code"), [(0, 5), (1, 0)], ids=["failure", "restart"])
def test_the_grace_when_a_worker_fails(launch: Launcher, restarts: int, code: int) -> None:
    gate = launch.gate()
    job = launch("--shutdown-timeout=2", f"--max-restarts={restarts}", *launch.python(DEAF), nproc=NPROC + 1)
    workers = [job.watch(int(line)) for line in job.lines(NPROC + 1)]
    gate.let_pass()
    gone = gone_at_ns(workers)
    failed = int(launch.read("failed"))
    del gone[min(gone, key=lambda pid: gone[pid])]  # the one that failed
    check(list(gone.values()), launch.pids("signalled.[0-7]"), failed)
    assert job.end() == code


def test_the_grace_after_a_signal_to_the_agent(launch: Launcher) -> None:
    job = launch("--shutdown-timeout=2", *launch.python(DEAF), nproc=NPROC)
    workers = [job.watch(int(line)) for line in job.lines(NPROC)]
    job.settle(NPROC)
    told = time.monotonic_ns()
    job.send(signal.SIGTERM)
    check(list(gone_at_ns(workers).values()), launch.pids("signalled.*"), told)
    assert job.end() == 128 + signal.SIGTERM


@pytest.mark.parametrize("how", ["failure", "signal"])
def test_a_stopped_worker_is_continued_so_that_it_can_obey(launch: Launcher, how: str) -> None:
    """Long before the grace of 600 seconds is over."""
    job = launch("--shutdown-timeout=600", *launch.python(OBEDIENT))
    workers = [job.watch(int(line)) for line in job.lines(2)]
    assert eventually(lambda: any(read_proc_state(worker.pid) == "T" for worker in workers), LONG_S)
    job.settle(2)
    if how == "signal":
        job.send(signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM
        assert (launch.folder / "obeyed.1").exists()
    else:
        next(worker for worker in workers if read_proc_state(worker.pid) != "T").kill()
        assert job.end() == 128 + signal.SIGKILL
    assert (launch.folder / "obeyed.0").exists()
    assert all(worker.is_gone() for worker in workers)


def test_a_worker_that_obeys_ends_the_wait(launch: Launcher) -> None:
    job = launch("--shutdown-timeout=600", *launch.shell("echo $$; exec sleep 1000"))
    workers = [job.watch(int(line)) for line in job.lines(2)]
    job.settle(2)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    assert all(worker.is_gone() for worker in workers)
