"""A training whose rank 1 waits for a message that nothing sends, until its deadline of the watchdog."""

import os
import queue
import time

from torch.distributed.elastic import timer

messages: queue.Queue[float] = queue.Queue()
timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
with timer.expires(after=1 if os.environ["RANK"] == "1" else 60, scope="exchange of gradients"):
    if os.environ["RANK"] == "1":
        messages.get()
    time.sleep(60)
