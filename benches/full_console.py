"""Time to stop a job whose standard error is not read, compared with a job whose standard error is read, alternately in one run.

    just bench-full-console

64 workers obey or ignore SIGTERM. The figures are milliseconds to the end of the last worker and to the end of the agent. Time starts with
SIGTERM to the agent or, if the workers ignore it, at the end of the grace period. Every exit code is checked before its time counts.
"""

from __future__ import annotations

import compileall
import fcntl
import os
import select
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from against_torchrun import BIN, ENVIRONMENT, ROOT, zoo
from side_by_side import compare

WORKERS = 64
GRACE_S = 1
TERMINATED = 128 + 15


def measure(console: str, program: str, kind: str) -> dict[str, list[float]]:
    """Return the milliseconds to the end of the last worker and of the agent."""
    read_fd, write_fd = os.pipe()
    if console == "full":
        os.set_blocking(write_fd, False)
        size = fcntl.fcntl(write_fd, fcntl.F_GETPIPE_SZ)
        assert os.write(write_fd, bytes(size)) == size
        os.set_blocking(write_fd, True)
    else:
        threading.Thread(target=drain, args=(read_fd,), daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        os.mkfifo(ready)
        ready_fd = os.open(ready, os.O_RDWR)
        options = (
            "--standalone",
            f"--nproc-per-node={WORKERS}",
            f"--shutdown-timeout={GRACE_S if kind == 'deaf' else 60}",
        )
        script = f'exec "$0" {kind} > "{ready}"'
        job = subprocess.Popen(
            [str(BIN / "ferrorun"), *options, "--no-python", "/bin/sh", "-c", script, program],
            env=ENVIRONMENT,
            stderr=write_fd,
        )
        os.close(write_fd)
        received = b""
        while received.count(b"\n") < WORKERS:
            received += os.read(ready_fd, 1 << 16)
        os.close(ready_fd)
        workers = [os.pidfd_open(pid) for pid in workers_of(job.pid, program)]
        assert len(workers) == WORKERS, len(workers)
        # Not Popen.wait, which polls at growing intervals if it has a timeout.
        agent = os.pidfd_open(job.pid)
        began = time.monotonic_ns() + (GRACE_S * 1_000_000_000 if kind == "deaf" else 0)
        job.terminate()
        all_gone(workers)
        last = time.monotonic_ns()
        all_gone([agent])
        ended = time.monotonic_ns()
        os.close(agent)
        code = job.wait()
    assert code == TERMINATED, code
    for worker in workers:
        os.close(worker)
    if console == "full":
        os.close(read_fd)
    return {
        f"64 workers ({kind}), to the last worker gone, ms": [(last - began) / 1e6],
        f"64 workers ({kind}), to the agent gone, ms": [(ended - began) / 1e6],
    }


def drain(fd: int) -> None:
    while os.read(fd, 1 << 16):
        pass
    os.close(fd)


def workers_of(agent: int, program: str) -> list[int]:
    children = [
        pid for task in Path(f"/proc/{agent}/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    return [int(pid) for pid in children if Path(f"/proc/{pid}/exe").readlink() == Path(program)]


def all_gone(processes: list[int]) -> None:
    waiting = set(processes)
    poll = select.poll()
    for process in waiting:
        poll.register(process, select.POLLIN)
    while waiting:
        for process, _ in poll.poll():
            poll.unregister(process)
            waiting.discard(process)


def main() -> None:
    program = zoo()
    compileall.compile_dir(ROOT / "python", quiet=1)
    measurements = {kind: (partial(measure, program=program, kind=kind), 15) for kind in ("sleep", "deaf")}
    compare(("read", "full"), measurements, __doc__ or "")


if __name__ == "__main__":
    main()
