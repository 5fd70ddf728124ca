"""Expands compressed host lists of Slurm and Flux: ``n[1-3,5],x[07-09],r[1-2]n[1-4]``."""

from __future__ import annotations

import itertools
import re

__all__ = ["expand"]

_MOST_HOSTS = 1 << 20

# Commas inside of brackets do not separate hosts.
_ENTRY = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_LITERAL = re.compile(r"[\w.-]*", re.ASCII)
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def expand(hosts: str) -> list[str]:
    """Return the hosts of a compressed list, in its order.

    A range keeps the leading zeros of its first number. Several brackets are combined, and the last one changes fastest.

    Args:
        hosts: the list.

    Raises:
        ValueError: the list is malformed or has more than 1048576 hosts. The text is the reason.
    """
    entries = _ENTRY.findall(hosts)
    if ",".join(entries) != hosts or not entries:
        raise ValueError("it has an empty entry or an unbalanced bracket")
    expanded: list[str] = []
    for entry in entries:
        # Literals and brackets alternate.
        literals, brackets = _BRACKET.split(entry)[::2], _BRACKET.split(entry)[1::2]
        for literal in literals:
            if not _LITERAL.fullmatch(literal):
                raise ValueError(f"{literal!r} is not a part of a host name")
        count = len(expanded)
        numbers = []
        size = 1
        for bracket in brackets:
            ranges = [_bounds(part) for part in bracket.split(",")]
            size *= sum(last - first + 1 for first, last, _ in ranges)
            if count + size > _MOST_HOSTS:
                raise ValueError(f"it has more than {_MOST_HOSTS} hosts")
            numbers.append([f"{one:0{width}d}" for first, last, width in ranges for one in range(first, last + 1)])
        expanded.extend(
            "".join(itertools.chain(*zip(literals, (*chosen, ""), strict=True)))
            for chosen in itertools.product(*numbers)
        )
    return expanded


def _bounds(part: str) -> tuple[int, int, int]:
    """Return the first number, the last number and the width of a range.

    Raises:
        ValueError: it is not a range.
    """
    found = _RANGE.fullmatch(part)
    if found is None:
        raise ValueError(f"{part!r} is not a number or a range")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ValueError(f"the range {part!r} ends before it begins")
    return first, last, len(found[1])
