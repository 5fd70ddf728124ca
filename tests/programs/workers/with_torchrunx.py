"""A program that starts its function with torchrunx."""

from __future__ import annotations

import signal
import sys

import torchrunx


def train() -> None:
    """Sum a number in the process group that torchrunx has made."""
    import torch
    import torch.distributed as dist
    from work import begin, end

    number = begin()
    value = torch.ones(1)
    dist.all_reduce(value)
    end(number, float(value))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # the launcher then stops its agents
    torchrunx.Launcher(
        hostnames=["localhost"],
        workers_per_host=2,
        backend="gloo",
        copy_env_vars=("PROGRAMS_*", "OMP_NUM_THREADS", "PYTHONPATH"),
    ).run(train)
