"""Compares restarts and first starts of torch workers: torchrun, ferrorun, and ferrorun with warm workers, alternately in one run.

    just bench-warm                                # all figures
    just bench-warm --only restart --rounds 1
    just bench-warm --only heavy --imports torch,transformers.trainer

The failure is a SIGKILL to the worker of the highest rank, when all workers are idle and all parked processes are ready. The times are those
of the workers' own clocks (``warm_worker.py``). Every run's exit codes, its number of workers, and whether each worker was warm are checked
before a time counts. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from against_torchrun import ENVIRONMENT, LAUNCHERS, ROOT, free_port, pss, usage
from side_by_side import compare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from side_by_side import Measurement

TORCHRUN, COLD, WARM, PRELOAD = "torchrun", "ferrorun", "ferrorun --warm-workers", "ferrorun --preload"
SIDES = (TORCHRUN, COLD, WARM, PRELOAD)
WORKER = Path(__file__).with_name("warm_worker.py")
HEAVY_IMPORTS = ("transformers", "torchvision")
ROUND_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0
LOOK_S = 0.02
REST_S = 0.3
REST_CPU_NS = 1_000_000
"""Processes are idle if all together have used less CPU time than this within ``REST_S``."""


class RoundError(Exception):
    """The workers have not come back, or not all of them."""


@dataclass(frozen=True)
class Note:
    """The note of a worker."""

    pid: int
    rank: int
    is_warm: bool
    times: dict[str, int]
    """``CLOCK_MONOTONIC`` in nanoseconds at the first instruction, after the imports, and after the collective operation."""


class Job:
    """A running job of one or two nodes."""

    def __init__(self, side: str, folder: Path, commands: Sequence[Sequence[str]], workers: int) -> None:
        self._side = side
        self._folder = folder
        self._workers = workers
        self._nodes = len(commands)
        self._last: list[Note] = []
        self.launched_ns = time.monotonic_ns()
        self._launchers = [self._start(number, command) for number, command in enumerate(commands)]

    @property
    def agents(self) -> list[int]:
        """Process ids of the agents."""
        return [launcher.pid for launcher in self._launchers]

    def _start(self, number: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"log.{number}").open("wb") as log:
            return subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def first_start(self, event: str, *, is_warm: bool = False) -> float:
        """Return the milliseconds from the launch until the last worker has reached an event."""
        return self._all_back(self.launched_ns, event, is_warm=is_warm)

    def restart(self, event: str) -> float:
        """Kill a worker, and return the milliseconds from then until the last worker has reached an event."""
        is_warm = self._side in {WARM, PRELOAD}
        if is_warm:
            for agent in self.agents:
                parked_below(agent, self._workers // self._nodes)
        # Not until the workers use no CPU time: threads of gloo always do. torchrun looks at its workers every 0.1 s.
        time.sleep(REST_S + random.uniform(0, 0.1))
        victim = max(self._last, key=lambda note: note.rank)
        failed_ns = time.monotonic_ns()
        os.kill(victim.pid, signal.SIGKILL)
        return self._all_back(failed_ns, event, is_warm=is_warm)

    def end(self) -> None:
        """Let the workers end, and check the exit codes of the launchers."""
        for note in self._last:
            os.kill(note.pid, signal.SIGUSR1)
        codes = [launcher.wait(END_TIMEOUT_S) for launcher in self._launchers]
        if any(codes):
            raise RoundError(f"{self._side} ended with {codes}")

    def clean_up(self) -> None:
        """End all launchers, and with them the workers."""
        for launcher in self._launchers:
            launcher.terminate()
        for launcher in self._launchers:
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(END_TIMEOUT_S)
            launcher.kill()
            launcher.wait()

    def last_lines(self) -> str:
        """Return the end of each launcher's output."""
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in sorted(self._folder.glob("log.*")))

    def _all_back(self, since_ns: int, event: str, *, is_warm: bool) -> float:
        notes = self._last = self._round_since(since_ns)
        warm = [note.is_warm for note in notes]
        if warm != [is_warm] * self._workers:
            raise RoundError(
                f"{self._side}: {sum(warm)} of {self._workers} workers are warm, not {'all' * is_warm or 0}"
            )
        return (max(note.times[event] for note in notes) - since_ns) / 1e6

    def _round_since(self, since_ns: int) -> list[Note]:
        """Wait until all workers have started after a time and have written their notes."""
        deadline = time.monotonic() + ROUND_TIMEOUT_S
        while True:
            notes = [Note(**json.loads(path.read_text())) for path in self._folder.glob("note.*")]
            notes = [note for note in notes if note.times["started"] > since_ns]
            if len(notes) >= self._workers:
                if sorted(note.rank for note in notes) != list(range(self._workers)):
                    raise RoundError(f"{self._side}: {len(notes)} workers instead of {self._workers} started")
                return notes
            codes = [launcher.poll() for launcher in self._launchers]
            if any(code is not None for code in codes) or time.monotonic() > deadline:
                raise RoundError(
                    f"{self._side}: {len(notes)} of {self._workers} workers are back (exit codes of the launchers: {codes})"
                )
            time.sleep(LOOK_S)


