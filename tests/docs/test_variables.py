"""The page of environment variables is complete: each variable that is read is on it, and each on it is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from docs.variables import GROUPS, VARIABLES, WORKER_VARIABLES
from tests.docs.pages import ROOT
from tests.docs.reads import Read, reads_of_python, reads_of_rust, sources_below, strings_of_python

if TYPE_CHECKING:
    from pathlib import Path

_PYTHON = sources_below(ROOT / "python" / "ferroelastic", "*.py")
_RUST = sources_below(ROOT / "rust" / "core" / "src", "*.rs") | sources_below(ROOT / "rust" / "python" / "src", "*.rs")
_DOCUMENTED = {one.name for one in VARIABLES} | {name for name, _ in WORKER_VARIABLES}

# `get_env_variable_or_raise` and the modules of schedulers read variables that their callers name.
_NAMED_BY_CALLERS = {"<env_name>", "<env_names>"}
_READ_ELSEWHERE = {"PET_*", "TMPDIR"}  # by the parser for each option, and by tempfile


def undocumented(reads: list[Read]) -> list[str]:
    return [
        f"{read.place} reads {read.name}: describe it in docs/variables.py"
        for read in reads
        if read.name not in _DOCUMENTED | _NAMED_BY_CALLERS
    ]


def test_each_variable_that_is_read_is_documented() -> None:
    assert undocumented([*reads_of_python(_PYTHON), *strings_of_python(_PYTHON), *reads_of_rust(_RUST)]) == []


def test_each_documented_variable_is_read() -> None:
    read = {one.name for one in (*reads_of_python(_PYTHON), *strings_of_python(_PYTHON), *reads_of_rust(_RUST))}
    assert {one.name for one in VARIABLES} - read == _READ_ELSEWHERE - read


def test_each_variable_has_a_group_and_one_entry() -> None:
    names = [one.name for one in VARIABLES]
    assert len(names) == len(set(names))
    assert {one.group for one in VARIABLES} == set(GROUPS)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('import os\nos.environ.get("NEW")', ["NEW"]),
        ('import os\nos.environ["NEW"]', ["NEW"]),
        ('import os\nos.environ["NEW"] = "1"', []),
        ('import os\n"NEW" in os.environ', ["NEW"]),
        ('import os\nos.getenv("NEW", "1")', ["NEW"]),
        ('from os import environ, getenv\nenviron.pop("NEW")\ngetenv("NEWER")', ["NEW", "NEWER"]),
        ('_NEW = "NEW"\nimport os\nos.environ.get(_NEW)', ["NEW"]),
        ('import os\nfor one in ("NEW", "NEWER"):\n    os.environ.get(one)', ["NEW", "NEWER"]),
        ('import os\nNAMES = ("NEW", "NEWER")\n[os.environ.get(one) for one in NAMES]', ["NEW", "NEWER"]),
        ('import os\nos.environ.get(f"PET_{dest}")', ["PET_*"]),
        ("import os\nos.environ.get(computed())", ["<computed()>"]),
    ],
)
def test_reads_of_python_are_found(text: str, names: list[str]) -> None:
    assert [read.name for read in reads_of_python({"a.py": text})] == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('std::env::var("NEW")', ["NEW"]),
        ('env::var_os("NEW")', ["NEW"]),
        ('unsafe { libc::getenv(c"NEW".as_ptr()) }', ['<c"NEW".as_ptr(>']),
        ("env::var(name)", ["<name>"]),
        ('// env::var("NEW")', []),
        ("std::env::temp_dir()", []),
    ],
)
def test_reads_of_rust_are_found(text: str, names: list[str]) -> None:
    assert [read.name for read in reads_of_rust({"a.rs": text})] == names


def test_a_new_read_is_reported() -> None:
    reads = reads_of_python({"a.py": 'import os\nos.environ.get("FERROELASTIC_NEW")'})
    assert undocumented(reads) == ["a.py:2 reads FERROELASTIC_NEW: describe it in docs/variables.py"]


def test_the_variables_of_workers_are_documented(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import json, os\nwith open({str(tmp_path / 'names')!r}, 'w') as file:\n    json.dump(list(os.environ), file)\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TORCHELASTIC_ENABLE_FILE_TIMER": "1",
    }
    command = [sys.executable, "-m", "ferroelastic.run", "--standalone", "--nproc-per-node=2", "--virtual-local-rank"]
    subprocess.run([*command, str(script)], env=environment, check=True, timeout=30, cwd=tmp_path, capture_output=True)
    names = set(json.loads((tmp_path / "names").read_text())) - {*environment, "LC_CTYPE"}
    assert names - _DOCUMENTED == set()
    optional = {"TORCHELASTIC_SIGNALS_TO_HANDLE", "FERROELASTIC_JOB_END_S"}
    assert {name for name, _ in WORKER_VARIABLES} - names - optional == set()
