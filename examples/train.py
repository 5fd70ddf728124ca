"""Distributed training on real data, with checkpoints that an elastic agent can resume from.

A small byte-level language model learns the source text of Python's own ``argparse``. Run it with

    ferrorun --standalone --nproc-per-node=2 --max-restarts=1 examples/train.py --checkpoint /tmp/model.pt

and add ``--kill-rank 1 --kill-step 30`` to kill that rank with SIGKILL once. The restarted workers resume from the last checkpoint and
finish with exactly the loss of an undisturbed run. The script does not depend on the launcher: it also runs under torchrun.
"""

import argparse
import gc
import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CONTEXT = 16
BATCH = 64


class NextByte(nn.Module):
    """Predicts a byte from the preceding bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.hidden = nn.Linear(CONTEXT * 16, 64)
        self.out = nn.Linear(64, 256)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next byte for each row of ``context``."""
        return self.out(torch.tanh(self.hidden(self.embed(context).flatten(1))))


def batch(text: torch.Tensor, step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part of step ``step`` for ``rank``. It is the same in every attempt."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT, (BATCH * world_size,), generator=generator)[rank::world_size]
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def main() -> None:
    """Train, and resume from the checkpoint if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--checkpoint", type=Path, required=True, help="file to resume from and save to")
    parser.add_argument("--kill-rank", type=int, default=-1, help="rank that dies by SIGKILL, once")
    parser.add_argument("--kill-step", type=int, default=-1, help="step at which it dies")
    args = parser.parse_args()

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.manual_seed(0)
    model = DistributedDataParallel(NextByte())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    if rank == 0:
        print(f"attempt {attempt}: {world_size} ranks from step {first} to {args.steps}", flush=True)

    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    for step in range(first, args.steps):
        if attempt == 0 and (rank, step) == (args.kill_rank, args.kill_step):
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        context, following = batch(text, step, rank, world_size)
        loss = nn.functional.cross_entropy(model(context), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step + 1) % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            new = args.checkpoint.with_suffix(".new")
            torch.save(state, new)
            new.replace(args.checkpoint)

    with torch.no_grad():
        context, following = batch(text, args.steps, rank, world_size)
        loss = nn.functional.cross_entropy(model(context), following)
    dist.all_reduce(loss)
    if rank == 0:
        print(json.dumps({"attempt": attempt, "loss": loss.item() / world_size}), flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    # DDP's reference cycles would keep gloo's threads alive during the interpreter's shutdown, where torch 2.13 sometimes aborts.
    gc.collect()
    dist.destroy_process_group()
