"""Workers that train together, and of which one dies in each attempt but the last.

A linear model learns from data that are the same everywhere. Rank 0 keeps a checkpoint after each step. How the rank dies is the first
argument: in a ``step``, while the others wait for its gradients; or when all are ``idle``, outside of any collective operation, so that only an agent
can tell them. The second argument is the rank (negative from the end), the third the number of attempts that end so.
"""

import contextlib
import json
import os
import select
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

STEPS_PER_ATTEMPT = 2
FEATURES = 4


def load(path: Path, model: torch.nn.Module) -> int:
    """Return the number of steps that have been done."""
    if not path.exists():
        return 0
    kept = torch.load(path)
    model.load_state_dict(kept["model"])
    return int(kept["step"])


def save(path: Path, model: torch.nn.Module, step: int) -> None:
    """Keep a step, wholly or not at all."""
    written = path.with_suffix(".new")
    torch.save({"model": model.state_dict(), "step": step}, written)
    written.rename(path)


def main() -> None:
    """Train to the end, or die."""
    way, victim, deaths = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    folder = Path(os.environ["DIR"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, size = dist.get_rank(), dist.get_world_size()
    died = len(list(folder.glob("death.*")))
    is_victim = died < deaths and rank == victim % size
    torch.manual_seed(7)
    model = torch.nn.Linear(FEATURES, 1)
    done = load(folder / "checkpoint", model)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(16, FEATURES)
    targets = inputs.sum(dim=1, keepdim=True)
    loss = torch.tensor(0.0)
    for step in range(done, STEPS_PER_ATTEMPT * (deaths + 1)):
        dist.barrier()
        if step == STEPS_PER_ATTEMPT * died + 1 and died < deaths:
            if is_victim:
                (folder / f"death.{died}").touch()
                os._exit(1)
            if way == "idle":
                select.select([], [], [])
        loss = torch.nn.functional.mse_loss(parallel(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        if rank == 0:
            save(folder / "checkpoint", model, step + 1)
    if rank == 0:
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        print(json.dumps({"loss": loss.item(), "size": size, "attempt": attempt}), flush=True)
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    # Where Python ends while a thread of gloo's lets go of its last tensor, torch 2.13 aborts.
    sys.stdout.flush()
    os._exit(0)


main()
