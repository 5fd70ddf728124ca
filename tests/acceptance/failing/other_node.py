"""A training on two nodes. The rank of the second node fails while the first waits in a collective operation."""

import torch.distributed as dist

dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 1:
    raise ValueError("shard 7 has 0 records")
dist.barrier()
dist.destroy_process_group()
