"""A job that is told to end loses no checkpoint, whatever the signal, and whatever its agent does at that moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.faults.stopping import STATES, combinations, run_all

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

GROUPS = [(state, nodes) for state in STATES for nodes in (1, 2) if combinations([state], [nodes])]


@pytest.mark.parametrize(("state", "nodes"), GROUPS, ids=[f"{state}-{nodes}" for state, nodes in GROUPS])
def test_no_save_is_lost(tmp_path: Path, state: str, nodes: int) -> None:
    """With each signal that ends a job, and with whole, full and closed standard streams."""
    outcomes = run_all(combinations([state], [nodes]), tmp_path)
    bad = [outcome for outcome in outcomes if outcome.lost or outcome.wrong]
    if bad:
        pytest.fail(f"{len(bad)} of {len(outcomes)} combinations:\n" + "\n\n".join(map(str, bad)), pytrace=False)
