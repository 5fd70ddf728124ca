"""Workers that train together, and are disturbed in each attempt but the last.

A linear model learns from data that are the same everywhere. Rank 0 keeps a checkpoint after each step. Arguments:

- ``step`` or ``idle``: in the midst of a step, while others are inside of a collective operation and wait for a rank; or when all are idle, so that
  only an agent can tell them.
- the rank that is killed (negative from the end), or ``none``: then all wait for what is done to them from outside.
- how many attempts are disturbed.

``$DIR`` has what happened and when (``CLOCK_MONOTONIC``, nanoseconds): a file ``death.N`` for each disturbance, ``reached.N.RANK`` for each rank that waits for
one, and in the files ``begun`` and ``trained`` a line for each attempt, from its rank 0: when it started, and when it had done its first step.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
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


def note(path: Path) -> None:
    """Add a line with the time."""
    with path.open("a") as file:
        file.write(f"{time.monotonic_ns()}\n")


def main() -> None:
    """Train to the end, or until the disturbance."""
    way, victim, deaths = sys.argv[1], sys.argv[2], int(sys.argv[3])
    folder = Path(os.environ["DIR"])
    if os.environ["RANK"] == "0":
        note(folder / "begun")
    dist.init_process_group("gloo", timeout=timedelta(seconds=15))
    rank, size = dist.get_rank(), dist.get_world_size()
    died = len(list(folder.glob("death.*")))
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
            if victim == "none":
                note(folder / f"reached.{died}.{rank}")
            elif rank == int(victim) % size:
                note(folder / f"death.{died}")
                os.kill(os.getpid(), signal.SIGKILL)
            if way == "idle" or (victim == "none" and rank == size - 1):
                select.select([], [], [])
        loss = torch.nn.functional.mse_loss(parallel(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        if rank == 0:
            save(folder / "checkpoint", model, step + 1)
            if step == done:
                note(folder / "trained")
    if rank == 0:
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        print(json.dumps({"loss": loss.item(), "size": size, "attempt": attempt}), flush=True)
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    # Where Python ends while a thread of gloo's lets go of its last tensor, torch 2.13 aborts.
    sys.stdout.flush()
    os._exit(0)


main()
