"""A few cases of the campaign of faults. ``python -m tests.faults.campaign`` runs as many as are wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.faults.campaign import run_all, table
from tests.faults.campaign_cases import make

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

SEED = 0
NUMBER = 40
PARALLEL = 4


def test_random_faults_leave_no_process_and_lose_no_save(tmp_path: Path) -> None:
    verdicts = run_all((make(SEED, index) for index in range(NUMBER)), tmp_path, PARALLEL)
    bad = [verdict for verdict in verdicts if verdict.troubles]
    if bad:
        pytest.fail("\n\n".join([*map(str, bad), table(verdicts)]), pytrace=False)
