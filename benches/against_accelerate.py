"""Compares `accelerate launch` with `ferrorun --exec accelerate launch`, alternately in one run.

    just bench-accelerate
    just bench-accelerate --rounds 3

The figures begin with the command. The first line of a worker reads the clock; the worker imports nothing else. Prints a Markdown table.
"""

from __future__ import annotations

import compileall
import os
import subprocess
import tempfile
import time
from pathlib import Path

from side_by_side import compare

BIN = Path(__file__).resolve().parent.parent / "target" / "programs" / "main" / "bin"
PLAIN, OURS = "accelerate launch", "ferrorun --exec accelerate launch"
SIDES = (PLAIN, OURS)
OPTIONS = (
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
)
WORKER = """import time; at = time.monotonic_ns()
import os
with open(os.path.join(os.environ["BENCH_FOLDER"], os.environ["RANK"]), "w") as file:
    file.write(str(at))
"""


def measure(side: str) -> dict[str, list[float]]:
    """Launch a job of two workers that do nothing."""
    prefix = [str(BIN / "ferrorun"), "--exec"] if side == OURS else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "worker.py"
        script.write_text(WORKER)
        job = [*prefix, str(BIN / "accelerate"), "launch", *OPTIONS, str(script)]
        began = time.monotonic_ns()
        subprocess.run(
            job,
            env={**os.environ, "BENCH_FOLDER": name, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            timeout=120,
        )
        ended = time.monotonic_ns()
        started = [int((folder / rank).read_text()) for rank in ("0", "1")]
    return {
        "command to the first line of the first worker, ms": [(min(started) - began) / 1e6],
        "command to the first line of the last worker, ms": [(max(started) - began) / 1e6],
        "command to the end of a job that does nothing, ms": [(ended - began) / 1e6],
    }


if __name__ == "__main__":
    compileall.compile_dir(Path(__file__).resolve().parent.parent / "python", quiet=1)
    measure(PLAIN)  # the first import of accelerate reads its files from disk
    compare(SIDES, {"launch": (measure, 10)}, __doc__ or "")
