"""A campaign of faults: agents, guards and workers of many jobs are killed, told to end and suspended at random moments.

    python -m tests.faults.campaign --number 1000 --parallel 4      # all cases of seed 0
    python -m tests.faults.campaign --seed 0 --only 17              # one of them once more

In each case nothing of the job is left, the exit code is one that follows from what was done, and no save of a worker and none of its lines is lost.
Prints a Markdown table, and ends with 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.campaign_cases import CONT, HELPER, KILL, NESTED, STOP, TERM, WORKER, Case, Fault, make
from tests.support.harness import FERRORUN, Job, Launcher, Process, gone_at_ns
from tests.support.ports import port_for_one
from tests.support.waiting import eventually, is_alive

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DETACHED = frozenset({"setpgid", "setsid", "daemon", "cleanenv", "scrubbed"})
"""Helpers that are no members of their worker's process group, and may outlive one that succeeds."""
TROUBLES = ("left behind", "wrong exit code", "lost save", "lost line", "guard not replaced", "stuck")

FAILED = 3
GRACE_S = 4
DEADLINE_S = 60.0
"""A case that takes longer is stuck."""
REPLACED_S = 5.0
SETTLE_S = 2.0
"""How long what was killed may take to be gone after the agent has ended, and after an agent that was killed."""
SETTLE_KILLED_S = 10.0
ENDS_WITHIN_S = 8.0
PATIENCE_S = 0.3
"""A job that has an end of its own, or has none, is told to end so long after the last fault."""


@dataclass
class Verdict:
    """What was wrong in a case, by the kind of trouble."""

    case: Case
    troubles: dict[str, list[str]] = field(default_factory=dict)
    story: str = ""
    seconds: float = 0.0

    def add(self, trouble: str, what: object) -> None:
        self.troubles.setdefault(trouble, []).append(str(what))

    def __str__(self) -> str:
        return f"{self.case}\n  {self.troubles}\n{self.story}"


def run(case: Case, folder: Path) -> Verdict:
    """Run one case, and leave nothing of it."""
    begun = time.monotonic()
    folder.mkdir(parents=True)
    trial = _Trial(case, folder)
    try:
        trial.run()
    finally:
        trial.verdict.story = "\n".join(job.story for job in trial.jobs)
        trial.clean_up()
    trial.verdict.seconds = time.monotonic() - begun
    return trial.verdict


