"""The page of failing scripts has all scripts, and its counts are those of its rows."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT
from tests.support.failing import CASES

_PAGE = (ROOT / "docs" / "failures-gallery.md").read_text()
_TITLES = [case.title for case in CASES.values()]


def rows(first: str) -> list[list[str]]:
    """The rows of the table whose head begins with a cell."""
    _, _, table = _PAGE.partition(f"\n| {first} |")
    lines = table.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_script_has_a_row_and_a_section() -> None:
    assert [row[0] for row in rows("script")] == _TITLES
    assert [title for title in re.findall(r"^## (.+)$", _PAGE, re.MULTILINE) if title in _TITLES] == _TITLES


def test_the_counts_are_those_of_the_rows() -> None:
    def count(column: int) -> str:
        cells = [row[column] for row in rows("script")]
        return f"{cells.count('yes')} of {len(cells)}"

    report, output, _ = rows("")
    assert report[1:] == [count(1), count(2), count(4)]
    assert output[2] == count(3)


def test_ferrorun_names_all_causes() -> None:
    assert rows("")[0][1] == f"{len(CASES)} of {len(CASES)}"


def test_the_version_of_torch_is_the_pinned_one() -> None:
    (pinned,) = re.findall(r'"torch==(\d+\.\d+)\.', (ROOT / "pyproject.toml").read_text())
    assert f"under torchrun {pinned}." in _PAGE
