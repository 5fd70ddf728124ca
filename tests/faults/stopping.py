"""Jobs that are told to end in every state of their agent, and what becomes of the checkpoints of their workers.

    python -m tests.faults.stopping                      # ferrorun
    python -m tests.faults.stopping --side torchrun      # the same on torchrun, which has no stop after success

Prints a Markdown table: how many combinations of signal, nodes and state of the standard streams there were, and in how many a checkpoint was lost.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
from tests.support.harness import FERRORUN, Job, Launcher, gone_at_ns
from tests.support.ports import port_for_one
from tests.support.waiting import LONG_S, eventually, is_alive, is_parked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

STATES = ("start", "rendezvous", "run", "failure", "restart", "success", "barrier")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
STDIO = ("whole", "full", "closed")
SIDES = {"torchrun": (sys.executable, "-m", "torch.distributed.run"), "ferrorun": FERRORUN}
TITLES = {
    "start": "workers are being started",
    "rendezvous": "rendezvous",
    "run": "workers run",
    "failure": "stop after the last failure",
    "restart": "stop before a restart",
    "success": "stop after success",
    "barrier": "exit barrier",
}

NPROC = 2
FAILED = 3
AT_ONCE = 6
"""Combinations that run at the same time."""
TOLD_S = 1.5
"""Workers hear of a signal within this time. A console that does not take a line within a second is to cost nothing."""
PROMPT_S = 2.0
"""The agent ends within this time after its workers have."""
HOLD_S = 0.1
"""The stop goes on for so long after the last signal: a build that does not wait has the time to kill."""
SAVE_S = 0.1

# Number of the node and of the worker come from the test: they do not depend on who hosts the rendezvous.
WORKER = f"""
import os, signal, time

