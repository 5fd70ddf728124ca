"""A worker that uses Lightning Fabric."""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from work import begin, end


def main() -> None:
    """Train two steps, then sum a number over all ranks."""
    number = begin()
    fabric = Fabric()  # `fabric run` has set the strategy and launched the ranks
    model = torch.nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        fabric.backward(model(torch.ones(2)).sum())
        optimizer.step()
        optimizer.zero_grad()
    end(number, float(fabric.all_reduce(torch.ones(1), reduce_op="sum")))


if __name__ == "__main__":
    main()
