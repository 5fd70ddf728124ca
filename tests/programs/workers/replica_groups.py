"""Two replica groups of torchft: a lighthouse, and a launcher with one worker for each group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from work import free_port

BIN = Path(sys.executable).parent
LAUNCHER = {"torch": "torchrun", "ferroelastic": "ferrorun"}[os.environ["PROGRAMS_AGENT"]]


def main() -> int:
    """Return the exit code of the first group that failed, or 0."""
    port = free_port()
    options = ["--min_replicas=2", "--join_timeout_ms=1000", f"--bind=127.0.0.1:{port}"]
    lighthouse = subprocess.Popen([BIN / "torchft_lighthouse", *options])
    launch = [BIN / LAUNCHER, "--standalone", "--nproc-per-node=1", f"--max-restarts={os.environ['PROGRAMS_RESTARTS']}"]
    groups = [
        subprocess.Popen(
            [*launch, Path(__file__).parent / "with_torchft.py"],
            env={**os.environ, "REPLICA_GROUP_ID": str(group), "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"},
        )
        for group in range(2)
    ]

    def stop(*_: object) -> None:
        for group in groups:
            if group.poll() is None:
                group.terminate()

    signal.signal(signal.SIGTERM, stop)
    try:
        codes = []
        while len(codes) < len(groups):
            for group in groups:
                try:
                    code = group.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
                if group.pid not in [pid for pid, _ in codes]:
                    codes.append((group.pid, code))
                    if code:
                        stop()
        return next((code for _, code in codes if code), 0)
    finally:
        lighthouse.kill()
        lighthouse.wait()


if __name__ == "__main__":
    sys.exit(main())
