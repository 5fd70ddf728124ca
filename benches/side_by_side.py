"""Measures two implementations alternately in one run and prints a Markdown table of medians, ranges and ratios."""

from __future__ import annotations

import argparse
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Measurement = tuple[Callable[[str], dict[str, list[float]]], int]

__all__ = ["compare"]


def compare(sides: tuple[str, str], measurements: Mapping[str, Measurement], doc: str) -> None:
    """Measure both sides and print the table.

    Args:
        sides: names of the reference and of our implementation. Each measurement is called with both in turn.
        measurements: by name, a function that measures a side and returns samples by figure, and its number of calls per side.
        doc: description of the program, for its help.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--only", choices=sorted(measurements), help="measure only this group of figures")
    parser.add_argument("--rounds", type=int, help="number of runs of each side")
    args = parser.parse_args()
    theirs, ours = sides
    print(
        f"| figure | {theirs}: median (range) | {ours}: median (range) | ratio of medians |\n| --- | --- | --- | --- |"
    )
    for name, (measure, default_rounds) in measurements.items():
        if args.only not in {None, name}:
            continue
        samples: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
        for _ in range(args.rounds or default_rounds):
            for side, figures in samples.items():
                for figure, values in measure(side).items():
                    figures.setdefault(figure, []).extend(values)
        for figure, their_samples in samples[theirs].items():
            our_samples = samples[ours][figure]
            ratio = statistics.median(our_samples) / statistics.median(their_samples)
            print(f"| {figure} | {_summary(their_samples)} | {_summary(our_samples)} | {ratio:.3g} |", flush=True)


def _summary(samples: list[float]) -> str:
    return f"{statistics.median(samples):.3g} ({min(samples):.3g} to {max(samples):.3g})"
