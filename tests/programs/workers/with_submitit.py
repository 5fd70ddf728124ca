"""A program that runs torch's launcher in a job of submitit's local executor."""

from __future__ import annotations

import os
import sys

import submitit
from work import FOLDER


def job() -> None:
    """Launch two workers from the process of the job."""
    from torch.distributed import run

    restarts = os.environ["PROGRAMS_RESTARTS"]
    run.main(["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}", "plain.py"])


if __name__ == "__main__":
    executor = submitit.LocalExecutor(FOLDER / "submitit")
    executor.update_parameters(timeout_min=5)
    started = executor.submit(job)
    (FOLDER / "submitit.job").write_text(started.job_id)
    try:
        started.result()
    except submitit.core.utils.FailedJobError as error:
        print(error)
        sys.exit(1)
