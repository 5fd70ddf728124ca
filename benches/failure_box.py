"""Time from the end of the last worker to the report of the failure on the console.

    just bench-failure-box                          # 8 workers, 20 failures of each kind
    just bench-failure-box --workers 2 --number 3   # a short run

Each job has one worker that fails. The agent stops the others. The console is a pipe that is read at once. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FERRORUN = (sys.executable, "-m", "ferroelastic.run")
TIMEOUT_S = 60.0
SETTLE_S = 0.5  # the start of the job is over
SCRIPT = """
import os, signal, sys
folder, rank = sys.argv[1], int(os.environ["RANK"])
open(os.path.join(folder, f"{rank}.new"), "w").write(str(os.getpid()))
os.rename(os.path.join(folder, f"{rank}.new"), os.path.join(folder, f"{rank}.pid"))
with open(os.path.join(folder, f"gate.{rank}")) as gate:
    gate.read()
def main():
    HOW
main()
"""
KINDS = {
    "exception": "raise ValueError('no data')",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "exit code": "os._exit(3)",
}


def measure(how: str, workers: int, form: str) -> float:
    """Run one job that fails. Return the time from the end of its last worker to its whole report, in milliseconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "train.py"
        script.write_text(SCRIPT.replace("HOW", how))
        for rank in range(workers):
            os.mkfifo(folder / f"gate.{rank}")
        options = ("--standalone", f"--nproc-per-node={workers}", "--redirects=2", f"--summary={form}")
        command = [*FERRORUN, *options, f"--log-dir={name}/logs", str(script), name]
        job = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            pids = [_pid(folder / f"{rank}.pid") for rank in range(workers)]
            ends = [os.pidfd_open(pid) for pid in pids]
            time.sleep(SETTLE_S)
            with open(folder / "gate.0", "w"):
                pass
            return _milliseconds(job, ends, "=" * 60 if form == "full" else '{"version"')
        finally:
            job.kill()
            job.wait()


def _pid(path: Path) -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no worker has written {path}")
        time.sleep(0.01)
    return int(path.read_text())


def _milliseconds(job: subprocess.Popen[bytes], ends: list[int], last: str) -> float:
    assert job.stderr is not None
    os.set_blocking(job.stderr.fileno(), False)
    poll = select.poll()
    waiting = set(ends)
    for descriptor in (*ends, job.stderr.fileno()):
        poll.register(descriptor, select.POLLIN)
    gone_ns = 0
    output = b""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        ready = poll.poll(1000)
        now_ns = time.monotonic_ns()
        for descriptor, _ in ready:
            if descriptor in waiting:
                poll.unregister(descriptor)
                os.close(descriptor)
                waiting.discard(descriptor)
                gone_ns = now_ns
            else:
                output += job.stderr.read() or b""
        lines = output.decode(errors="replace").splitlines()
        if not waiting and lines and output.endswith(b"\n") and lines[-1].startswith(last) and len(lines) > 1:
            return (now_ns - gone_ns) / 1e6
    raise TimeoutError(f"the report is not complete:\n{output.decode(errors='replace')}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--summary", default="full", choices=["full", "json"])
    arguments = parser.parse_args()
    print(f"| failure of one of {arguments.workers} workers | median (ms) | range (ms) |\n| --- | --- | --- |")
    for kind, how in KINDS.items():
        times = [measure(how, arguments.workers, arguments.summary) for _ in range(arguments.number)]
        print(f"| {kind} | {statistics.median(times):.1f} | {min(times):.1f} to {max(times):.1f} |", flush=True)


if __name__ == "__main__":
    main()
