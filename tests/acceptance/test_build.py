"""Interpreters that the package is not built for."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not installed")
def test_a_build_for_a_free_threaded_interpreter_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "pyo3.txt"
    config.write_text("implementation=CPython\nversion=3.14\nbuild_flags=Py_GIL_DISABLED\n")
    done = subprocess.run(
        ["cargo", "build", "--quiet", "--locked", "--package", "ferroelastic-python"],
        cwd=ROOT,
        env={**os.environ, "PYO3_CONFIG_FILE": str(config)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert (
        "ferroelastic does not support free-threaded builds of CPython: install it with an interpreter that has the GIL"
        in done.stderr
    )
