"""A worker of one of torchft's replica groups."""

from __future__ import annotations

from datetime import timedelta

import torch
from torchft import Manager, ProcessGroupGloo
from work import begin, end


def main() -> None:
    """Sum a number over all replica groups."""
    number = begin()
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)),
        min_replica_size=2,
        load_state_dict=lambda _state: None,
        state_dict=dict,
        timeout=timedelta(seconds=60),
    )
    manager.start_quorum()
    value = torch.ones(1)
    manager.allreduce(value, reduce_op=torch.distributed.ReduceOp.SUM).wait()
    manager.should_commit()
    end(number, float(value))
    manager.shutdown()


if __name__ == "__main__":
    main()