signals = {[int(number) for number in SIGNALS]}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
folder, state, node, nodes = os.environ["DIR"], os.environ["STATE"], int(os.environ["NODE"]), int(os.environ["NODES"])
local_rank, attempt = int(os.environ["LOCAL_RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
number = {NPROC} * node + local_rank
is_last = local_rank == {NPROC} - 1

def note(kind, text):
    path = f"{{folder}}/{{kind}}.{{number}}.{{attempt}}"
    with open(path + "~", "w") as file:
        file.write(str(text))
    os.rename(path + "~", path)

def pass_gate(name):
    gate = os.open(f"{{folder}}/{{name}}", os.O_RDONLY)
    os.read(gate, 1)

def save():
    pass_gate("finish")
    time.sleep({SAVE_S})
    note("saved", sorted(map(int, signal.sigpending())))
    os._exit(0)

note("ready", os.getpid())
if state == "success" or (state == "barrier" and node == 0):
    pass_gate("begin")
    if state == "success" and is_last and os.fork() == 0:
        note("helper", os.getpid())
        save()
    os._exit(0)
if state in ("failure", "restart") and is_last and node == nodes - 1:
    pass_gate("begin")
    os._exit({FAILED})
signal.sigwait(signals)
note("told", time.monotonic_ns())
save()
"""


class Case(NamedTuple):
    """A combination: the state in which the first signal finds the agent, and the rest."""

    state: str
    number: signal.Signals
    nodes: int
    stdio: str

    def __str__(self) -> str:
        return f"{self.state}-{self.number.name}-{self.nodes}-{self.stdio}"


@dataclass
class Outcome:
    """What became of one combination."""

    case: Case
    lost: list[str] = field(default_factory=list)
    """Workers that were ready, were told to end, and did not save."""
    is_reached: bool = True
    """Whether the job came into the state at all."""
    wrong: list[str] = field(default_factory=list)
    """Whatever else is not as it should be."""
    story: str = ""

    def __str__(self) -> str:
        return f"{self.case}: lost saves {self.lost}; wrong {self.wrong}\n{self.story}"


def combinations(states: Iterable[str] = STATES, nodes: Iterable[int] = (1, 2)) -> list[Case]:
    """All combinations. On one node nobody waits in an exit barrier."""
    return [
        Case(state, number, count, stdio)
        for state in states
        for count in nodes
        for number in SIGNALS
        for stdio in STDIO
        if (state, count) != ("barrier", 1)
    ]


def run_all(cases: Sequence[Case], folder: Path, side: str = "ferrorun") -> list[Outcome]:
    """Run combinations, several at a time."""
    with ThreadPoolExecutor(AT_ONCE if side == "ferrorun" else 2) as pool:
        return list(pool.map(lambda case: run(case, folder / str(case), side), cases))


def run(case: Case, folder: Path, side: str = "ferrorun") -> Outcome:
    """Bring a job into a state, send the signal, and see how it ends."""
    folder.mkdir(parents=True)
    stop = _Stop(case, folder, side)
    try:
        stop.run()
    except _NotReachedError as error:
        stop.outcome.is_reached = False
        stop.outcome.wrong.append(str(error))
    finally:
        stop.outcome.story = "\n".join(job.story for job in stop.jobs)
        stop.clean_up()
    return stop.outcome


def with_stdio(stdio: str, command: Sequence[str], folder: Path) -> tuple[str, ...]:
    """A command that has its standard streams in a state: ``full`` needs :func:`full_pipe` in the folder."""
    streams = {"whole": "", "closed": "<&- >&- 2>&-", "full": f"> {folder}/full 2> {folder}/full"}[stdio]
    return ("/bin/sh", "-c", f'exec "$@" {streams}', "sh", *command)


def full_pipe(folder: Path) -> int:
    """Make a named pipe that takes nothing more, and that nobody reads; the descriptor that holds it open."""
    path = folder / "full"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            os.write(fd, b"\n" * 4096)
    except BlockingIOError:
        return fd


class _NotReachedError(Exception):
    """A job did not come into the state in which it was to get the signal."""


class _Stop:
    """One combination while it runs."""

    def __init__(self, case: Case, folder: Path, side: str) -> None:
        self.case = case
        self.side = side
        self.outcome = Outcome(case)
        self.launcher = Launcher(folder, zoo="")
        self.folder = folder
        self.begin, self.finish = self.launcher.gate("begin"), self.launcher.gate("finish")
        self.full = full_pipe(folder) if case.stdio == "full" else None
        chance = random.Random(str(case))
        self.host = chance.randrange(case.nodes)
        self.order = chance.sample(range(case.nodes), case.nodes)
        if case.state == "barrier" and self.host == 1:
            self.order = [0, 1]  # the host would take the node that has finished with it
        self.delay_s = chance.uniform(0.005, 0.5)
        self.sent_ns: dict[int, int] = {}
        self.jobs: list[Job] = []

    def run(self) -> None:
        script = self.launcher.write("worker.py", WORKER)
        self.jobs = [self.start(node, port, script) for port in [port_for_one()] for node in range(self.case.nodes)]
        getattr(self, f"reach_{self.case.state}")()
        ended = [job.process.poll() for job in self.jobs]
        if ended != [None] * len(self.jobs):
            raise _NotReachedError(f"ended before the signal: {ended}")
        for node in self.order:
            if self.sent_ns:
                time.sleep(self.delay_s)
            self.sent_ns[node] = time.monotonic_ns()
            self.jobs[node].send(self.case.number)
        if not eventually(self.all_know, LONG_S):
            self.outcome.wrong.append("not all workers were told to end")
        time.sleep(HOLD_S)
        self.finish.let_pass(4 * NPROC)
        finish_ns = time.monotonic_ns()
        gone = gone_at_ns([job.agent for job in self.jobs], 60 if self.side == "torchrun" else 20)
        self.check([gone.get(job.agent.pid) for job in self.jobs], finish_ns)

    def start(self, node: int, port: int, script: str) -> Job:
        case, is_torchrun = self.case, self.side == "torchrun"
        nodes = case.nodes + (case.state == "rendezvous")  # one that does not come
        arguments = [
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={port}", f"--nnodes={nodes}"),
            f"--rdzv-conf=is_host={int(node == self.host)}",
            *(f"--nproc-per-node={NPROC}", f"--max-restarts={int(case.state == 'restart')}"),
            *(() if is_torchrun else ("--shutdown-timeout=60", "--monitor-interval=600")),
            *("--no-python", sys.executable, "-S", "-E", script),
        ]
        command = with_stdio(case.stdio, (*SIDES[self.side], *arguments), self.folder)
        env = {"STATE": case.state, "NODE": str(node), "NODES": str(case.nodes)}
        return self.launcher.start(*command, env=env)

    # ---- states

    def reach_start(self) -> None:
        agent = self.jobs[self.order[0]].agent.pid
        self.wait(lambda: any(_is_worker(pid) for pid in _children(agent)), "a worker starts")

    def reach_rendezvous(self) -> None:
        for node, job in enumerate(self.jobs):
            status = psutil.CONN_LISTEN if node == self.host else psutil.CONN_ESTABLISHED
            self.wait(lambda pid=job.agent.pid, status=status: _has_socket(pid, status), f"node {node} in rendezvous")  # type: ignore[misc]
        self.wait(lambda: all(map(self.is_waiting, self.jobs)), "the agents wait")

    def reach_run(self) -> None:
        self.wait(lambda: len(self.pids("ready")) == NPROC * self.case.nodes, "all workers ready")

    def reach_failure(self) -> None:
        self.reach_run()
        self.begin.let_pass()
        # torchrun tells the other node of a failure only when that one comes to a rendezvous.
        nodes = 1 if self.side == "torchrun" else self.case.nodes
        self.wait(lambda: len(self.pids("told")) >= NPROC * nodes - 1, "the others are told to end")

    reach_restart = reach_failure

    def reach_success(self) -> None:
        self.reach_run()
        self.begin.let_pass(NPROC * self.case.nodes)
        workers = self.pids("ready").values()
        self.wait(lambda: len(self.pids("helper")) == self.case.nodes and not any(map(is_alive, workers)), "success")
        self.wait(lambda: all(map(self.is_waiting, self.jobs)), "the agents wait")
        if not all(map(is_alive, self.pids("helper").values())):
            raise _NotReachedError("a helper that was left behind is gone before the signal")

    def reach_barrier(self) -> None:
        self.reach_run()
        self.begin.let_pass(NPROC)
        workers = {name: pid for name, pid in self.pids("ready").items() if _node(name) == 0}
        self.wait(lambda: not any(map(is_alive, workers.values())), "the workers of node 0 have ended")
        self.wait(lambda: self.is_waiting(self.jobs[0]), "the agent of node 0 waits")
        if sum(map(is_alive, self.pids("ready").values())) != NPROC:
            raise _NotReachedError("the workers of node 1 do not run")

    def is_waiting(self, job: Job) -> bool:
        """Whether an agent has got to where it waits. That of torchrun looks again and again."""
        if self.side == "torchrun":
            time.sleep(1.0)
            return True
        return is_parked(job.agent.pid)

    # ---- what happened

    def check(self, gone_ns: list[int | None], finish_ns: int) -> None:
        case, wrong = self.case, self.outcome.wrong
        self.outcome.lost += [
            f"{name} of {pid}, {self.times(name, gone_ns, finish_ns)}"
            for name, pid in self.to_save()
            if not self.has(f"saved.{name}")
        ]
        for node, job in enumerate(self.jobs):
            ended_ns = gone_ns[node]
            if ended_ns is None:
                wrong.append(f"node {node} is stuck")
                continue
            code = job.process.wait()
            left = job.processes() if self.side == "ferrorun" or not eventually(lambda j=job: not j.processes()) else {}  # type: ignore[misc]
            wrong += [f"node {node} left behind: {left}"] if left else []
            if self.side == "torchrun":
                continue
            if code not in self.codes(node):
                wrong.append(f"node {node} ended with {code}, not {self.codes(node)}")
            if ended_ns - finish_ns > (PROMPT_S + SAVE_S) * 1e9:
                wrong.append(f"node {node} ended {(ended_ns - finish_ns) / 1e9:.2f} s after the workers could")
            if "Traceback" in job.errors and "/ferroelastic/" in job.errors:  # workers that are interrupted have theirs
                wrong.append(f"node {node}: a traceback")
        if self.side == "ferrorun":
            if list(self.folder.glob("ready.*.1")):
                wrong.append("a restart after the signal")
            if case.state in {"start", "run", "barrier"}:
                late = {name: (at - self.sent_ns[_node(name)]) / 1e9 for name, at in self.pids("told").items()}
                wrong += [f"worker {name} told {late_s:.2f} s late" for name, late_s in late.items() if late_s > TOLD_S]

    def times(self, name: str, gone_ns: list[int | None], finish_ns: int) -> str:
        """What happened to a worker and its agent, in seconds after the signal to the agent."""
        sent_ns = self.sent_ns[_node(name)]
        moments = {"told": self.pids("told").get(name), "may finish": finish_ns, "agent gone": gone_ns[_node(name)]}
        return ", ".join(
            f"{what}: {'never' if at is None else f'{(at - sent_ns) / 1e9:.3f} s'}" for what, at in moments.items()
        )

    def codes(self, node: int) -> set[int]:
        """Exit codes that an agent may end with."""
        case, of_signal = self.case, 128 + self.case.number
        if case.state == "success":
            return {0}
        if case.state == "failure":
            return {FAILED} if node == case.nodes - 1 else {FAILED, of_signal}
        # Also that of an agent which hears of the end of the host before its own signal comes.
        return {of_signal}

    def to_save(self) -> list[tuple[str, int]]:
        """Name and pid of those who have something to save: workers that were ready and did not end before, and helpers."""
        case = self.case
        if case.state == "success":
            return list(self.pids("helper").items())
        failing = f"{NPROC * case.nodes - 1}.0" if case.state in {"failure", "restart"} else ""
        workers = self.pids("ready").items()
        return [(n, pid) for n, pid in workers if n != failing and (case.state, _node(n)) != ("barrier", 0)]

    def all_know(self) -> bool:
        """Whether everybody who is to be told to end has been, or has ended."""
        told = [] if self.case.state == "success" else self.to_save()
        return all(self.has(f"told.{name}") or not is_alive(pid) for name, pid in told)

    def pids(self, kind: str) -> dict[str, int]:
        """The numbers in files that workers have left, by the worker's number and the attempt."""
        paths = [path for path in self.folder.glob(f"{kind}.*") if not path.name.endswith("~")]
        return {path.name.partition(".")[2]: int(path.read_text()) for path in sorted(paths)}

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        is_true = False

        def is_over() -> bool:
            nonlocal is_true
            is_true = condition()
            return is_true or any(job.agent.is_gone() for job in self.jobs)

        # torchrun waits for ever for a reader of its standard error.
        eventually(is_over, 40 if self.side == "torchrun" else LONG_S)
        if not is_true:
            ended = [job.process.poll() for job in self.jobs]
            raise _NotReachedError(f"not reached: {what}; the agents ended with {ended}")

    def clean_up(self) -> None:
        for job in self.jobs:
            job.clean_up()
        for gate in self.launcher.gates:
            gate.close()
        if self.full is not None:
            os.close(self.full)


def _node(name: str) -> int:
    """The node of a worker."""
    return int(name.partition(".")[0]) // NPROC


def _children(parent: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(name))
    return found


def _is_worker(pid: int) -> bool:
    """Whether a process is the program of a worker, and not yet or no more something else."""
    try:
        return b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _has_socket(pid: int, status: str) -> bool:
    try:
        return any(connection.status == status for connection in psutil.Process(pid).net_connections("tcp"))
    except psutil.Error:
        return False


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table: combinations and those that lost a save, by state and standard streams."""
    rows = [f"| state | {' | '.join(STDIO)} |", f"|{' --- |' * (len(STDIO) + 1)}"]
    for state in STATES:
        cells = []
        for stdio in STDIO:
            found = [outcome for outcome in outcomes if (outcome.case.state, outcome.case.stdio) == (state, stdio)]
            lost, missed = (
                sum(bool(outcome.lost) for outcome in found),
                sum(not outcome.is_reached for outcome in found),
            )
            cells.append(
                f"{len(found)}, lost {lost}{f', {missed} did not get there' if missed else ''}" if found else ""
            )
        if any(cells):
            rows.append(f"| {TITLES[state]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", choices=list(SIDES), default="ferrorun")
    parser.add_argument("--state", choices=STATES, action="append", help="only this one")
    parser.add_argument("--verbose", action="store_true", help="tell of each combination that went wrong")
    args = parser.parse_args()
    states = args.state or [state for state in STATES if (args.side, state) != ("torchrun", "success")]
    with tempfile.TemporaryDirectory() as name:
        outcomes = run_all(combinations(states), Path(name), args.side)
    bad = [outcome for outcome in outcomes if outcome.lost or outcome.wrong]
    if args.verbose:
        print("\n\n".join(map(str, bad)))
    print(table(outcomes))
    print(f"\n{len(outcomes)} combinations, {sum(bool(outcome.wrong) for outcome in outcomes)} wrong otherwise")
    return int(bool(bad) and args.side == "ferrorun")


if __name__ == "__main__":
    sys.exit(main())
