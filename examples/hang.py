"""A worker that hangs, and the report of the agent's watchdog.

Two ranks run some steps. Each sets a deadline of two seconds for the exchange of gradients. In the first attempt the last rank waits for a
message that is never sent. Run it with

    TORCHELASTIC_ENABLE_FILE_TIMER=1 ferrorun --standalone --nproc-per-node=2 examples/hang.py

The report names the timer and shows the line at which the rank hung. With ``--max-restarts=1`` the second attempt succeeds.
"""

import os
import queue
import sys

from ferroelastic import timer

STEPS = 3
TIMEOUT_S = 2

messages: queue.Queue[float] = queue.Queue()


def exchange_gradients(step: int, *, hangs: bool) -> float:
    """Stands for a collective operation."""
    if not hangs:
        messages.put(step / STEPS)
    return messages.get()  # blocks if the queue is empty


def main() -> None:
    """Simulate a training."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if "TORCHELASTIC_TIMER_FILE" not in os.environ:
        sys.exit("the watchdog is off: start ferrorun with TORCHELASTIC_ENABLE_FILE_TIMER=1 in its environment")
    timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
    for step in range(STEPS):
        hangs = attempt == 0 and step == 1 and rank == world_size - 1
        with timer.expires(after=TIMEOUT_S, scope=f"exchange of step {step}"):
            exchange_gradients(step, hangs=hangs)
    print(f"rank {rank} has finished attempt {attempt}", flush=True)


if __name__ == "__main__":
    main()
