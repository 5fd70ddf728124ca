from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ferroelastic.multiprocessing.redirects import redirect, redirect_stderr, redirect_stdout

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("name", "redirecting"), [("stdout", redirect_stdout), ("stderr", redirect_stderr)])
def test_output_of_python_c_and_children_goes_to_the_file(
    name: str, redirecting: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    libc = ctypes.CDLL(None)
    stream = ctypes.c_void_p.in_dll(libc, name)

    def write(what: str) -> None:
        print(f"{what} python", file=getattr(sys, name))
        libc.fprintf(stream, f"{what} c\n".encode())
        subprocess.run(["sh", "-c", f"echo {what} child >&{1 if name == 'stdout' else 2}"], check=True)

    write("before")
    with redirecting(str(log)):  # type: ignore[operator]
        write("within")
    write("after")
    libc.fflush(None)
    shown = capfd.readouterr()
    console = shown.out if name == "stdout" else shown.err
    assert set(log.read_text().splitlines()) == {"within python", "within c", "within child"}
    assert set(console.splitlines()) == {
        f"{when} {who}" for when in ("before", "after") for who in ("python", "c", "child")
    }


def test_large_output_is_complete(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    with redirect("stdout", str(log)):
        for number in range(50_000):
            print(number)
    assert list(map(int, log.read_text().split())) == list(range(50_000))
    assert capfd.readouterr().out == ""


def test_an_exception_restores_the_stream(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="reason"), redirect("stdout", str(tmp_path / "log")):
        raise ValueError("reason")
    os.write(1, b"console")
    assert capfd.readouterr().out == "console"


def test_an_unknown_stream_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown standard stream <stdfoo>"), redirect("stdfoo", str(tmp_path / "log")):
        pass


def test_a_file_that_cannot_be_opened_changes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError), redirect("stdout", str(tmp_path / "nowhere" / "log")):
        pass
    os.write(1, b"console")
    assert capfd.readouterr().out == "console"


def test_a_stream_without_descriptor_does_not_stand_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in a notebook, sys.stdout is here an object in memory.
    log = tmp_path / "log"
    with redirect("stdout", str(log)):
        subprocess.run(["echo", "child"], check=True)
    assert log.read_text() == "child\n"
    assert capsys.readouterr().out == ""
