"""The common part of all workers: reports, and the three ways to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

FOLDER = Path(os.environ["PROGRAMS_FOLDER"])
TASK = os.environ["PROGRAMS_TASK"]


def name() -> str:
    """The name of this rank in reports. A replica group of torchft has a number of its own, and ranks that begin with 0."""
    return os.environ.get("REPLICA_GROUP_ID") or os.environ["RANK"]


def agent() -> str:
    """Return the agent that started this process: ``ferroelastic`` if an ancestor in this job has the thread of its engine."""
    pid = os.getppid()
    while True:
        process = Path(f"/proc/{pid}")
        try:
            if f"PROGRAMS_FOLDER={FOLDER}".encode() not in (process / "environ").read_bytes().split(b"\0"):
                return "torch"  # the process that started the job
            names = {path.read_text().strip() for path in process.glob("task/*/comm")}
            status = (process / "status").read_text()
        except OSError:  # it has ended
            return "torch"
        if "ferro-sup" in names:
            return "ferroelastic"
        pid = int(status.split("PPid:")[1].split()[0])


def attempt() -> int:
    """The number of starts of this rank before this one."""
    return len(list(FOLDER.glob(f"start.{name()}.*")))


def begin() -> int:
    """Report the start of this rank, and return the number of its attempt."""
    number = attempt()
    report = {
        "pid": os.getpid(),
        "agent": agent(),
        "restarts": os.environ.get("TORCHELASTIC_RESTART_COUNT"),
        "at_ns": time.monotonic_ns(),
    }
    write(f"start.{name()}.{number}", report)
    return number


def end(number: int, total: float) -> None:
    """Carry out the task after the collective call whose result is ``total``."""
    carry_out(number, total)
    if TASK in {"killed", "exit3"} and name() != "1" and number == 0:
        time.sleep(600)  # the agent ends this rank
    finish(number)


def carry_out(number: int, total: float) -> None:
    """Report the result, and fail or wait for a signal if the task says so."""
    rank = name()
    write(f"sum.{rank}.{number}", {"total": total, "world": int(os.environ["WORLD_SIZE"])})
    if rank == "1" and TASK == "killed" and number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "1" and TASK == "exit3":
        os._exit(3)
    if TASK == "held":
        hold(rank)


def finish(number: int) -> None:
    """Report the end of this rank."""
    write(f"done.{name()}.{number}", {})


def hold(rank: str) -> None:
    """Wait for SIGTERM, save for a while, and end with 0."""

    def save(_number: int, _frame: object) -> None:
        time.sleep(0.3)
        write(f"saved.{rank}", {})
        os._exit(0)

    signal.signal(signal.SIGTERM, save)
    write(f"held.{rank}", {})
    time.sleep(600)


def write(name: str, content: dict[str, object]) -> None:
    """Write a report in one step."""
    part = FOLDER / f".{name}"
    part.write_text(json.dumps(content))
    part.rename(FOLDER / name)


def free_port() -> int:
    """Return a port of the loopback interface that was free a moment ago, for programs that take no port 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
