"""A training that saves when it is stopped, with a ``DataLoader`` that has worker processes.

Run it with

    ferrorun --standalone --nproc-per-node=2 --grace-signal-target=leader examples/save_on_stop.py --checkpoint model.pt

and end it with Ctrl-C or SIGTERM. Each rank asks after each step whether it is being stopped. The ranks agree on a step, rank 0 saves, and
all ranks end. With ``--grace-signal-target=group``, the default and the way of torchrun, SIGTERM also ends the processes of the loader. The
loader then raises an exception in the training, which saves nothing.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

import ferroelastic

SAVING_TAKES_S = 1.0


class Numbers(IterableDataset[torch.Tensor]):
    """Endless batches."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Return the batches of one worker of the loader."""
        while True:
            yield torch.rand(8)


def must_stop() -> bool:
    """Return whether any rank is being stopped and has the time to save. All ranks get the same answer."""
    notice = ferroelastic.stop_deadline()
    stopping = notice is not None and notice.remaining_s() > SAVING_TAKES_S
    answer = torch.tensor(float(stopping))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer.item())


def main() -> None:
    """Train until the agent stops this worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    path = parser.parse_args().checkpoint
    # Without a handler, SIGTERM and SIGINT would end this process at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    dist.init_process_group("gloo")
    model = torch.nn.Linear(8, 1)
    for step, batch in enumerate(DataLoader(Numbers(), num_workers=2, batch_size=4)):
        model(batch).mean().backward()
        if step == 0:
            sys.stdout.write(f"rank {os.environ['RANK']} trains\n")
        if must_stop():
            if dist.get_rank() == 0:
                time.sleep(SAVING_TAKES_S)  # stands for a large model
                torch.save({"model": model.state_dict(), "step": step}, path)
                sys.stdout.write(f"saved step {step}\n")
            dist.barrier()
            sys.exit(0)


if __name__ == "__main__":
    main()
