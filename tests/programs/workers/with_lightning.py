"""A worker that uses Lightning's Trainer, which reads torchrun's environment."""

from __future__ import annotations

import os

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch import LightningModule, Trainer
from work import FOLDER, begin, end


class Model(LightningModule):
    """The smallest model that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
        """A loss."""
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    """Train two steps, then sum a number over all ranks."""
    number = begin()
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy="ddp",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=FOLDER,
    )
    assert TorchElasticEnvironment.detect()
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2))
    assert trainer.global_step == 2
    end(number, float(trainer.strategy.reduce(torch.ones(1), reduce_op="sum")))


if __name__ == "__main__":
    main()
