"""Jobs with warm workers: a light module in place of torch, workers that tell whether they are warm, and the processes behind them."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.support.harness import ALONE
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.harness import Job, Launcher

__all__ = [
    "COLD_LINES",
    "WORKER",
    "WarmProcesses",
    "cold_lines",
    "expect_parked",
    "name_of",
    "start_warm",
    "warm_processes",
]

WORKER = r"""
import os, sys
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
os.write(1, f"{attempt} {'warm' if 'light' in sys.modules else 'cold'}\n".encode())  # one write, because ranks share the pipe
if attempt < int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
    with open(os.environ["DIR"] + "/gate", "rb", buffering=0) as gate:
        gate.read(1)
    sys.exit(3)
"""
"""Prints its attempt and whether it is warm. Fails when the test lets it pass; succeeds in the last attempt."""

COLD_LINES = ("The zygote prepares no further workers: ", "start without warm imports: ", "has no warm imports: ")
"""The lines of the log that give the reason of cold starts."""

_RECVMSG = {"x86_64": 47, "aarch64": 212}[platform.machine()]


class WarmProcesses(NamedTuple):
    """Process ids of a job's zygotes that wait for an order, and of children that wait for their command."""

    zygotes: list[int]
    parked: list[int]


def start_warm(
    launch: Launcher,
    *options: str,
    light: str = "",
    worker: str = WORKER,
    imports: str = "light",
    restarts: int = 1,
    nproc: int = 1,
    program: tuple[str, ...] | None = None,
    env: Mapping[str, str] | None = None,
) -> Job:
    """Start a job with warm workers. The module ``light`` is beside the script of the workers."""
    if not (launch.folder / "light.py").exists():
        launch.write("light.py", light)
    script = launch.write("worker.py", worker)
    flags = ("--warm-workers", f"--warm-imports={imports}", f"--max-restarts={restarts}", *options)
    return launch(*flags, *(program or (script,)), launcher=ALONE, nproc=nproc, env=env)


def cold_lines(job: Job) -> list[str]:
    """The reasons of cold starts in the log."""
    lines = [line for line in job.errors.splitlines() if not line.startswith("{")]  # without the events
    found = []
    for line in lines:
        for text in COLD_LINES:
            _, at, reason = line.partition(text)
            if at:
                found.append(reason)
    return found


def warm_processes(job: Job) -> WarmProcesses:
    """The idle zygotes and the parked children of a job."""
    zygotes: list[int] = []
    parked: list[int] = []
    for pid in job.processes():
        sockets = 0
        with suppress(OSError):
            if name_of(pid) != "ferro-warm" or not re.match(rf"{_RECVMSG} ", Path(f"/proc/{pid}/syscall").read_text()):
                continue
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                sockets += os.readlink(descriptor).startswith("socket:")
            # A child has a channel of its own beside that of the zygote.
            (parked if sockets > 1 else zygotes).append(pid)
    return WarmProcesses(zygotes, parked)


def expect_parked(job: Job, count: int) -> WarmProcesses:
    """Wait until a zygote is idle and ``count`` children are parked."""
    found = WarmProcesses([], [])

    def is_there() -> bool:
        nonlocal found
        found = warm_processes(job)
        return len(found.zygotes) == 1 and len(found.parked) == count

    assert eventually(is_there, LONG_S), f"{found} instead of {count} parked workers: {job.story}"
    return found


def name_of(pid: int) -> str:
    """The name of a process; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
