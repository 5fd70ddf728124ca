"""A training whose rank 1 has fewer batches: it ends with 0 while rank 0 waits for it."""

import os
import queue

messages: queue.Queue[float] = queue.Queue()
if os.environ["RANK"] == "0":
    messages.get()
