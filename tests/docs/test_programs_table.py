"""The table of tested programs has the versions that the tests pin."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT
from tests.programs.programs import NOT_STARTING, PROGRAMS


def test_the_versions_are_those_of_the_environment() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tests/programs/requirements.txt").read_text(), re.MULTILINE))
    table = (ROOT / "docs/recipes/programs-table.md").read_text()
    shown = dict(re.findall(r"^\| (.+?) \| (\d[\w.]*) \|", table, re.MULTILINE))
    packages = {program.name: program.package for program in PROGRAMS} | NOT_STARTING
    assert shown == {name: pins[package] for name, package in packages.items()}
