"""An agent whose Python is stuck still stops its workers; a worker that is stuck in the kernel ends the job, as a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from tests.support.harness import ALONE, Launcher

pytestmark = pytest.mark.engine

HELD_NS = 2_000_000_000

# An agent, one thread of which enters C with the GIL for two seconds. A worker fails half a second after that.
GIL_HELD = f"""
import ctypes, os, sys, threading, time
from pathlib import Path
from tests.support.rendezvous_handlers import AloneRendezvous
from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec
from ferroelastic.multiprocessing import DefaultLogsSpecs

folder = Path(os.environ["DIR"])

class Agent(LocalElasticAgent):
    def _wait_for_event(self, timeout_s):
        if holder.ident is None:
            holder.start()
        super()._wait_for_event(timeout_s)

def hold():
    for rank in range(3):
        with open(folder / f"there.{{rank}}") as there:  # a FIFO, which waits for the worker
            there.read()
    now = time.monotonic_ns()
    (folder / "held").write_text(str(now))
    (folder / "moment").write_text(str(now + {HELD_NS // 4}))
    with open(folder / "gate", "w") as gate:
        gate.write("\\n")
    ctypes.PyDLL(None).usleep({HELD_NS // 1000})
    (folder / "released").write_text(str(time.monotonic_ns()))

holder = threading.Thread(target=hold)
spec = WorkerSpec("stuck", 4, AloneRendezvous(), entrypoint="/bin/sh", args=(sys.argv[1],), max_restarts=0)
result = Agent(spec, DefaultLogsSpecs(str(folder / "logs"))).run()
holder.join()
(failure,) = result.failures.values()
sys.exit(failure.exitcode)
"""

# Ranks 0 to 2 note when they are told to end; rank 3 fails at the moment that it is given.
PEERS = """
[ $RANK = 3 ] && { read x < "$DIR/gate"; exec "$ZOO" exit-at "$(cat "$DIR/moment")" 9; }
exec "$PYTHON" -S -E "$DIR/peer.py"
"""
PEER = """
import os, signal, time
folder, rank = os.environ["DIR"], os.environ["RANK"]
signalled = open(f"{folder}/signalled.{rank}", "wb", 0)

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open(f"{folder}/there.{rank}", "w").close()
signal.sigwait([signal.SIGTERM])
signalled.write(b"%d" % time.monotonic_ns())
"""


def test_peers_are_signalled_while_python_is_stuck_with_the_gil(launch: Launcher) -> None:
    launch.gate()
    for rank in range(3):
        os.mkfifo(launch.folder / f"there.{rank}")
    launch.write("peer.py", PEER)
    worker = launch.write("worker.sh", PEERS)
    job = launch.start(sys.executable, "-c", GIL_HELD, worker, env={"PYTHON": sys.executable})
    assert job.end() == 9, job.story
    (held,), (failed,), (released,) = (launch.pids(name) for name in ("held", "moment", "released"))
    signalled = sorted(launch.pids("signalled.*"))
    assert len(signalled) == 3
    moments = [held, failed, *signalled, released]
    assert all(earlier < later for earlier, later in pairwise(moments)), moments
    assert released - held >= HELD_NS


# An agent with a watchdog and a health server, one thread of which holds the GIL from the line "held" until a line comes in.
GIL_HELD_UNTIL_TOLD = """
import ctypes, os, sys, threading
from tests.support.rendezvous_handlers import AloneRendezvous
from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec
from ferroelastic.multiprocessing import DefaultLogsSpecs

class Agent(LocalElasticAgent):
    def _wait_for_event(self, timeout_s):
        if holder.ident is None:
            print(self._health_check_server.board.port, flush=True)
            holder.start()
        super()._wait_for_event(timeout_s)

holder = threading.Thread(target=lambda: ctypes.PyDLL(None).system(b"echo held; read line"))
spec = WorkerSpec("stuck", 1, AloneRendezvous(), entrypoint=sys.executable, args=(sys.argv[1],), max_restarts=0)
result = Agent(spec, DefaultLogsSpecs(os.environ["DIR"] + "/logs")).run()
holder.join()
(failure,) = result.failures.values()
print(failure.message.splitlines()[0], flush=True)
sys.exit(-failure.exitcode)
"""
HANGS = """
import os, signal
from ferroelastic import timer
life = os.open(os.environ["DIR"] + "/life", os.O_WRONLY)
open(os.environ["DIR"] + "/gate").read(1)
with timer.expires(after=0.1, scope="step", client=timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"])):
    while True:  # the signal that asks for its stacks ends a pause
        signal.pause()
"""


def test_a_deadline_kills_and_a_probe_is_answered_while_python_is_stuck_with_the_gil(launch: Launcher) -> None:
    gate = launch.gate()
    os.mkfifo(launch.folder / "life")
    worker = launch.write("worker.py", HANGS)
    switches = {"TORCHELASTIC_ENABLE_FILE_TIMER": "1", "TORCHELASTIC_HEALTH_CHECK_PORT": "0"}
    job = launch.start(sys.executable, "-c", GIL_HELD_UNTIL_TOLD, worker, env=switches, stdin=subprocess.PIPE)
    port, held = job.lines(2)
    assert held == "held"
    with open(launch.folder / "life", "rb") as life:
        gate.let_pass(1)
        assert life.read() == b"", "its end is the worker's"
    with pytest.raises(HTTPError) as answer, urlopen(f"http://127.0.0.1:{port}/livez", timeout=20):
        pass
    assert answer.value.code == 503
    assert answer.value.read().startswith(b"the interpreter is stuck: no Python thread could run for ")
    answer.value.close()
    assert job.process.stdin is not None
    job.process.stdin.write(b"go\n")
    job.process.stdin.close()
    (cause,) = job.lines(1)
    assert job.end() == 9, job.story
    assert cause.startswith("timer 'step' expired: "), cause


# ferrorun, for which one worker is in uninterruptible sleep: nobody can make a process do that.
UNINTERRUPTIBLE = """
import sys
from ferroelastic.agent.server import local_elastic_agent
from tests.faults import alone

original = local_elastic_agent.read_proc_state

def read_proc_state(pid):
    with open(f"/proc/{pid}/environ") as environ:
        return "D" if "LOCAL_RANK=1" in environ.read().split("\\0") else original(pid)

local_elastic_agent.read_proc_state = read_proc_state
sys.exit(alone.main())
"""


@pytest.mark.parametrize("restarts", [0, 3])
def test_a_worker_that_is_stuck_in_the_kernel_fails_the_job(launch: Launcher, restarts: int) -> None:
    job = launch(
        f"--max-restarts={restarts}",
        "--monitor-interval=0.01",
        "--no-python",
        launch.zoo,
        "sleep",
        launcher=(sys.executable, "-c", UNINTERRUPTIBLE, "--rdzv-backend=alone"),
        env={"TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT": "0.1"},
    )
    assert job.end() == 1
    assert job.processes() == {}
    assert job.errors.count('"torchelastic.worker.status.START"') == 2  # a restart would not help
    assert "stuck in uninterruptible sleep (D-state)" in job.errors
    assert "rank      : 1 (local_rank: 1)" in job.errors
    assert "rank      : 0" not in job.errors


def test_a_worker_that_is_not_stuck_is_left_alone(launch: Launcher) -> None:
    gate = launch.gate()
    job = launch(
        "--monitor-interval=0.01",
        *launch.shell('echo ready; read x < "$DIR/gate"'),
        launcher=ALONE,
        env={"TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT": "0.01"},
    )
    assert job.lines(2) == ["ready"] * 2
    job.settle(2)
    gate.let_pass(2)
    assert job.end() == 0
