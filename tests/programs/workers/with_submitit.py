"""A program that runs torch's launcher in a job of submitit's local executor."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import submitit
from work import FOLDER


def job() -> None:
    """Launch two workers from the process of the job."""
    from torch.distributed import run

    restarts = os.environ["PROGRAMS_RESTARTS"]
    script = str(Path(__file__).parent / "plain.py")
    run.main(["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}", script])


if __name__ == "__main__":
    executor = submitit.LocalExecutor(FOLDER / "submitit")
    executor.update_parameters(timeout_min=5)
    started = executor.submit(job)
    # The identifier of a local job is the pid of its controller, which forwards the signal.
    signal.signal(signal.SIGTERM, lambda number, _frame: os.kill(int(started.job_id), number))
    try:
        started.result()
    except submitit.core.utils.FailedJobError as error:
        print(error)
        sys.exit(1)
