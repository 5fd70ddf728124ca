"""A few cases of the campaign of faults of warm workers. ``python -m tests.faults.warm_campaign`` runs as many as are wanted."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.faults.warm_campaign import run_all

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.environ.get("FERROELASTIC_PIDFD") == "0", reason="warm workers need pidfds")


def test_random_faults_of_warm_processes_cost_no_restart_and_leave_nothing(tmp_path: Path) -> None:
    verdicts = run_all(0, range(8), tmp_path, 2)
    bad = [verdict for verdict in verdicts if verdict.troubles]
    assert not bad
    assert sum(verdict.faults for verdict in verdicts) > 0
    assert sum(verdict.warm for verdict in verdicts) > 0
