"""The table of results, which the run prints and leaves in ``target/programs/table.md``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.programs.programs import ENVIRONMENT
from tests.programs.table import Table
from tests.support.harness import Launcher

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table(ENVIRONMENT.parent / "results")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash[_TABLE]
    if not table.is_empty():
        terminalreporter.section("programs under torch's agent and under ferroelastic")
        terminalreporter.write_line(table.write(ENVIRONMENT.parent / "table.md"))


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """Takes the results."""
    return request.config.stash[_TABLE]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Launcher]:
    """Starts programs. A process that outlives its program fails the test."""
    launcher = Launcher(tmp_path, zoo="")
    yield launcher
    launcher.clean_up()
