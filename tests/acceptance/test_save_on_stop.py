"""A training with a real data loader saves when it is stopped: the example, run as its text says."""

from __future__ import annotations

import signal

import pytest
from tests.support.harness import ROOT, Launcher

pytest.importorskip("torch")

EXAMPLE = str(ROOT / "examples" / "save_on_stop.py")


@pytest.mark.parametrize(("target", "saves"), [("leader", True), ("group", False)])
def test_the_example(launch: Launcher, target: str, saves: bool) -> None:
    checkpoint = launch.folder / "model.pt"
    job = launch(f"--grace-signal-target={target}", EXAMPLE, f"--checkpoint={checkpoint}")
    assert job.lines(2) == ["rank 0 trains", "rank 1 trains"]
    job.settle(2)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM, job.story
    assert checkpoint.exists() == saves, job.story
    assert ("DataLoader worker" in job.errors) != saves, job.story
