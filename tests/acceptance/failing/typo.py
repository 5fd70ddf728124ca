"""A training with a typo in the name of an option: all ranks fail with the same exception."""

import argparse

parser = argparse.ArgumentParser()
parser.add_argument("--learning-rate", type=float, default=0.1)
options = parser.parse_args()


def train(steps: int) -> float:
    """Return the last loss."""
    loss = 1.0
    for _ in range(steps):
        loss *= 1.0 - options.learing_rate
    return loss


print(train(10))
