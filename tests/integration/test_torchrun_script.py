"""``ferroelastic-torchrun``: a ``torchrun`` that runs ``ferrorun``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ferroelastic._exec.script import find_torchrun, interpreter_of, main

if TYPE_CHECKING:
    from pathlib import Path

    Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _empty_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [script, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def other_torchrun(folder: Path, python: str) -> Path:
    folder.mkdir()
    script = folder / "torchrun"
    script.write_text(f"#!{python}\nimport sys\n")
    script.chmod(0o755)
    return script


def test_the_script_is_ferrorun_of_this_environment(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "a folder's name"
    assert main([str(folder)]) == 0
    assert f"{folder}/torchrun runs ferrorun of {sys.executable}\n" in capsys.readouterr().out
    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys\nprint(sys.executable, os.environ['RANK'], sys.argv[1:])\nsys.exit(9)")
    ended = run(folder / "torchrun", "--standalone", str(worker), "a b", "--c")
    assert (ended.stdout, ended.returncode) == (f"{sys.executable} 0 ['a b', '--c']\n", 9)


def test_the_working_folder_is_not_searched_for_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit('of the user')")
    monkeypatch.chdir(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert run(tmp_path / "torchrun", "--help").returncode == 0


def test_writing_again_renews_the_script(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "torchrun").read_text()
    (tmp_path / "torchrun").write_text(text.replace(sys.executable, "/gone/python"))
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "torchrun").read_text() == text
    assert os.listdir(tmp_path) == ["torchrun"]


def test_a_foreign_file_is_neither_overwritten_nor_removed(tmp_path: Path, capsys: Capture) -> None:
    script = other_torchrun(tmp_path / "bin", sys.executable)
    text = script.read_text()
    assert main([str(script.parent)]) == 1
    assert main(["--remove", str(script.parent)]) == 1
    assert script.read_text() == text
    assert capsys.readouterr().err.splitlines() == [
        f"ferroelastic-torchrun: error: {script} is not a file of ferroelastic-torchrun and is not overwritten; choose another folder",
        f"ferroelastic-torchrun: error: {script} is not a file of ferroelastic-torchrun and is not removed",
    ]


def test_a_link_is_foreign_whatever_it_leads_to(tmp_path: Path) -> None:
    assert main([str(tmp_path / "a")]) == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "torchrun").symlink_to(tmp_path / "a" / "torchrun")
    assert main([str(tmp_path / "b")]) == 1


def test_remove_takes_the_script_away(tmp_path: Path, capsys: Capture) -> None:
    assert main([str(tmp_path)]) == 0
    assert main(["--remove", str(tmp_path)]) == 0
    assert os.listdir(tmp_path) == []
    assert main(["--remove", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"ferroelastic-torchrun: error: {tmp_path}/torchrun does not exist\n"


def test_a_script_of_a_deleted_environment_says_so(tmp_path: Path) -> None:
    for gone in (sys.executable, "_exec/torchrun.py"):
        assert main([str(tmp_path)]) == 0
        script = tmp_path / "torchrun"
        script.write_text(script.read_text().replace(gone, f"{gone}-gone"))
        ended = run(script, "--help")
        assert ended.returncode == 127
        assert ended.stderr.startswith(f"torchrun: error: {script} runs ")
        assert "one of them does not exist" in ended.stderr


def test_the_first_torchrun_of_path_is_named(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    stale = other_torchrun(tmp_path / "stale", "/gone/bin/python3")
    other = other_torchrun(tmp_path / "other", shutil.which("python3", path="/usr/bin:/bin") or "/bin/python3")

    def said(*path: Path) -> str:
        monkeypatch.setenv("PATH", ":".join(map(str, path)))
        assert main([str(own)]) == 0
        return capsys.readouterr().out.splitlines()[1]

    remedy = f"put the folder first: export PATH={own}:$PATH"
    assert said(tmp_path) == f"PATH has no torchrun; {remedy}"
    assert said(stale.parent, own) == (
        f"PATH has {stale} first, whose interpreter /gone/bin/python3 does not exist; {remedy}"
    )
    assert said(other.parent).startswith(f"PATH has {other} first")
    assert said(own, stale.parent) == f"PATH has {own} before any other torchrun"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file" / "folder")]) == 1
    assert capsys.readouterr().err.startswith("ferroelastic-torchrun: error: ")


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("#!/a/bin/python3\n", "/a/bin/python3"),
        ("#!/bin/sh\n'''exec' /a/bin/python \"$0\" \"$@\"\n", "/a/bin/python"),
        ('#!/bin/sh\n\'\'\'exec\' "/a b/bin/python" "$0" "$@"\n', "/a b/bin/python"),
        ("#!/bin/sh\nexec torchrun.real\n", None),
        ("\x7fELF'", None),
    ],
)
def test_the_interpreter_of_a_script(tmp_path: Path, text: str, python: str | None) -> None:
    (tmp_path / "torchrun").write_text(text)
    assert interpreter_of(str(tmp_path / "torchrun")) == python
    assert find_torchrun(str(tmp_path)) is None  # it is not executable
