"""A worker that uses the Trainer of transformers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments
from work import FOLDER, begin, end


class Model(torch.nn.Module):
    """The smallest model that the Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        return {"loss": self.layer(x).sum()}


def main() -> None:
    """Train two steps, then sum a number over all ranks."""
    number = begin()
    settings = TrainingArguments(
        output_dir=str(FOLDER),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"x": torch.ones(2)} for _ in range(8)]
    assert Trainer(model=Model(), args=settings, train_dataset=data).train().global_step == 2
    value = torch.ones(1)
    dist.all_reduce(value)
    end(number, float(value))


if __name__ == "__main__":
    main()
