"""``ferroelastic.install()`` in a process without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.support.harness import ROOT


def output(program: str) -> list[Any]:
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *sys.path])}
    command = [sys.executable, "-S", "-c", f"import json, os, sys\n{program}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: list[Any] = json.loads(ended.stdout)
    return found


def test_install_loads_nothing_but_itself() -> None:
    program = "before = set(sys.modules)\nimport ferroelastic\nferroelastic.install()\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    assert set(output(program)) - {"__future__"} == {"ferroelastic", "ferroelastic._install"}


def test_modules_that_stand_in_for_torchs_are_left_alone() -> None:
    program = """
import types
sys.modules["torch.distributed.run"] = own = types.SimpleNamespace(run=1)
import ferroelastic
ferroelastic.install()
print(json.dumps([own.run, sys.modules["torch.distributed.run"] is own]))
"""
    assert output(program) == [1, True]


def test_a_module_of_torch_that_is_missing_stays_missing() -> None:
    program = """
import ferroelastic
ferroelastic.install()
try:
    import torch.distributed.run
except ModuleNotFoundError as error:
    print(json.dumps([error.name]))
"""
    command = program.replace(
        "import ferroelastic",
        "sys.path[:] = [one for one in sys.path if 'site-packages' not in one]\nimport ferroelastic",
    )
    assert output(command) == ["torch"]
