"""Scripts that fail, the cause of each failure as data, and a way to run them under any launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.support.harness import FERRORUN, ROOT
from tests.support.two_nodes import on_loopback
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from tests.support.harness import Job, Launcher

SCRIPTS = ROOT / "tests" / "acceptance" / "failing"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
SIDES = {"ferrorun": FERRORUN, "torchrun": TORCHRUN, "recorded": TORCHRUN}
"""Launchers. ``recorded`` is torchrun with ``@record`` around the script."""
_MEMORY_BYTES = 640 << 20
_SHM_BYTES = 1 << 20
_CGROUPS = Path("/sys/fs/cgroup")


class UnavailableError(Exception):
    """This machine lacks a condition of a case. The text names it."""


@dataclass(frozen=True)
class Cause:
    """The true cause of a failure. A report is correct if it has all of it."""

    kind: str
    rank: int | None
    """``None`` if all ranks fail in the same way."""
    exit_code: int | None = None
    signal: str | None = None
    texts: tuple[str, ...] = ()
    """Regular expressions for the text of the error, or for the source of the signal. All must match the report."""
    senders: tuple[str | None, ...] = (None,)
    """The kinds of sender that are true, ``None`` without a signal."""
    exception: str | None = None
    """Type of the Python exception."""
    advice: str | None = None
    """Cause for which the report must have advice."""


@dataclass(frozen=True)
class Case:
    """A job that fails, and the cause of its failure."""

    title: str
    script: str
    cause: Cause
    code: int
    """Exit code of ``ferrorun``."""
    uses_torch: bool = False
    nodes: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    """Options that only ``ferrorun`` has."""
    conditions: Callable[[], AbstractContextManager[Sequence[str]]] = lambda: nullcontext(())
    """Makes the environment in which the job fails. Gives the words before the command."""
    disturb: Callable[[Launcher, Sequence[Job]], None] = lambda _launcher, _jobs: None
    """Acts on the running job."""


class Ending(NamedTuple):
    """The end of a job."""

    consoles: list[str]
    """Standard error of each agent, in the order of the nodes."""
    outputs: list[str]
    """Standard output of each agent."""
    codes: list[int | None]
    """Exit code of each agent, ``None`` if the agent was killed by the test or did not end in time."""


def run(case: Case, launch: Launcher, side: str, *options: str, limit_s: float = LONG_S) -> Ending:
    """Run a case under one of the ``SIDES`` until all agents have ended. Agents that do not end in time are stopped.

    Raises:
        UnavailableError: this machine lacks a condition of the case.
    """
    own = (*case.options, *options) if side == "ferrorun" else ()
    script = [*([str(SCRIPTS / "recorded.py")] if side == "recorded" else []), str(SCRIPTS / case.script)]
    with case.conditions() as before:
        if case.nodes == 1:
            commands: Sequence[tuple[str, ...]] = [(*SIDES[side], "--standalone", "--nproc-per-node=2")]
        else:
            commands = [(*one, "--nproc-per-node=1") for one in on_loopback(SIDES[side], "2", "join_timeout=10")]
        jobs = [launch.start(*before, *command, *own, *script, env=case.env) for command in commands]
        case.disturb(launch, jobs)
        codes = [_code(job, limit_s) for job in jobs]
    return Ending([job.errors for job in jobs], [job.output.decode(errors="replace") for job in jobs], codes)


def _code(job: Job, limit_s: float) -> int | None:
    ends = eventually(job.agent.is_gone, limit_s)
    if not ends:
        job.send(signal.SIGTERM)
    code = job.end()
    return code if ends and code != -signal.SIGKILL else None


def _pid(launch: Launcher, name: str) -> int:
    """The process id that a worker writes into a file."""
    path = launch.folder / name
    assert eventually(path.exists, LONG_S), launch.jobs[0].story
    return int(path.read_text())


def _kill_by_hand(launch: Launcher, jobs: Sequence[Job]) -> None:
    subprocess.run(["sh", "-c", f"kill -9 {_pid(launch, 'pid')}"], check=True)


def _kill_by_program(launch: Launcher, jobs: Sequence[Job]) -> None:
    program = launch.folder / "memory-janitor"
    program.write_text("#!/bin/sh\nkill -TERM $1\n")
    program.chmod(0o755)
    subprocess.run([program, str(_pid(launch, "pid"))], check=True)


def _lose_a_node(launch: Launcher, jobs: Sequence[Job]) -> None:
    _pid(launch, "trains.0")
    worker = _pid(launch, "trains.1")
    jobs[1].send(signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)


@contextmanager
def _in_memory_cgroup() -> Iterator[Sequence[str]]:
    """A cgroup with a limit below the cgroup of this process, of version 1 or 2."""
    folder, limit = _memory_folder()
    group = folder / f"ferro-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        raise UnavailableError(f"no memory cgroup can be made in {folder}: {error.strerror}") from error
    try:
        if not (group / limit).exists():
            raise UnavailableError(f"the memory controller is not delegated to {folder}")
        (group / limit).write_text(str(_MEMORY_BYTES))
        yield ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    finally:
        eventually(lambda: _has_removed(group))


def _memory_folder() -> tuple[Path, str]:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    paths = {controllers: path.lstrip("/") for _, controllers, path in (line.split(":", 2) for line in lines)}
    if "memory" in paths:
        return _CGROUPS / "memory" / paths["memory"], "memory.limit_in_bytes"
    return _CGROUPS / paths.get("", ""), "memory.max"


def _has_removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:  # a process is left
        return False
    return True


@contextmanager
def _with_small_shm() -> Iterator[Sequence[str]]:
    """A mount namespace in which ``/dev/shm`` has 1 MiB."""
    inside = f'mount -t tmpfs -o size={_SHM_BYTES} tmpfs /dev/shm && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", inside, "sh")
    try:
        subprocess.run([*before, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"/dev/shm cannot be mounted in a namespace: {error}") from error
    yield before


@contextmanager
def _in_the_folder() -> Iterator[Sequence[str]]:
    """The folder of the job as working directory, which gets the core."""
    yield ("sh", "-c", 'cd "$DIR" && exec "$@"', "sh")


_SENDER = r"(?i)\bsen(?:t by|der)\b"
"""The report has a line about the sender of the signal."""

CASES: dict[str, Case] = {
    "typo": Case(
        "A typo in the loop of all ranks",
        "typo.py",
        Cause("exit", None, 1, texts=(r"has no attribute 'learing_rate'",), exception="AttributeError"),
        1,
    ),
    "missing-import": Case(
        "A missing package",
        "missing_import.py",
        Cause(
            "exit",
            None,
            1,
            texts=(r"ModuleNotFoundError: No module named 'fused_attention_kernels'",),
            exception="ModuleNotFoundError",
            advice="missing_module",
        ),
        1,
    ),
    "without-cuda": Case(
        "`.cuda()` with a torch that has no CUDA",
        "without_cuda.py",
        Cause(
            "exit",
            None,
            1,
            texts=(r"Torch not compiled with CUDA enabled|no NVIDIA driver",),
            exception="AssertionError",
        ),
        1,
        uses_torch=True,
    ),
    "assert-in-collective": Case(
        "An assertion in rank 1, while rank 0 is in a collective operation",
        "assert_in_collective.py",
        Cause("exit", 1, 1, texts=(r"token 50257 is not in the vocabulary",), exception="AssertionError"),
        1,
        uses_torch=True,
    ),
    "out-of-memory": Case(
        "Rank 1 is killed by the kernel's OOM killer, in a cgroup with a limit of 640 MiB",
        "out_of_memory.py",
        Cause(
            "signal", 1, signal="SIGKILL", texts=(r"(?i)\bOOM.killer",), senders=("oom_killer",), advice="oom_killer"
        ),
        137,
        conditions=_in_memory_cgroup,
    ),
    "shm-full": Case(
        "A data loader fills /dev/shm",
        "shm_full.py",
        Cause(
            "exit",
            None,
            1,
            texts=(r"No space left on device|[Bb]us error",),
            exception="RuntimeError",
            advice="shm_full",
        ),
        1,
        uses_torch=True,
        conditions=_with_small_shm,
    ),
    "segmentation-fault": Case(
        "A segmentation fault in C, in rank 1",
        "segmentation_fault.py",
        Cause("signal", 1, signal="SIGSEGV", texts=(r"SIGSEGV",), senders=("unknown",)),
        139,
    ),
    "aborted": Case(
        "An assertion in C aborts rank 1",
        "aborted.py",
        Cause("signal", 1, signal="SIGABRT", texts=(r"SIGABRT", r"ring\.c:41: push: Assertion"), senders=("unknown",)),
        134,
    ),
    "exit-3": Case("`sys.exit(3)` in rank 1", "exit_3.py", Cause("exit", 1, 3, texts=(r"(?i)exit.?code\W+3\b",)), 3),
    "os-exit": Case(
        "`os._exit(41)` in a library of rank 1",
        "os_exit.py",
        Cause("exit", 1, 41, texts=(r"license server: no seat left",)),
        41,
    ),
    "unpickling": Case(
        "The process of a data loader cannot unpickle a sample",
        "unpickling.py",
        Cause("exit", None, 1, texts=(r"Can't get attribute 'Example'",), exception="AttributeError"),
        1,
        uses_torch=True,
    ),
    "hang": Case(
        "Rank 1 hangs and misses a deadline of the watchdog",
        "hang.py",
        Cause("watchdog", 1, signal="SIGKILL", texts=(r"exchange of gradients",), senders=("agent",)),
        137,
        uses_torch=True,
        env={"TORCHELASTIC_ENABLE_FILE_TIMER": "1"},
    ),
    "half-written-error-file": Case(
        "The disk is full when rank 1 writes its error file",
        "half_written_error_file.py",
        Cause("exit", 1, 1, texts=(r"the loss is not finite",), exception="RuntimeError"),
        1,
    ),
    "killed-by-hand": Case(
        "`kill -9` in a shell ends rank 1",
        "steady.py",
        Cause("signal", 1, signal="SIGKILL", texts=(r"SIGKILL", _SENDER), senders=("process", "unknown")),
        137,
        disturb=_kill_by_hand,
    ),
    "killed-by-program": Case(
        "Another program sends SIGTERM to rank 1",
        "steady.py",
        Cause("signal", 1, signal="SIGTERM", texts=(r"SIGTERM", _SENDER), senders=("process", "unknown")),
        143,
        disturb=_kill_by_program,
    ),
    "core-dumped": Case(
        "A segmentation fault that leaves a core, in rank 1",
        "core_dumped.py",
        Cause("signal", 1, signal="SIGSEGV", texts=(r"SIGSEGV",), senders=("unknown",)),
        139,
        conditions=_in_the_folder,
    ),
    "two-ranks": Case(
        "Rank 1 fails, and rank 0 fails within 1 ms for that reason",
        "two_ranks.py",
        Cause("exit", 1, 11, texts=(r"the ring is corrupt",)),
        11,
    ),
    "other-node": Case(
        "Rank 1 fails on another node",
        "other_node.py",
        Cause("exit", 1, 1, texts=(r"shard 7 has 0 records",), exception="ValueError"),
        1,
        uses_torch=True,
        nodes=2,
    ),
    "lost-node": Case(
        "The node of rank 1 is lost",
        "lost_node.py",
        Cause("lost_node", None, texts=(r"(?i)\b(?:node|agent)\b.{0,60}\blost\b|\"lost_node\"",)),
        1,
        uses_torch=True,
        nodes=2,
        options=("--on-node-failure=exit",),
        disturb=_lose_a_node,
    ),
    "early-exit": Case(
        "Rank 1 ends with 0 and rank 0 waits for it",
        "early_exit.py",
        Cause("early_exit", 1, 0, texts=(r"(?i)ended early|ended with exit code 0",)),
        1,
        options=("--early-exit-timeout=1",),
    ),
}
