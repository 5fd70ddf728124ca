"""Tee with patterns and rotation compared with plain tee, alternately in one run.

    just bench-log-options
    just bench-log-options --baseline /path/to/other/python

Figures: throughput of 4 workers x 200,000 lines, time from a worker's write of a line to its arrival at the console, and peak memory of the
agent whose console is read at 1 MB/s. No line may be lost or torn. ``--baseline`` runs plain tee with the package in another folder.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FLOOD = """
import os, sys
lines, width, step = map(int, sys.argv[1:])
for start in range(0, lines, step):
    os.write(1, "".join([f"{line:0{width}}\\n" for line in range(start, start + step)]).encode())
"""

PACED = """
import os, time
for _ in range(200):
    time.sleep(0.01)
    os.write(1, b"%d\\n" % time.time_ns())
"""

OPTIONS = (
    "--fail-on-log=loss=nan=loss is NaN",
    r"--warn-on-log=(?i)nccl (warn|error).*timeout=collective",
    "--warn-on-log=^slow step: \\d{4,} ms$=slow input",
    "--log-max-size=8M",
    "--log-max-files=99",
)


def start(package: str, folder: str, workers: int, script: str, *line: str) -> subprocess.Popen[bytes]:
    """Start a job whose standard output is a pipe."""
    Path(folder, "worker.py").write_text(script)
    options, arguments = [text for text in line if text.startswith("--")], [text for text in line if text[:2] != "--"]
    launcher = [sys.executable, "-m", "ferroelastic.run", "--standalone", f"--nproc-per-node={workers}", "--tee=1"]
    return subprocess.Popen(
        [*launcher, "--log-dir=logs", *options, "worker.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def checked(job: subprocess.Popen[bytes], output: bytes, workers: int, lines: int, width: int) -> None:
    """Check that each line of each worker is there once, whole and in order."""
    assert job.stderr is not None
    errors = job.stderr.read().decode()
    assert job.wait(timeout=120) == 0, errors
    expected = [0] * workers
    for line in output.split(b"\n")[:-1]:
        rank = int(line[8:9])
        assert line == b"[default%d]:%0*d" % (rank, width, expected[rank]), line
        expected[rank] += 1
    assert expected == [lines] * workers, (expected, errors)


def throughput(package: str, options: tuple[str, ...], lines: int = 200_000, width: int = 99) -> float:
    """Return MB/s of 4 workers."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as folder:
        job = start(package, folder, 4, FLOOD, *options, str(lines), str(width), "100")
        assert job.stdout is not None
        chunks, first, last = [], 0.0, 0.0
        while chunk := os.read(job.stdout.fileno(), 1 << 20):
            last = time.perf_counter()
            first = first or last
            chunks.append(chunk)
        output = b"".join(chunks)
        checked(job, output, 4, lines, width)
        if options:
            assert list(Path(folder).glob("logs/latest/attempt_0/*/stdout.log.1")), "no file was rotated"
    return len(output) / 1e6 / (last - first)


def seen(package: str, options: tuple[str, ...]) -> float:
    """Return the median time in ms from a worker's write to the arrival of the line."""
    with tempfile.TemporaryDirectory() as folder:
        job = start(package, folder, 1, PACED, *options)
        assert job.stdout is not None
        delays = [time.time_ns() - int(line.split(b":")[1]) for line in job.stdout]
        assert job.wait(timeout=60) == 0
    return statistics.median(delays) / 1e6


def peak_memory(package: str, options: tuple[str, ...], lines: int, rate: float = 1e6, read_s: float = 20) -> float:
    """Return the peak memory in MB of an agent of 8 workers whose console is read at ``rate`` bytes per second for a time."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as folder:
        job = start(package, folder, 8, FLOOD, *options, str(lines), "99", "100")
        assert job.stdout is not None
        began, read = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < read_s:
            time.sleep(max(0.0, read / rate - passed))
            chunk = os.read(job.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            read += len(chunk)
        status = Path(f"/proc/{job.pid}/status").read_text()
        job.terminate()
        while os.read(job.stdout.fileno(), 1 << 20):
            pass
        job.wait(timeout=60)
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1000


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--baseline", default=str(ROOT / "python"), help="folder of the package for plain tee")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lines", type=int, default=1_000_000, help="lines of each of 8 workers for the slow reader")
    args = parser.parse_args()
    here = str(ROOT / "python")
    cases = {"plain tee": (args.baseline, ()), "patterns and rotation": (here, OPTIONS)}
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    for _ in range(args.rounds):
        for name, (package, options) in cases.items():
            figures[name].setdefault("throughput, MB/s", []).append(throughput(package, options))
            figures[name].setdefault("line seen, ms", []).append(seen(package, options))
    for name, (package, options) in cases.items():
        figures[name]["peak memory with a reader of 1 MB/s, MB"] = [peak_memory(package, options, args.lines)]
    for figure in next(iter(figures.values())):
        for name, values in figures.items():
            ordered = sorted(values[figure])
            print(f"{figure:<45} {name:<25} {statistics.median(ordered):8.2f}  ({ordered[0]:.2f} to {ordered[-1]:.2f})")


if __name__ == "__main__":
    main()
