"""Measures implementations alternately in one run and prints a Markdown table of medians, ranges and ratios."""

from __future__ import annotations

import argparse
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Measurement = tuple[Callable[[str], dict[str, list[float]]], int]

__all__ = ["compare"]

_NOTHING = "-"


def compare(
    sides: tuple[str, ...],
    measurements: Mapping[str, Measurement],
    doc: str,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """Measure all sides and print the table.

    Args:
        sides: names of the implementations, first the reference. Each measurement is called with all in turn.
        measurements: by name, a function that measures a side and returns samples by figure, and its number of calls per side. The function
            returns no samples of a figure that the side does not have.
        doc: description of the program, for its help.
        parents: parsers of further options.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], parents=parents)
    parser.add_argument("--only", choices=sorted(measurements), help="measure only this group of figures")
    parser.add_argument("--rounds", type=int, help="number of runs of each side")
    args = parser.parse_args()
    reference, *others = sides
    ratios = ["ratio of medians"] if len(others) == 1 else [f"{side} / {reference}" for side in others]
    titles = ["figure", *(f"{side}: median (range)" for side in sides), *ratios]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}", flush=True)
    for name, (measure, default_rounds) in measurements.items():
        if args.only not in {None, name}:
            continue
        samples: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
        for _ in range(args.rounds or default_rounds):
            for side, figures in samples.items():
                for figure, values in measure(side).items():
                    figures.setdefault(figure, []).extend(values)
        for figure in dict.fromkeys(figure for figures in samples.values() for figure in figures):
            columns = [samples[side].get(figure, []) for side in sides]
            cells = [*map(_summary, columns), *(_ratio(column, columns[0]) for column in columns[1:])]
            print(f"| {' | '.join([figure, *cells])} |", flush=True)


def _summary(samples: list[float]) -> str:
    if not samples:
        return _NOTHING
    return f"{statistics.median(samples):.3g} ({min(samples):.3g} to {max(samples):.3g})"


def _ratio(samples: list[float], reference: list[float]) -> str:
    if not samples or not reference:
        return _NOTHING
    return f"{statistics.median(samples) / statistics.median(reference):.3g}"
