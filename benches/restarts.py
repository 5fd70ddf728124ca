"""Success rate of restarts of a real training under ferrorun and torchrun, with two nodes of two workers each.

    just bench-restarts                                  # 50 disturbances of each kind under ferrorun, 4 under torchrun
    just bench-restarts --side ferrorun --number 4       # a short run

Every finished training must have the loss of an undisturbed training. An attempt whose workers do not connect to each other counts as a failed
restart. A job without progress for a minute, or with three failed restarts, is stopped, and a new job runs the remaining disturbances. The
disturbances of a network link need root and iproute2. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.harness import FERRORUN, Launcher  # noqa: E402  # needs the path above
from tests.support.two_nodes import (  # noqa: E402  # needs the path above
    AGENT_KILLED,
    LINK_DOWN,
    WORKER_KILLED,
    Disturbance,
    Training,
    loss_of_undisturbed_training,
    network,
    on_loopback,
    on_network,
)

SIDES = {"torchrun": (sys.executable, "-m", "torch.distributed.run"), "ferrorun": FERRORUN}
# Few for torchrun: detecting a failed restart takes a minute.
NUMBERS = {"torchrun": 4, "ferrorun": 50}
TIMEOUT_S = 60.0
NAMES = {
    ("step", "-1"): "last rank killed, peers inside a collective",
    ("idle", "-1"): "last rank killed, peers idle",
    ("step", "0"): "rank 0 killed, peers inside a collective",
    ("idle", "0"): "rank 0 killed, peers idle",
    ("step", "agent"): "agent killed, and another one joins, inside a collective",
    ("idle", "agent"): "agent killed, and another one joins, peers idle",
    ("step", "link"): "link down, and up, inside a collective",
    ("idle", "link"): "link down, and up, peers idle",
}


def measure(side: str, disturbance: Disturbance, number: int) -> str:
    """Disturb trainings ``number`` times. Return the number of successful restarts, of all restarts, and their duration."""
    restarts = came_back = stuck = 0
    seconds: list[float] = []
    while number > 0:
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            launcher = Launcher(folder, zoo="")
            namespaces = stack.enter_context(network()) if disturbance in LINK_DOWN else None
            nodes = "2" if disturbance in WORKER_KILLED else "1:2"
            commands = (
                on_network(SIDES[side], namespaces, nodes, "last_call_timeout=1")
                if namespaces
                else on_loopback(SIDES[side], nodes)
            )
            training = Training(launcher, commands, disturbance, number, TIMEOUT_S)
            stack.callback(clean_up, launcher)
            outcome = training.run(namespaces)
            if outcome.is_stuck:
                stuck += 1
            else:
                (result,) = outcome.results
                undisturbed = folder / "undisturbed"
                undisturbed.mkdir()
                loss = loss_of_undisturbed_training(undisturbed, number)
                assert abs(result["loss"] - loss) <= 1e-4 * loss, f"{side}: the loss is {result['loss']}, not {loss}"
        restarts += outcome.restarts
        came_back += outcome.came_back
        seconds += outcome.seconds
        number -= outcome.came_back + 1 if outcome.is_stuck else number
        number -= number % 2 if disturbance.victim == "none" else 0
    times = f", {statistics.median(seconds):.2g} s ({min(seconds):.2g} to {max(seconds):.2g})" if seconds else ""
    return f"{came_back} of {restarts}{times}{f', {stuck} jobs stuck' if stuck else ''}"


def clean_up(launcher: Launcher) -> None:
    """End all processes of a launcher."""
    for job in launcher.jobs:
        job.clean_up()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", choices=list(SIDES), action="append", help="measure only this launcher")
    parser.add_argument("--number", type=int, help="number of disturbances of each kind, even")
    parser.add_argument("--only", choices=sorted({what for _, what in NAMES}), help="one kind of disturbance")
    args = parser.parse_args()
    sides = args.side or list(SIDES)
    print(f"| {' | '.join(['successful restarts', *sides])} |\n|{' --- |' * (len(sides) + 1)}", flush=True)
    for disturbance in (*WORKER_KILLED, *AGENT_KILLED, *LINK_DOWN):
        if args.only in {None, disturbance.what}:
            row = [measure(side, disturbance, args.number or NUMBERS[side]) for side in sides]
            print(f"| {' | '.join([NAMES[disturbance.way, disturbance.what], *row])} |", flush=True)


if __name__ == "__main__":
    main()
