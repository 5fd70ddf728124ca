"""Runs the failing scripts under ferrorun and torchrun, and writes the page that shows both reports.

just failures-table                       # docs/failures-gallery.md
just failures-table --only typo hang      # some of them, on standard output
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import sysconfig
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tests.support.failing import CASES, SCRIPTS, SIDES, UnavailableError, run
from tests.support.harness import ROOT, Launcher
from tests.support.judge import Verdict, judge, report_of
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tests.support.failing import Case

PAGE = ROOT / "docs" / "failures-gallery.md"
_LIMIT_S = 30
_LAST_LINES = 24
_TITLES = {"ferrorun": "`ferrorun`", "torchrun": "torchrun", "recorded": "torchrun with `@record`"}
_ROWS = {
    "report": "The report has the rank, and the text of the error or the source of the signal",
    "output": "The whole output of all nodes has them somewhere",
    "exit": "The report has the rank, and the exit code or the signal",
}

_INTRODUCTION = """\
# Twenty failures

Each script fails in its own way, under `ferrorun` and under torchrun {version}. `just failures-table` runs all of them and writes this page.

The scripts are in `tests/acceptance/failing`. They run with two workers, and two of them on two nodes. Times, process ids, ports, addresses and paths are replaced by placeholders.

## Counts

The same rules count for both launchers. The true cause of each script is data in `tests/support/failing.py`: the rank, the exit code or the signal, and regular expressions for the text of the error or for the source of the signal. `tests/support/judge.py` compares them with the last report on the standard error of the first node.
"""

_AFTER_COUNTS = """
- A signal without a line about its sender is not a correct cause, because the OOM killer, a user and a program all send SIGKILL. SIGSEGV is the cause itself. Linux does not report the sender of SIGKILL and SIGTERM: after a kill by a user or a program, the report of `ferrorun` has a line that the sender is unknown and not the agent, and for SIGKILL that the kernel has counted no OOM kill. This line counts as correct.
- torchrun has no report if its watchdog expires, if the error file is broken, or if a rank ends early with 0. The last one never ends by itself: the run is stopped after {limit} s.
- `@record` of torch writes an exception into the error file, and the report of torchrun has its traceback. `ferrorun` reads the exception from the standard error and needs no decorator.

## Each script

The cells have `yes` for a report with the rank and the text or source.
"""


class Run(NamedTuple):
    """A run of a script under one launcher."""

    shown: str
    """The report, or the last lines of the output without one."""
    verdict: Verdict
    left: int
    """Number of processes that outlived the launcher."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help="scripts to run; prints the page")
    names = parser.parse_args().only
    runs: dict[str, dict[str, Run]] = defaultdict(dict)
    for name in names or CASES:
        for side in SIDES:
            print(f"{name}: {side}", file=sys.stderr)
            try:
                runs[name][side] = run_one(CASES[name], side)
            except UnavailableError as error:
                sys.exit(f"{name} cannot run here: {error}")
    page = "\n".join(lines(runs)) + "\n"
    if names:
        print(page)
    else:
        PAGE.write_text(page)


def run_one(case: Case, side: str) -> Run:
    """Run a script under a launcher."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(Path(folder), zoo="")
        try:
            ending = run(case, launcher, side, limit_s=_LIMIT_S)
            eventually(lambda: not launcher.jobs[0].processes())  # helper processes end after the launcher
            left = len(launcher.jobs[0].processes())
        finally:
            with suppress(AssertionError):  # torchrun leaves processes behind
                launcher.clean_up()
        everything = "\n".join([*ending.consoles, *ending.outputs])
        shown = report_of(ending.consoles[0]) or _end_of(ending.consoles[0])
        return Run(plain(shown, folder), judge(case.cause, ending.consoles[0], everything), left)


def _end_of(console: str) -> str:
    lines = console.rstrip().splitlines()
    left_out = len(lines) - _LAST_LINES
    return "\n".join([f"({left_out} lines before)", *lines[-_LAST_LINES:]] if left_out > 0 else lines) or "(no output)"


def plain(text: str, folder: str) -> str:
    """Replace everything that another run or machine changes."""
    words = {
        os.fspath(SCRIPTS): "/train",
        folder: "/tmp/job",
        sys.executable: "python",
        sysconfig.get_path("purelib"): "site-packages",
        sysconfig.get_path("stdlib"): "python",
        os.fspath(ROOT): "/src",
        socket.getfqdn(): "node0",
        socket.gethostname(): "node0",
    }
    for word, placeholder in words.items():
        text = text.replace(word, placeholder)
    for pattern, placeholder in _CHANGING:
        text = re.sub(pattern, placeholder, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


_CHANGING = (
    (r"\d{4}-\d\d-\d\d[T_ ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:[+-]\d\d:\d\d)?", "TIME"),
    (r"\b([EWI])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ ", r"\1TIME PID "),
    (r"\b(pid:? |PID |process |agent |ferrorun\[)\d+", r"\1PID"),
    (r"\b127\.0\.0\.1(\]?):\d+", r"127.0.0.1\1:PORT"),
    (r"/torch_\d+_\d+_", "/torch_PID_N_"),
    (r"\b0x[0-9a-f]{6,}", "0xADDRESS"),
    (r"torchelastic_\w{8}/[\w-]+", "torchelastic_X/RUN"),
    (r"\b(?:peak) \d+(?:\.\d+)? (?:GiB|MiB)", "peak N MiB"),
    (r"noticed \d+\.\d ms late", "noticed N ms late"),
)


def lines(runs: Mapping[str, Mapping[str, Run]]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield _INTRODUCTION.format(version=".".join(torch.__version__.split(".")[:2]))
    yield from _table(("", *_TITLES.values()), _counts(runs))
    yield _AFTER_COUNTS.format(limit=_LIMIT_S)
    head = ("script", "`ferrorun`", "torchrun", "torchrun's whole output", "torchrun with `@record`")
    yield from _table(head, (_row(CASES[name], sides) for name, sides in runs.items()))
    for name, sides in runs.items():
        yield f"\n## {CASES[name].title}\n"
        yield f"`{CASES[name].script}`. {_after(CASES[name])}"
        for side in ("ferrorun", "torchrun"):
            yield f"\n{_TITLES[side]}:\n\n```text\n{sides[side].shown}\n```"
            if sides[side].left:
                yield f"\n{_TITLES[side]} leaves {sides[side].left} process{'es' * (sides[side].left > 1)} behind."


def _counts(runs: Mapping[str, Mapping[str, Run]]) -> Iterator[tuple[str, ...]]:
    for field, meaning in _ROWS.items():
        right = (sum(getattr(sides[side].verdict, field) for sides in runs.values()) for side in _TITLES)
        yield (meaning, *(f"{number} of {len(runs)}" for number in right))


def _row(case: Case, sides: Mapping[str, Run]) -> tuple[str, ...]:
    answers = (
        sides["ferrorun"].verdict.report,
        sides["torchrun"].verdict.report,
        sides["torchrun"].verdict.output,
        sides["recorded"].verdict.report,
    )
    return (case.title, *("yes" if answer else "no" for answer in answers))


def _after(case: Case) -> str:
    options = f" `ferrorun` runs with `{' '.join(case.options)}`." if case.options else ""
    return f"{'Two nodes of one worker.' if case.nodes > 1 else 'One node of two workers.'}{options}"


def _table(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    head = tuple(head)
    yield "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    main()
