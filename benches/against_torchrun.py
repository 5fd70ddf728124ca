"""Compares ferrorun with torchrun, alternately in one run, with workers that do no training (``rust/zoo``).

    just bench-torchrun            # all figures
    just bench-torchrun --only tee

Every run's outcome is checked before its time counts. Prints a Markdown table: median and range of both sides, and their ratio.
"""

from __future__ import annotations

import compileall
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from side_by_side import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LAUNCHERS = {"torchrun": [str(BIN / "torchrun")], "ferrorun": [str(BIN / "ferrorun")]}
# The workers fail several times right after their start. torchrun ignores the second variable.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PET_RESTART_BACKOFF": "0"}


def zoo() -> str:
    """Build the worker program if needed and return its path."""
    subprocess.run(
        ["cargo", "build", "--release", "--quiet", "--locked", "--package", "ferroelastic-zoo"], cwd=ROOT, check=True
    )
    metadata = subprocess.run(
        ["cargo", "metadata", "--format-version=1", "--no-deps", "--locked"], cwd=ROOT, check=True, capture_output=True
    )
    return str(Path(json.loads(metadata.stdout)["target_directory"]) / "release" / "zoo")


def command(launcher: str, workers: int, *flags: str) -> list[str]:
    return [*LAUNCHERS[launcher], "--standalone", f"--nproc-per-node={workers}", "--no-python", *flags]


def joining(launcher: str, port: int, workers: int, *flags: str) -> list[str]:
    """Return the command of one node of a two-node job."""
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=bench", "--nnodes=2")
    return [*LAUNCHERS[launcher], *rendezvous, f"--nproc-per-node={workers}", "--no-python", *flags]


def free_port() -> int:
    """Return a port that no process listens on. torchrun binds the port itself."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def read_ns(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: int(path.read_text()) for path in folder.glob(pattern) if path.stat().st_size}


def measure_restarts(launcher: str, program: str, workers: int = 8, failures: int = 4) -> dict[str, list[float]]:
    """Return the milliseconds from a worker's exit to the signals at its peers, and to the start of the last restarted worker."""
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
            failed = failed_at(folder, attempt, workers)
            peers = read_ns(folder, f"signalled.{attempt}.*")
            assert len(peers) == workers - 1, f"{launcher}: {len(peers)} peers were signalled in attempt {attempt}"
            signalled += [(at - failed) / 1e6 for at in peers.values()]
            restarted.append((all_started_at(folder, attempt + 1, workers) - failed) / 1e6)
    return {"exit to peers signalled, ms": signalled, "exit to all 8 restarted, ms": restarted}


def measure_restarts_of_two_nodes(
    launcher: str, program: str, workers: int = 4, failures: int = 4
) -> dict[str, list[float]]:
    """Return the milliseconds from a worker's exit to the start of the last restarted worker of both nodes."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node = joining(launcher, port, workers, f"--max-restarts={failures}", program, "worker", name, str(failures))
        nodes = [
            subprocess.Popen(node, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(2)
        ]
        try:
            ends = [node.wait(timeout=120) for node in nodes]
        finally:
            for job in nodes:
                job.kill()  # no effect on a job that has ended
        assert ends == [0, 0], f"{launcher} ended with {ends}"
        restarted = [
            (all_started_at(folder, attempt + 1, 2 * workers) - failed_at(folder, attempt, 2 * workers)) / 1e6
            for attempt in range(failures)
        ]
    return {"exit to all 8 of two nodes restarted, ms": restarted}


def failed_at(folder: Path, attempt: int, workers: int) -> int:
    """Return the time at which the worker of the last rank failed (monotonic clock, nanoseconds)."""
    name = f"failed.{attempt}.{workers - 1}"
    return read_ns(folder, name)[name]


def all_started_at(folder: Path, attempt: int, workers: int) -> int:
    """Return the time at which the last worker of an attempt started (monotonic clock, nanoseconds)."""
    started = read_ns(folder, f"started.{attempt}.*")
    assert len(started) == workers, f"{len(started)} workers started in attempt {attempt}"
    return max(started.values())


def measure_launch(launcher: str, program: str) -> dict[str, list[float]]:
    """Return the milliseconds from the launcher's start to the first instruction of its worker, and to the launcher's end."""
    with tempfile.TemporaryDirectory() as name:
        launched = time.monotonic_ns()
        job = command(launcher, 1, program, "worker", name, "0")
        subprocess.run(job, env=ENVIRONMENT, check=True, capture_output=True, timeout=60)
        ended = time.monotonic_ns()
        started = all_started_at(Path(name), 0, 1)
    return {
        "launch to the worker's first instruction, ms": [(started - launched) / 1e6],
        "launch to the end of a job that does nothing, ms": [(ended - launched) / 1e6],
    }


def measure_end(launcher: str, program: str, workers: int = 8) -> dict[str, list[float]]:
    """Return the milliseconds from SIGTERM and from the final failure to the agent's end, and the agent's memory before."""
    with resting(launcher, program, workers) as job:
        memory = sum(pss(pid) for pid in agents_of(job.pid, program))
        # Not Popen.wait, which with a timeout polls only after 7.5, 15.5, 31.5 ms …
        end = select.poll()
        pidfd = os.pidfd_open(job.pid)
        end.register(pidfd, select.POLLIN)
        terminated = time.monotonic_ns()
        job.terminate()
        assert end.poll(60_000), f"{launcher} does not end"
        gone = time.monotonic_ns()
        os.close(pidfd)
        job.wait()
    assert job.returncode != 0, f"{launcher} ended with 0"
    with tempfile.TemporaryDirectory() as name:
        failing = command(launcher, workers, "--max-restarts=0", program, "worker", name, "1")
        done = subprocess.run(failing, env=ENVIRONMENT, check=False, capture_output=True, timeout=60)
        ended = time.monotonic_ns()
        assert done.returncode == 1, f"{launcher} ended with {done.returncode}"
        failed = failed_at(Path(name), 0, workers)
    return {
        "SIGTERM to the agent gone, ms": [(gone - terminated) / 1e6],
        "last failure to the agent gone, ms": [(ended - failed) / 1e6],
        "memory of the agent and its helpers, MB": [memory / 1e6],
    }


def agents_of(pid: int, program: str) -> list[int]:
    """Return the launcher's process and its descendants, without workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    below = [found for child in children for found in agents_of(int(child), program)]
    is_worker = Path(f"/proc/{pid}/exe").readlink() == Path(program)
    return below if is_worker else [pid, *below]


def pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure_tee(
    launcher: str, program: str, workers: int = 4, lines: int = 200_000, width: int = 99
) -> dict[str, list[float]]:
    """Return the throughput of teed lines on the launcher's standard output in MB/s. No line may be lost or torn."""
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
        head, _, number = line.partition("]:")
        assert head[8:].isdigit(), f"{launcher}: torn line {line!r}"
        rank = int(head[8:])
        assert number == f"{expected[rank]:0{width}}", f"{launcher}: torn or lost line {line!r}"
        expected[rank] += 1
    assert expected == [lines] * workers, f"{launcher}: {expected} lines of {lines} each"
    return {"tee of 4 workers x 200,000 lines, MB/s": [len(output) / 1e6 / (last - first)]}


def measure_rest(launcher: str, program: str, workers: int = 8, seconds: float = 10) -> dict[str, list[float]]:
    """Return the CPU time (ms per second) and the context switches per second of an agent while its workers run."""
    with resting(launcher, program, workers) as job:
        time.sleep(3)  # the work after the start must not count
        before = usage(job.pid)
        time.sleep(seconds)
        after = usage(job.pid)
    cpu_ns, switches = (late - early for late, early in zip(after, before, strict=True))
    return {
        "agent at rest, CPU ms per s": [cpu_ns / 1e6 / seconds],
        "agent at rest, context switches per s": [switches / seconds],
    }


@contextmanager
def resting(launcher: str, program: str, workers: int) -> Iterator[subprocess.Popen[str]]:
    """Run a job whose workers have all started and do nothing."""
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
    try:
        yield job
    finally:
        job.terminate()
        job.wait(timeout=60)
        drain.join()
        job.stdout.close()


def usage(pid: int) -> tuple[int, int]:
    """Return the CPU time in nanoseconds and the context switches of all threads of a process so far."""
    cpu_ns = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu_ns += int((task / "schedstat").read_text().split()[0])
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                switches += int(line.split()[1])
    return cpu_ns, switches


MEASUREMENTS: dict[str, tuple[Callable[[str, str], dict[str, list[float]]], int]] = {
    "launch": (measure_launch, 10),
    "restarts": (measure_restarts, 5),
    "nodes": (measure_restarts_of_two_nodes, 5),
    "end": (measure_end, 5),
    "tee": (measure_tee, 5),
    "rest": (measure_rest, 3),
}


def main() -> None:
    program = zoo()
    # pip also compiles the packages that it installs, including torch.
    compileall.compile_dir(ROOT / "python", quiet=1)
    measurements = {
        name: (lambda side, measure=measure: measure(side, program), rounds)
        for name, (measure, rounds) in MEASUREMENTS.items()
    }
    compare(("torchrun", "ferrorun"), measurements, __doc__ or "")


if __name__ == "__main__":
    main()