class _Trial:
    """A case while it runs."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self.verdict = Verdict(case)
        self.launcher = Launcher(folder, zoo="")
        self.jobs: list[Job] = []
        self.held: dict[tuple[str, int], list[Process]] = {}
        """Those who are suspended, by the target and its number."""
        self.begun = time.monotonic()
        self.sent: Counter[tuple[str, signal.Signals, int]] = Counter()
        self.hit: set[tuple[int, signal.Signals]] = set()
        """Pids of workers that were signalled."""
        self.told_early: set[int] = set()
        """Nodes whose agent was told to end before a worker of it was ready."""
        self.killed_guards: set[int] = set()

    def run(self) -> None:
        case = self.case
        for name, text in (("helper.py", HELPER), ("nested.py", NESTED)):
            self.launcher.write(name, text)
        port = port_for_one()
        self.jobs = [self.start(node, port) for node in range(case.nodes)]
        for fault in case.faults:
            time.sleep(max(0.0, self.begun + fault.at_s - time.monotonic()))
            self.inflict(fault)
        agents = [job.agent for job in self.jobs]
        ends_by_itself = case.is_finite or case.failures > case.restarts
        # A worker that was to fail may have been told to end instead, and a node may wait for one that is gone.
        gone_at_ns(agents, ENDS_WITHIN_S if ends_by_itself else PATIENCE_S)
        for node in range(case.nodes):
            self.inflict(Fault(0.0, "agent", TERM, node))
        if case.last is not None:
            self.inflict_last(*case.last)
        gone_at_ns(agents, self.begun + DEADLINE_S - time.monotonic())
        for node, job in enumerate(self.jobs):
            if not job.agent.is_gone():
                self.verdict.add("stuck", f"node {node}")
        if "stuck" not in self.verdict.troubles:
            self.check()

    def start(self, node: int, port: int) -> Job:
        case = self.case
        options = (
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={port}"),
            *(f"--rdzv-conf=is_host={int(node == 0)}", f"--nnodes={case.nodes}", f"--nproc-per-node={case.nproc}"),
            *(f"--max-restarts={case.restarts}", f"--shutdown-timeout={GRACE_S}", "--tee=3"),
        )
        nested = [*FERRORUN, "--standalone", "--nproc-per-node=1", "--no-python", sys.executable, "-S", "-E"]
        told = {
            **{name: getattr(case, name) for name in ("nproc", "failures", "is_finite", "life_s")},
            **{name: getattr(case, name) for name in ("save_s", "pause_s", "helpers")},
            "nested": nested,
        }
        # Everything that comes of the job has the folder in its command line, and has the node's script there if it is the node's.
        worker = self.launcher.write(f"worker{node}.py", WORKER)
        command = (*FERRORUN, *options, "--no-python", sys.executable, "-S", "-E", worker)
        return self.launcher.start(*command, env={"NODE": str(node), "CASE": json.dumps(told)})

    # ---- faults

    def inflict_last(self, number: signal.Signals, delay_s: float) -> None:
        """Disturb the guards while their agents end."""
        eventually(
            lambda: (
                all(job.agent.is_gone() for job in self.jobs)
                or not any(map(is_alive, self.notes("ready").values() or [os.getpid()]))
            ),
            GRACE_S,
        )
        time.sleep(delay_s)
        for node in range(self.case.nodes):
            self.inflict(Fault(0.0, "guard", number, node))
        time.sleep(0.2 if number == STOP else 0.0)
        for node in range(self.case.nodes):
            self.inflict(Fault(0.0, "guard", CONT, node))

    def inflict(self, fault: Fault) -> None:
        """Send one signal, if there is somebody to send it to."""
        if fault.number == CONT:
            for process in self.held.pop((fault.target, fault.which), []):
                self.send(process, CONT)
        elif fault.target == "agent":
            self.to_agent(fault)
        elif fault.target == "guard":
            # The guard of a killed agent has work to do, and nobody replaces it.
            if fault.number != KILL or not self.sent["agent", KILL, fault.which]:
                self.to_guard(fault)
        else:
            self.to_worker(fault)

    def to_agent(self, fault: Fault) -> None:
        agent = self.jobs[fault.which].agent
        if agent.is_gone():
            return
        if fault.number == KILL:
            self.await_guard(fault.which)
        if fault.number == TERM and not self.of_node("ready", fault.which):
            self.told_early.add(fault.which)
        self.deliver(fault, agent)

    def to_guard(self, fault: Fault) -> None:
        for pid in self.guards(fault.which):
            with suppress(ProcessLookupError):
                process = self.jobs[fault.which].watch(pid)
                if pid in self.guards(fault.which):  # the number is not somebody else's
                    self.killed_guards |= {pid} if fault.number == KILL else set()
                    self.deliver(fault, process)

    def to_worker(self, fault: Fault) -> None:
        running = {name: pid for name, pid in self.notes("ready").items() if int(name.partition(".")[0]) == fault.which}
        for pid in running.values():  # of the attempts before they are gone
            process = self.watch(pid, fault.which // self.case.nproc)
            if process is not None:
                self.hit.add((pid, fault.number))
                self.deliver(fault, process)

    def deliver(self, fault: Fault, process: Process) -> None:
        self.sent[fault.target, fault.number, fault.which] += 1
        self.send(process, fault.number)
        if fault.number == STOP:
            self.held.setdefault((fault.target, fault.which), []).append(process)

    def send(self, process: Process, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process.fd, number)

    def watch(self, pid: int, node: int) -> Process | None:
        """A process of the job; ``None`` if it is gone, or the number is somebody else's by now."""
        try:
            process = self.jobs[node].watch(pid)
        except ProcessLookupError:
            return None
        return process if str(self.folder) in _command(pid) else None

    def guards(self, node: int) -> list[int]:
        """Guards are children of their agent, whether they were forked or executed."""
        agent = self.jobs[node].agent.pid
        pids = map(int, filter(str.isdigit, os.listdir("/proc")))
        return [pid for pid in pids if _name(pid) == "ferro-guard" and _parent(pid) == agent]

    def await_guard(self, node: int) -> None:
        """A guard that was killed is replaced, before its agent is."""
        agent = self.jobs[node].agent
        if self.killed_guards and not eventually(
            lambda: agent.is_gone() or bool(set(self.guards(node)) - self.killed_guards), REPLACED_S
        ):
            self.verdict.add("guard not replaced", f"node {node}")

    # ---- what has become of the job

    def check(self) -> None:
        verdict = self.verdict
        codes = [job.process.wait() for job in self.jobs]
        for node, code in enumerate(codes):
            if code not in self.codes(node):
                verdict.add("wrong exit code", f"node {node}: {code}, not {sorted(self.codes(node))}")
        eventually(lambda: not self.leftovers(codes), SETTLE_KILLED_S if -KILL in codes else SETTLE_S)
        for left in self.leftovers(codes).items():
            verdict.add("left behind", left)
        for name, pid in self.notes("ready").items():
            is_excused = (pid, KILL) in self.hit or self.sent["agent", KILL, self.node(name)]
            if not is_excused and not any((self.folder / f"{kind}.{name}").exists() for kind in ("saved", "ended")):
                verdict.add("lost save", f"{name} of {pid}")
        for node, job in enumerate(self.jobs):
            if not self.sent["agent", KILL, node]:
                self.check_lines(node, job)

    def check_lines(self, node: int, job: Job) -> None:
        while job._read(0):
            pass
        for stream, text in (("stdout", job.output.decode()), ("stderr", job.errors)):
            found = set(re.findall(r"^\[default\d\]:(line \d+ of \d+\.\d+)$", text, re.MULTILINE))
            for name, count in self.of_node("lines", node).items():
                lost = [n for n in range(count) if f"line {n} of {name}" not in found]
                if lost:
                    self.verdict.add("lost line", f"{stream} of {name}: {lost} of {count}")

    def codes(self, node: int) -> set[int]:
        """Exit codes that follow from what was done, whatever came first."""
        case = self.case
        kills, told = (sum(n == number for _, n in self.hit) for number in (KILL, TERM))
        codes = {0} if told or (case.is_finite and case.failures <= case.restarts) else set()
        if case.failures + kills > case.restarts:
            codes |= {FAILED} if case.failures else set()
            codes |= {128 + KILL} if kills else set()
        if any(self.sent["agent", TERM, other] for other in range(case.nodes)):  # the end of the host is that of all
            codes.add(128 + TERM)
        if node in self.told_early:  # nobody has asked for the signal yet: it does what it does to any program
            codes.add(-TERM)
        if self.sent["agent", KILL, node]:
            codes.add(-KILL)
        if case.nodes > 1:
            codes.add(1)
            # Its own workers may have succeeded when the agent that knows of the others is killed.
            codes |= {0} if any(self.has_succeeded(name) for name in self.of_node("ready", node)) else set()
        return codes

    def leftovers(self, codes: Sequence[int]) -> dict[int, str]:
        """Processes of the job that are to be gone."""
        return {pid: line for pid, line in self.processes().items() if not self.may_stay(line, codes)}

    def may_stay(self, command: str, codes: Sequence[int]) -> bool:
        """Whether a process is a helper that has left its worker's group, and whose worker succeeded."""
        words = command.split()
        if "helper.py" not in command or words[-2] not in DETACHED:
            return False
        name = words[-1]
        if codes[self.node(name)] == -KILL:
            # Unless it was killed as the very last thing that happened, when all was over.
            return all(self.has_succeeded(other) for other in self.notes("ready") if is_same_attempt(name, other))
        return self.has_succeeded(name)

    def has_succeeded(self, name: str) -> bool:
        """Whether a worker has succeeded and not because its agent told it to end."""
        return self.notes("ended").get(name, FAILED) == 0 or (self.notes("ready").get(name, 0), TERM) in self.hit

    def node(self, name: str) -> int:
        return int(name.partition(".")[0]) // self.case.nproc

    def of_node(self, kind: str, node: int) -> dict[str, int]:
        return {name: value for name, value in self.notes(kind).items() if self.node(name) == node}

    def notes(self, kind: str) -> dict[str, int]:
        """The numbers in files that workers have left, by the worker's number and the attempt."""
        paths = [path for path in self.folder.glob(f"{kind}.*") if not path.name.endswith("~")]
        return {path.name.partition(".")[2]: int(path.read_text() or "0") for path in sorted(paths)}

    def processes(self) -> dict[int, str]:
        """Processes that have the folder in their command line: it stays when the environment is gone."""
        found = {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            command = _command(pid)
            if str(self.folder) in command:
                found[pid] = command
        return found

    def clean_up(self) -> None:
        def end() -> bool:
            left = self.processes()
            for pid in left:
                with suppress(OSError):
                    process = Process(pid)
                    try:
                        if str(self.folder) in _command(pid):
                            signal.pidfd_send_signal(process.fd, KILL)
                    finally:
                        process.close()
            return not left

        eventually(end, SETTLE_KILLED_S)
        for job in self.jobs:
            job.clean_up()


def is_same_attempt(name: str, other: str) -> bool:
    """Whether two workers are of the same attempt."""
    return name.partition(".")[2] == other.partition(".")[2]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def run_all(cases: Iterable[Case], folder: Path, parallel: int, progress: Any = None) -> list[Verdict]:
    """Run cases, several at a time; ``progress`` is told of each verdict."""

    def one(case: Case) -> Verdict:
        verdict = run(case, folder / f"campaign-{os.getpid()}-{case.index}")
        if progress is not None:
            progress(verdict)
        return verdict

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(one, cases))


