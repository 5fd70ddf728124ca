"""A worker that uses torch.distributed and nothing else."""

from __future__ import annotations

import torch
import torch.distributed as dist
from work import begin, end


def main() -> None:
    """Sum a number over all ranks."""
    number = begin()
    dist.init_process_group("gloo")
    value = torch.ones(1)
    dist.all_reduce(value)
    end(number, float(value))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
