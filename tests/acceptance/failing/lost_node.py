"""A training on two nodes. The second node vanishes during a collective operation."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
gradients = torch.ones(1024)
dist.all_reduce(gradients)
Path(os.environ["DIR"], f"trains.{dist.get_rank()}").write_text(str(os.getpid()))
while True:
    dist.all_reduce(gradients)
    time.sleep(0.05)
