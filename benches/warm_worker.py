"""A worker of ``warm.py``: notes the times of its progress in a file, then waits for its end.

    python warm_worker.py FOLDER MODULES (import | train)

SIGUSR1 ends it with exit code 0.
"""

import time

STARTED_NS = time.monotonic_ns()  # the first instruction

import sys  # noqa: E402

FOLDER, MODULES, MODE = sys.argv[1:]
IS_WARM = all(name in sys.modules for name in MODULES.split(","))

import os  # noqa: E402
import signal  # noqa: E402

LIMIT_S = 180
"""A worker ends after this time, even if its launcher has been killed."""


def train() -> None:
    """Connect to the other workers, and check one collective operation."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    total = torch.ones(1)
    distributed.all_reduce(total)
    assert total.item() == distributed.get_world_size(), total


def main() -> None:
    signal.alarm(LIMIT_S)
    # Blocked before any thread exists. The threads of gloo inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for name in MODULES.split(","):
        __import__(name)
    times = {"started": STARTED_NS, "imported": time.monotonic_ns()}
    if MODE == "train":
        train()
        times["trained"] = time.monotonic_ns()
    import json

    note = {"pid": os.getpid(), "rank": int(os.environ["RANK"]), "is_warm": IS_WARM, "times": times}
    unfinished = os.path.join(FOLDER, f"unfinished.{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(note, file)
    os.rename(unfinished, os.path.join(FOLDER, f"note.{os.getpid()}"))
    signal.sigwait({signal.SIGUSR1})
    os._exit(0)


if __name__ == "__main__":
    main()
