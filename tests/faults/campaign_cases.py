"""The cases of the campaign of faults: jobs, their workers and helpers, and what is done to them and when."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from typing import NamedTuple

KILL, TERM, STOP, CONT = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT
KINDS = ("group", "setpgid", "setsid", "daemon", "cleanenv", "scrubbed", "deaf", "nested")
"""Helpers of workers, by what makes them hard to find or to end."""
MOST_PAUSE_S = 0.8

WORKER = """
import json, os, signal, subprocess, sys, time

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
case = json.loads(os.environ["CASE"])
folder, node, local_rank = os.environ["DIR"], int(os.environ["NODE"]), int(os.environ["LOCAL_RANK"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
number = node * case["nproc"] + local_rank
name = f"{number}.{attempt}"
count = 0
counter = os.open(f"{folder}/lines.{name}", os.O_RDWR | os.O_CREAT)

def note(kind, text):
    path = f"{folder}/{kind}.{name}"
    with open(path + "~", "w") as file:
        file.write(str(text))
    os.rename(path + "~", path)

def say():
    global count
    for stream in (1, 2):
        os.write(stream, b"line %d of %s\\n" % (count, name.encode()))
    count += 1
    os.pwrite(counter, b"%08d" % count, 0)

def end(kind, code):
    say()
    note(kind, code)
    os._exit(code)

for kind in case["helpers"][number]:
    if kind == "nested":
        command = [*case["nested"], f"{folder}/nested.py", name]
    else:
        command = [sys.executable, "-S", "-E", f"{folder}/helper.py", kind, name]
    env = {} if kind == "cleanenv" else None
    subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
# So the helpers are what they are to be, in most cases.
time.sleep(case["pause_s"])
note("ready", os.getpid())
end_at = time.monotonic() + case["life_s"][number]
while True:
    say()
    time.sleep(0.02)
    # Not sigtimedwait: of one that a suspension interrupts, Python says that it has got a signal.
    if signal.SIGTERM in signal.sigpending():
        time.sleep(case["save_s"])
        end("saved", 0)
    if time.monotonic() >= end_at:
        if number == 0 and attempt < case["failures"]:
            end("ended", 3)
        if case["is_finite"]:
            end("ended", 0)
"""

HELPER = """
import os, signal, sys, time

kind = sys.argv[1]
parent = os.getppid()
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif kind == "setpgid":
    os.setpgid(0, 0)
elif kind != "group":
    if kind == "daemon" and os.fork():
        os._exit(0)
    os.setsid()
    if kind == "daemon" and os.fork():
        os._exit(0)
if kind == "scrubbed":
    with open("/proc/self/stat", "rb") as stat:
        fields = stat.read().rpartition(b")")[2].split()
    first, last = int(fields[47]), int(fields[48])
    with open("/proc/self/mem", "r+b", 0) as memory:
        memory.seek(first)
        memory.write(bytes(last - first))
until = time.monotonic() + 120
while time.monotonic() < until:
    time.sleep(0.1)
    if kind == "group" and os.getppid() != parent:  # finishes by itself
        time.sleep(0.2)
        break
"""

NESTED = "import time\ntime.sleep(120)\n"


class Fault(NamedTuple):
    """A signal to one process of a job."""

    at_s: float
    """Seconds after the start of the job."""
    target: str
    """``agent``, ``guard`` or ``worker``."""
    number: signal.Signals
    which: int
    """Number of the node or the worker."""


@dataclass
class Case:
    """A job, and what is done to it."""

    seed: int
    index: int
    nodes: int
    nproc: int
    restarts: int
    failures: int
    """In so many attempts the first worker fails by itself."""
    is_finite: bool
    life_s: list[float]
    save_s: float
    pause_s: float
    helpers: list[list[str]]
    faults: list[Fault]
    last: tuple[signal.Signals, float] | None
    """Sent to the guards so many seconds after the workers have ended, when the agent is about to."""

    def __str__(self) -> str:
        faults = ", ".join(
            f"{fault.number.name} to {fault.target} {fault.which} at {fault.at_s:.3f} s" for fault in self.faults
        )
        return (
            f"--seed {self.seed} --only {self.index}: {self.nodes} nodes of {self.nproc}, {self.restarts} restarts, "
            f"{self.failures} failures, {'finite' if self.is_finite else 'endless'}, helpers {self.helpers}; {faults}"
            f"{f'; {self.last[0].name} to the guards at the end' if self.last else ''}"
        )


def make(seed: int, index: int) -> Case:
    """The case of a number: always the same."""
    chance = random.Random(f"{seed}.{index}")
    nodes = 2 if chance.random() < 0.15 else 1
    nproc = chance.choice([1, 2])
    restarts = chance.choice([0, 0, 1, 2])
    # Those that cost a whole grace are rarer.
    kinds = [kind for kind in KINDS if kind not in {"deaf", "nested"} or chance.random() < 0.2]
    faults: list[Fault] = []
    for _ in range(chance.choice([1, 1, 2, 3])):
        at_s = chance.uniform(0.0, 0.15) if chance.random() < 0.15 else chance.uniform(0.1, 1.4)
        target = chance.choice(["agent", "guard", "worker"])
        number = chance.choice([KILL, TERM, STOP])
        which = chance.randrange(nodes if target != "worker" else nodes * nproc)
        faults.append(Fault(at_s, target, number, which))
    killed = {(fault.target, fault.number) for fault in faults}
    if killed >= {("guard", KILL), ("agent", KILL)}:  # a suspended agent replaces no guard
        faults = [fault for fault in faults if (fault.target, fault.number) != ("agent", STOP)]
    for fault in [fault for fault in faults if fault.number == STOP]:
        faults.append(fault._replace(at_s=fault.at_s + chance.uniform(0.05, MOST_PAUSE_S), number=CONT))
    return Case(
        seed,
        index,
        nodes,
        nproc,
        restarts,
        failures=chance.choice([0, 0, 1, 2]),
        is_finite=chance.random() < 0.5,
        life_s=[chance.uniform(0.1, 1.0) for _ in range(nodes * nproc)],
        save_s=chance.uniform(0.05, 0.4),
        pause_s=chance.choice([0.0, 0.05, 0.1]),
        helpers=[chance.sample(kinds, chance.choice([0, 1, 2, 3])) for _ in range(nodes * nproc)],
        faults=sorted(faults),
        last=(chance.choice([KILL, STOP]), chance.choice([0.0, chance.uniform(0.0, 0.02)]))
        if chance.random() < 0.25
        else None,
    )