@contextmanager
def running(
    side: str,
    workers: int,
    *,
    nodes: int = 1,
    imports: str = "torch",
    mode: str = "import",
    failures: int = 0,
) -> Iterator[Job]:
    """Run a job. The options of the warm sides import the same modules as the workers."""
    launcher, *flags = side.split()
    if flags:
        flags.append(f"--warm-imports={imports}")
    if nodes == 1:
        flags.append("--standalone")
    else:
        flags += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=bench"]
        flags += [f"--nnodes={nodes}", "--local-addr=127.0.0.1"]
    flags += [f"--nproc-per-node={workers // nodes}", f"--max-restarts={failures}"]
    with tempfile.TemporaryDirectory() as name:
        command = [*LAUNCHERS[launcher], *flags, str(WORKER), name, imports, mode]
        job = Job(side, Path(name), [command] * nodes, workers)
        try:
            yield job
            job.end()
        except BaseException:
            print(job.last_lines(), file=sys.stderr)
            raise
        finally:
            job.clean_up()


def warm_processes(agent: int) -> list[int]:
    """Return the zygote and the parked children of an agent, oldest first."""
    children: list[int] = []
    for task in Path(f"/proc/{agent}/task").iterdir():
        children += map(int, (task / "children").read_text().split())
    ages = {}
    for pid in children:
        with suppress(OSError):
            name, fields = Path(f"/proc/{pid}/stat").read_text().split(" (", 1)[1].rsplit(") ", 1)
            if name == "ferro-warm":
                ages[pid] = int(fields.split()[19])  # start time
    return sorted(ages, key=lambda pid: (ages[pid], pid))


def parked_below(agent: int, number: int) -> tuple[int, list[int]]:
    """Wait until a number of children are parked. Return the zygote and the children."""
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    while True:
        found = warm_processes(agent)
        if len(found) > number:
            wait_for_rest(found)
            zygote, *children = found
            return zygote, children
        if time.monotonic() > deadline:
            raise RoundError(f"{len(found)} processes below the agent are warm, fewer than {number + 1}")
        time.sleep(LOOK_S)


def wait_for_rest(pids: Sequence[int]) -> None:
    """Wait until the processes are idle."""
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    before = -REST_CPU_NS
    while (now := sum(usage(pid)[0] for pid in pids)) - before >= REST_CPU_NS:
        if time.monotonic() > deadline:
            raise RoundError(f"not all of the processes {pids} are idle")
        before = now
        time.sleep(REST_S)


def measure_restart(side: str, imports: str = "torch", workers: int = 8) -> dict[str, list[float]]:
    """Return the milliseconds from the launch and from two failures until all workers are past their imports."""
    past = f"all {workers} past import {imports}, ms"
    with running(side, workers, imports=imports, failures=2) as job:
        return {
            f"launch to {past}": [job.first_start("imported", is_warm=side == PRELOAD)],
            f"first failure to {past}": [job.restart("imported")],
            f"second failure to {past}": [job.restart("imported")],
        }


def measure_training(side: str, nodes: int = 1, failures: int = 3) -> dict[str, list[float]]:
    """Return the milliseconds from a failure until both workers have done a collective operation.

    A restart of torchrun that does not succeed has no time.
    """
    place = "" if nodes == 1 else f" on {nodes} nodes"
    times = []
    try:
        with running(side, 2, nodes=nodes, mode="train", failures=failures) as job:
            job.first_start("trained", is_warm=side == PRELOAD)
            for _ in range(failures):
                times.append(job.restart("trained"))  # noqa: PERF401  # a failure must not lose the samples before it
    except RoundError as error:
        if side != TORCHRUN:  # its new workers may connect to addresses of the old ones
            raise
        print(f"torchrun: {len(times)} of {failures} restarts{place} succeeded, then: {error}", file=sys.stderr)
    return {f"failure to 2 workers{place} trained, ms": times}