def table(verdicts: Sequence[Verdict]) -> str:
    """A Markdown table: cases with each fault, and how many of them had each trouble."""
    rows = [f"| {' | '.join(['fault', 'cases', *TROUBLES])} |", f"|{' --- |' * (2 + len(TROUBLES))}"]

    def add(title: str, chosen: Sequence[Verdict]) -> None:
        counts = [sum(trouble in verdict.troubles for verdict in chosen) for trouble in TROUBLES]
        rows.append(f"| {title} | {' | '.join(map(str, [len(chosen), *counts]))} |")

    for target in ("agent", "guard", "worker"):
        for number in (KILL, TERM, STOP):
            wanted = (target, number)
            add(
                f"{number.name} to {target}",
                [v for v in verdicts if wanted in {(fault.target, fault.number) for fault in v.case.faults}],
            )
    add("SIGKILL or SIGSTOP to guard while the agent ends", [v for v in verdicts if v.case.last is not None])
    add("all", verdicts)
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--number", type=int, default=1000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one case to run")
    parser.add_argument("--parallel", type=int, default=4, help="cases at the same time")
    args = parser.parse_args()
    indices = range(args.number) if args.only is None else [args.only]
    done = bad = 0

    def progress(verdict: Verdict) -> None:
        nonlocal done, bad
        done, bad = done + 1, bad + bool(verdict.troubles)
        if verdict.troubles:
            print(f"{verdict}\n", flush=True)
        if done % 50 == 0:
            print(f"{done} of {len(indices)} cases, {bad} with troubles", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        verdicts = run_all((make(args.seed, index) for index in indices), Path(name), args.parallel, progress)
    print(table(verdicts))
    return int(any(verdict.troubles for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
