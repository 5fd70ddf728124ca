"""A worker that uses DeepSpeed's engine."""

from __future__ import annotations

import sys

import deepspeed
import torch
import torch.distributed as dist
from work import begin, end


def main() -> None:
    """Train two steps, then sum a number over all ranks."""
    number = begin()
    assert not sys.argv[1:] or sys.argv[1].startswith("--local_rank=")
    deepspeed.init_distributed("gloo")
    model = torch.nn.Linear(2, 1)
    settings = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 2)).sum())
        engine.step()
    value = torch.ones(1)
    dist.all_reduce(value)
    end(number, float(value))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
