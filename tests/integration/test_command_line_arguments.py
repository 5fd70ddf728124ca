"""What of a command line reaches the script, and what becomes of the environment that is active."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ferroelastic

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

FOLDER = str(Path(ferroelastic.__file__).parents[1])
# At once: ranks share the pipe.
SCRIPT = "import os, sys\nos.write(1, ' '.join([os.environ['RANK'], *sys.argv[1:]]).encode() + b'\\n')\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def _launch(
    place: Path, *line: str, module: str = "ferroelastic.run", **variables: str
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}
    return subprocess.run(
        [sys.executable, "-m", module, *line],
        cwd=place,
        env={**clean, "PYTHONPATH": FOLDER, "TMPDIR": str(place), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    "before",
    [
        ["train.py"],
        ["--standalone", "train.py"],
        ["--", "train.py"],
        ["-m", "train"],
        ["--module", "--role", "worker", "train"],
        ["-mt", "0", "train"],
        ["-t0", "-r", "0", "train.py"],
        ["--no-python", "./program"],
        ["--run-path", "train.py"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--mo", "0.9"],
        ["--mo=0.9", "-m", "--nnodes", "2", "--help"],
        ["a", "--", "--r", "-x"],
        ["--no-such-option", "-1", "", "two words"],
    ],
    ids=" ".join,
)
def test_all_that_follows_the_script_is_its_own(place: Path, before: list[str], arguments: list[str]) -> None:
    (place / "program").write_text(f"#!{sys.executable}\n{SCRIPT}")
    (place / "program").chmod(0o755)
    done = _launch(place, *before, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == " ".join(["0", *arguments]) + "\n"


# ---- the environment that is active


def test_an_environment_that_is_not_the_launchers_own_is_warned_of(place: Path) -> None:
    other = place / "venv"
    done = _launch(place, "--nproc-per-node=2", "train.py", VIRTUAL_ENV=str(other), OMP_NUM_THREADS="1")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert f"VIRTUAL_ENV={other} is active, but workers run with {sys.executable}" in line
    assert line.endswith(f"set PYTHON_EXEC={other}/bin/python")


@pytest.mark.parametrize(
    ("line", "variables", "expected"),
    [
        (["train.py"], {"CONDA_PREFIX": "/other"}, 1),
        (["--run-path", "train.py"], {"CONDA_PREFIX": "/other"}, 1),
        (["train.py"], {"VIRTUAL_ENV": sys.prefix}, 0),
        (["train.py"], {"VIRTUAL_ENV": sys.prefix, "CONDA_PREFIX": "/other"}, 0),
        (["train.py"], {"VIRTUAL_ENV": "/other", "CONDA_PREFIX": sys.prefix}, 1),
        (["train.py"], {"CONDA_PREFIX": sys.base_prefix}, 0),
        (["train.py"], {"VIRTUAL_ENV": ""}, 0),
        (["train.py"], {"VIRTUAL_ENV": "/other", "PYTHON_EXEC": sys.executable}, 0),
        (["--no-python", "true"], {"VIRTUAL_ENV": "/other"}, 0),
    ],
)
def test_when_it_is_warned(place: Path, line: list[str], variables: dict[str, str], expected: int) -> None:
    done = _launch(place, *line, **variables)
    assert done.returncode == 0
    assert done.stderr.count("is active, but workers run with") == expected


# ---- the deprecated launcher


def test_the_former_launcher_gives_the_local_rank_as_an_argument(place: Path) -> None:
    done = _launch(place, "--nproc_per_node=2", "train.py", "--mo", "1", module="ferroelastic.launch")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 --local-rank=0 --mo 1", "1 --local-rank=1 --mo 1"]
    assert "FutureWarning: ferroelastic.launch is deprecated" in done.stderr


@pytest.mark.parametrize("flag", ["--use-env", "--use_env"])
def test_the_former_launcher_does_not_with_use_env(place: Path, flag: str) -> None:
    done = _launch(place, flag, "train.py", "--use-env", module="ferroelastic.launch")
    assert done.stdout == "0 --use-env\n"


def test_the_former_launcher_has_the_exit_codes_of_the_new_one(place: Path) -> None:
    (place / "fail.py").write_text("raise SystemExit(7)")
    assert _launch(place, "fail.py", module="ferroelastic.launch").returncode == 7
    done = _launch(place, "--no-python", "true", module="ferroelastic.launch")
    assert done.returncode == 2
    assert "you must also set the '--use-env' flag" in done.stderr.splitlines()[-1]
