"""Decides whether a report names the true cause of a failure. The rules are the same for all launchers."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.failing import Cause

_EDGE = re.compile(r"={20,}")
_ROOT_CAUSE = "Root Cause"
_RANK = re.compile(r"\b(?:local_)?rank\W{1,12}(\d+)\b")
_PREFIX = re.compile(r"^\[rank(\d+)\]:", re.MULTILINE)


class Verdict(NamedTuple):
    """What a reader learns from the output of a launcher."""

    report: bool
    """The report at the end has the rank, and the text of the error or the source of the signal."""
    output: bool
    """The whole output has them somewhere. The reader has to know where to look."""
    exit: bool
    """The report has the rank, and the exit code or the signal."""


def report_of(console: str) -> str:
    """Return the last report on a console, an empty text if there is none."""
    found = reports_of(console)
    return found[-1] if found else ""


def reports_of(console: str) -> list[str]:
    """Return all reports on a console: the lines between two edges, the first of which says that the job has failed."""
    lines = console.splitlines()
    edges = [number for number, line in enumerate(lines) if _EDGE.fullmatch(line)]
    return [
        "\n".join(lines[start : end + 1]) for start, end in itertools.pairwise(edges) if " FAILED" in lines[start + 1]
    ]


def judge(cause: Cause, console: str, everything: str) -> Verdict:
    """Compare the output of a job with the cause.

    Args:
        cause: the true cause.
        console: standard error of the first node, where the operator looks.
        everything: the output of all nodes.
    """
    report = report_of(console)
    # The report of torchrun lists the other failures between its title and the first failure.
    title, _, rest = report.partition("\n---")
    first = title + rest[max(rest.find(_ROOT_CAUSE), 0) :]
    rank = _RANK.search(first)
    has_rank = bool(first) and (cause.rank is None or (rank is not None and int(rank[1]) == cause.rank))
    named = {int(number) for number in (*_RANK.findall(everything), *_PREFIX.findall(everything))}
    return Verdict(
        report=has_rank and has_all(cause.texts, first),
        output=(cause.rank is None or cause.rank in named) and has_all(cause.texts, everything),
        exit=has_rank and has_all(_exit(cause), first),
    )


def _exit(cause: Cause) -> tuple[str, ...]:
    if cause.signal is not None:
        return (rf"\b{cause.signal}\b",)
    # An exit code of 0 explains no failure, and a lost node has none.
    return (rf"(?i)exit.?code\W+{cause.exit_code}\b",) if cause.exit_code else cause.texts


def has_all(patterns: Iterable[str], text: str) -> bool:
    """Return whether all regular expressions match somewhere in a text."""
    return all(re.search(pattern, text) for pattern in patterns)


def mismatches(failure: dict[str, Any], cause: Cause) -> list[str]:
    """Return the differences between a failure as JSON and the cause."""
    first = failure["first"]
    sender = (first["sender"] or {}).get("kind")
    exception = (first["exception"] or {}).get("type", "").rpartition(".")[2] or None
    advice = (failure["advice"] or {}).get("cause")
    wanted = {
        "kind": (first["kind"], (cause.kind,)),
        "rank": (first["rank"], (first["rank"] if cause.rank is None else cause.rank,)),
        "exit_code": (first["exit_code"], (cause.exit_code,)),
        "signal": (first["signal"], (cause.signal,)),
        "sender": (sender, cause.senders),
        "exception": (exception, (cause.exception,)),
        "advice": (advice, (cause.advice,)),
    }
    text = json.dumps(first, ensure_ascii=False)
    return [
        *(
            f"{name} is {value!r}, not {expected}"
            for name, (value, expected) in wanted.items()
            if value not in expected
        ),
        *(f"nothing matches {pattern!r}" for pattern in cause.texts if not re.search(pattern, text)),
    ]
