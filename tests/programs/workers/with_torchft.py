"""A worker of one of torchft's replica groups."""

from __future__ import annotations

from datetime import timedelta

import torch
from torchft import Manager, ProcessGroupGloo
from work import begin, carry_out, finish


def main() -> None:
    """Sum a number over all replica groups, in two steps."""
    number = begin()
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)),
        min_replica_size=2,
        load_state_dict=lambda _state: None,
        state_dict=dict,
        timeout=timedelta(seconds=60),
        init_sync=False,
    )
    for step in range(2):
        total = 0.0
        while manager.current_step() == step:
            manager.start_quorum()
            value = torch.ones(1)
            manager.allreduce(value, reduce_op=torch.distributed.ReduceOp.SUM).wait()
            total = float(value)
            manager.should_commit()
        if step == 0:
            carry_out(number, total)
    finish(number)
    manager.shutdown()


if __name__ == "__main__":
    main()
