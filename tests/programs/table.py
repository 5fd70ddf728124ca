"""The table program by check. Results of several runs add up, because one run of all programs takes long."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.programs.programs import BIN, NOT_STARTING, PROGRAMS, SIDES, Program, Side

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHECKS = ("one node", "killed rank comes back", "exit code", "clean end")
NOT_APPLICABLE = "-"


@dataclass
class Cell:
    """The result of one check on one side."""

    result: str = "no"


class Table:
    """Results, by program, check and side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def cell(self, program: Program, check: str, side: Side) -> Iterator[Cell]:
        """Keep the result of a check, which is ``no`` unless the check says something else."""
        cell = Cell()
        try:
            yield cell
        finally:
            self._put(program, check, side, cell.result)

    def _put(self, program: Program, check: str, side: Side, result: str) -> None:
        path = self._path(program.name, check, side)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(result)

    def _get(self, program: Program, check: str, side: Side) -> str:
        if check == "killed rank comes back" and side not in program.restarts:
            return NOT_APPLICABLE
        path = self._path(program.name, check, side)
        return path.read_text() if path.exists() else "not run"

    def _path(self, *names: str) -> Path:
        return self._folder / "-".join(names).replace(" ", "-")

    def is_empty(self) -> bool:
        """Return whether no check has a result."""
        return not self._folder.exists()

    def write(self, path: Path) -> str:
        """Write the table as Markdown, and return it."""
        lines = [f"| program | version | {' | '.join(CHECKS)} |", "| --- " * (2 + len(CHECKS)) + "|"]
        for program in PROGRAMS:
            cells = [" / ".join(self._get(program, check, side) for side in SIDES) for check in CHECKS]
            cells = [NOT_APPLICABLE if set(cell.split(" / ")) == {NOT_APPLICABLE} else cell for cell in cells]
            lines.append(f"| {program.name} | {_version(program.package)} | {' | '.join(cells)} |")
        for name, package in NOT_STARTING.items():
            lines.append(f"| {name} | {_version(package)} |{' does not start with torch 2.13 |' * len(CHECKS)}")
        text = "\n".join(lines) + "\n"
        path.write_text(text)
        return text


def _version(package: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([BIN / "python", "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
