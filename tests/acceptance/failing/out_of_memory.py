"""A training whose rank 1 keeps every batch, until the kernel kills it."""

import os
import time

batches = []
while True:
    if os.environ["RANK"] == "1":
        batches.append(b"\1" * (8 << 20))
    else:
        time.sleep(1)
