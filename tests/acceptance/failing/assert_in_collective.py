"""A training in which rank 1 fails while the other ranks wait for it in a collective operation."""

import torch
import torch.distributed as dist


def load_batch(rank: int) -> torch.Tensor:
    """Return the tokens of this rank."""
    tokens = torch.full((8,), 50257 if rank == 1 else 17)
    assert int(tokens.max()) < 50257, f"token {int(tokens.max())} is not in the vocabulary"
    return tokens


dist.init_process_group("gloo")
dist.barrier()
batch = load_batch(dist.get_rank())
dist.all_reduce(batch)
dist.destroy_process_group()
