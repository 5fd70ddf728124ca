"""ferrorun beside torchrun, alternating in one run, on workers that train nothing (``rust/zoo``).

    just bench-torchrun            # all figures
    just bench-torchrun --only tee

Every run's outcome is checked before its time counts. Prints a Markdown table: median and range of both sides, and their ratio.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from side_by_side import compare

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LAUNCHERS = {"torchrun": [str(BIN / "torchrun")], "ferrorun": [str(BIN / "ferrorun")]}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def zoo() -> str:
    """Path of the worker program, built if need be."""
    subprocess.run(
        ["cargo", "build", "--release", "--quiet", "--locked", "--package", "ferroelastic-zoo"], cwd=ROOT, check=True
    )
    metadata = subprocess.run(
        ["cargo", "metadata", "--format-version=1", "--no-deps", "--locked"], cwd=ROOT, check=True, capture_output=True
    )
    return str(Path(json.loads(metadata.stdout)["target_directory"]) / "release" / "zoo")


def command(launcher: str, workers: int, *flags: str) -> list[str]:
    return [*LAUNCHERS[launcher], "--standalone", f"--nproc-per-node={workers}", "--no-python", *flags]


def read_ns(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: int(path.read_text()) for path in folder.glob(pattern) if path.stat().st_size}


def measure_restarts(launcher: str, program: str, workers: int = 8, failures: int = 4) -> dict[str, list[float]]:
    """Milliseconds from a worker's exit to its peers being signalled, and to the last worker of the next attempt starting."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [*command(launcher, workers, f"--max-restarts={failures}"), program, "worker", name, str(failures)],
            env=ENVIRONMENT,
            check=True,
            capture_output=True,
            timeout=120,
        )
        signalled, restarted = [], []
        for attempt in range(failures):
            failed = read_ns(folder, f"failed.{attempt}.*")[f"failed.{attempt}.{workers - 1}"]
            peers = read_ns(folder, f"signalled.{attempt}.*")
            started = read_ns(folder, f"started.{attempt + 1}.*")
            assert len(peers) == workers - 1, f"{launcher}: {len(peers)} peers were signalled in attempt {attempt}"
            assert len(started) == workers, f"{launcher}: {len(started)} workers started in attempt {attempt + 1}"
            signalled += [(at - failed) / 1e6 for at in peers.values()]
            restarted.append((max(started.values()) - failed) / 1e6)
    return {"exit to peers signalled, ms": signalled, "exit to all 8 restarted, ms": restarted}


def measure_tee(
    launcher: str, program: str, workers: int = 4, lines: int = 200_000, width: int = 99
) -> dict[str, list[float]]:
    """Megabytes per second of teed lines at the reader of the launcher's standard output; no line may be lost or torn."""
    with tempfile.TemporaryDirectory() as name:
        job = subprocess.Popen(
            [*command(launcher, workers, "--tee=3", f"--log-dir={name}"), program, "flood", str(lines), str(width)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        chunks: list[bytes] = []
        first = last = 0.0
        assert job.stdout is not None
        while chunk := os.read(job.stdout.fileno(), 1 << 20):
            last = time.perf_counter()
            first = first or last
            chunks.append(chunk)
        job.stdout.close()
        assert job.wait(timeout=60) == 0, f"{launcher} ended with {job.returncode}"
    output = b"".join(chunks)
    expected = [0] * workers
    for line in output.decode().splitlines():
        head, number = line.split("]:")
        rank = int(head.removeprefix("[default"))
        assert number == f"{expected[rank]:0{width}}", f"{launcher}: torn or lost line {line!r}"
        expected[rank] += 1
    assert expected == [lines] * workers, f"{launcher}: {expected} lines of {lines} each"
    return {"tee of 4 workers x 200,000 lines, MB/s": [len(output) / 1e6 / (last - first)]}


def measure_rest(launcher: str, program: str, workers: int = 8, seconds: float = 10) -> dict[str, list[float]]:
    """CPU milliseconds per second that an agent costs whose workers run undisturbed, and its context switches per second."""
    job = subprocess.Popen(
        [*command(launcher, workers, "--tee=1"), program, "sleep"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert job.stdout is not None
    for _ in range(workers):
        assert job.stdout.readline().strip().endswith("ready"), f"{launcher}: a worker did not start"
    drain = threading.Thread(target=job.stdout.read, daemon=True)
    drain.start()
    time.sleep(3)  # what the start has left to do is not rest
    before = usage(job.pid)
    time.sleep(seconds)
    after = usage(job.pid)
    job.terminate()
    job.wait(timeout=60)
    drain.join()
    job.stdout.close()
    cpu_ns, switches = (late - early for late, early in zip(after, before, strict=True))
    return {
        "agent at rest, CPU ms per s": [cpu_ns / 1e6 / seconds],
        "agent at rest, context switches per s": [switches / seconds],
    }


def usage(pid: int) -> tuple[int, int]:
    """CPU time in nanoseconds and context switches of a process so far, over all of its threads."""
    cpu_ns = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu_ns += int((task / "schedstat").read_text().split()[0])
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                switches += int(line.split()[1])
    return cpu_ns, switches


MEASUREMENTS: dict[str, tuple[Callable[[str, str], dict[str, list[float]]], int]] = {
    "restarts": (measure_restarts, 5),
    "tee": (measure_tee, 5),
    "rest": (measure_rest, 3),
}


def main() -> None:
    program = zoo()
    measurements = {
        name: (lambda side, measure=measure: measure(side, program), rounds)
        for name, (measure, rounds) in MEASUREMENTS.items()
    }
    compare(("torchrun", "ferrorun"), measurements, __doc__ or "")


if __name__ == "__main__":
    main()