def measure_release(side: str, releases: int = 40) -> dict[str, list[float]]:
    """Return the milliseconds from a release to the first line of the script, for one child and for eight at once."""
    if side != PRELOAD:
        return {}
    alone = first_lines(1, releases)
    together = first_lines(8, releases // 4)
    return {
        "release of 1 child to its first line, p50, ms": [statistics.median(alone)],
        "release of 1 child to its first line, p95, ms": [percentile_95(alone)],
        "release of 8 children to each first line, p50, ms": [statistics.median(together)],
        "release of 8 children to each first line, p95, ms": [percentile_95(together)],
    }


def percentile_95(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=20, method="inclusive")[-1]


def first_lines(children: int, releases: int) -> list[float]:
    """Release parked children again and again. Return the milliseconds to each first line."""
    from ferroelastic import _rust
    from ferroelastic._engine import get_engine
    from ferroelastic._warm.pool import WarmWorkers

    times: list[float] = []
    refusals: list[str] = []
    warm = WarmWorkers(children=children, imports=["torch"], preload=True, on_refusal=refusals.append)
    with tempfile.TemporaryDirectory() as name:
        argv = [sys.executable, "-u", str(WORKER), name, "torch", "import"]
        envs = [{**ENVIRONMENT, "RANK": str(rank)} for rank in range(children)]
        commands = [_rust.Command(argv, env) for env in envs]
        try:
            for _ in range(releases):
                pool = warm.pool_for(argv[0], dict.fromkeys(range(children), argv[1:]), dict(enumerate(envs)))
                assert pool is not None, refusals
                parked_below(os.getpid(), children)
                released_ns = time.monotonic_ns()
                group = get_engine().spawn(commands, pool)
                assert group.warm == list(range(children)), group.warm
                notes = [wait_for_note(Path(name) / f"note.{pid}") for pid in group.pids]
                assert all(note.is_warm for note in notes), notes
                times += [(note.times["started"] - released_ns) / 1e6 for note in notes]
                for index in range(children):
                    group.signal(index, signal.SIGUSR1)
                while len(group.exits()) < children:
                    assert group.wait(group.generation, END_TIMEOUT_S) == "event", "the workers do not end"
                assert [ended.returncode for ended in group.exits()] == [0] * children
                warm.started(group)
        finally:
            warm.close()
    return times


def wait_for_note(path: Path) -> Note:
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} is missing"
        time.sleep(LOOK_S)
    return Note(**json.loads(path.read_text()))


def measure_memory(side: str, workers: int = 8) -> dict[str, list[float]]:
    """Return the memory of the zygote and of its parked children while the workers run."""
    if side not in {WARM, PRELOAD}:
        return {}
    with running(side, workers) as job:
        job.first_start("imported", is_warm=side == PRELOAD)
        zygote, children = parked_below(job.agents[0], workers)
        return {
            "private memory of a parked child, MB": [private_bytes(pid) / 1e6 for pid in children],
            "private memory of the zygote, MB": [private_bytes(zygote) / 1e6],
            f"PSS of the zygote and {workers} parked children, MB": [sum(map(pss, (zygote, *children))) / 1e6],
        }


def private_bytes(pid: int) -> int:
    """Return the private memory of a process in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def measure_cold_start(side: str, pairs: int = 20) -> dict[str, list[float]]:
    """Return the additional milliseconds of a cold first start with warm workers ordered, as differences of alternate starts."""
    if side != WARM:
        return {}
    return {
        f"cold first start of {workers} without torch: added by the option, ms": [
            added_to_start(workers, is_reversed=bool(number % 2)) for number in range(pairs)
        ]
        for workers in (1, 8)
    }


def added_to_start(workers: int, *, is_reversed: bool) -> float:
    times = {}
    for side in (WARM, COLD) if is_reversed else (COLD, WARM):
        with running(side, workers, imports="json") as job:
            times[side] = job.first_start("started")
    return times[WARM] - times[COLD]


def heavy_imports(given: str | None) -> str | None:
    """Return the modules for the measurement with a heavier import; ``None`` if they are not installed."""
    for candidate in [given] if given else HEAVY_IMPORTS:
        if all(importlib.util.find_spec(name.partition(".")[0]) for name in candidate.split(",")):
            return candidate
    return None


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--imports", help=f"modules of the group heavy; default: the installed one of {HEAVY_IMPORTS}")
    args, _ = parser.parse_known_args()
    os.environ.update(ENVIRONMENT)  # a zygote has the environment of this process
    # pip also compiles the packages that it installs, including torch.
    compileall.compile_dir(ROOT / "python", quiet=1)
    measurements: dict[str, Measurement] = {
        "restart": (measure_restart, 5),
        "training": (measure_training, 5),
        "nodes": (partial(measure_training, nodes=2), 3),
        "release": (measure_release, 1),
        "memory": (measure_memory, 1),
        "cold": (measure_cold_start, 1),
    }
    heavy = heavy_imports(args.imports)
    if heavy is None:
        print(f"Without the group heavy: {args.imports or ' or '.join(HEAVY_IMPORTS)} is not installed.\n", flush=True)
    else:
        measurements["heavy"] = (partial(measure_restart, imports=heavy), 3)
    compare(SIDES, measurements, __doc__ or "", parents=[parser])


if __name__ == "__main__":
    main()
