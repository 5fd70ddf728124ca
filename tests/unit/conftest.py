"""Fixtures of the unit tests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.support.fake_launch import Launch

from ferroelastic import run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def launcher_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the variables that the launcher reads."""
    for name in list(os.environ):
        if name.startswith(("PET_", "TORCHELASTIC_")) or name in ("LOGLEVEL", "PYTHON_EXEC"):
            monkeypatch.delenv(name)
    # The launcher sets it. The fixture puts it back.
    monkeypatch.setenv("OMP_NUM_THREADS", "3")


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A training script that does nothing."""
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Stands in for ``elastic_launch`` of ``ferroelastic.run``."""
    fake = Launch()
    monkeypatch.setattr(run, "elastic_launch", fake, raising=False)
    return fake
