"""An agent in a forked child of a process that has used torch is not disturbed by what it has inherited."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.support.harness import ROOT

pytest.importorskip("torch")

NUMBER = 4


def test_agents_run_in_forked_children() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.acceptance.forked", "ours", str(NUMBER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
