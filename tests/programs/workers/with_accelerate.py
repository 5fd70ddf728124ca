"""A worker that uses accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from work import begin, end


def main() -> None:
    """Train two steps, then sum a number over all ranks."""
    number = begin()
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        accelerator.backward(model(torch.ones(2)).sum())
        optimizer.step()
        optimizer.zero_grad()
    end(number, float(accelerator.reduce(torch.ones(1))))
    accelerator.end_training()


if __name__ == "__main__":
    main()
