"""Scripts that fail in twenty ways: the JSON and the box on the console name the true cause."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.failing import CASES, UnavailableError, run
from tests.support.harness import Launcher
from tests.support.judge import judge, mismatches, reports_of

import ferroelastic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.failing import Ending

_PACKAGE = Path(ferroelastic.__file__).parent
_LIGHT = [name for name, case in CASES.items() if not case.uses_torch]


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Launcher]:
    """Starts jobs without the program of misbehaving workers."""
    launcher = Launcher(tmp_path, zoo="")
    yield launcher
    launcher.clean_up()


def end(name: str, launcher: Launcher, *options: str) -> Ending:
    if CASES[name].uses_torch:
        pytest.importorskip("torch")
    try:
        ending = run(CASES[name], launcher, "ferrorun", *options)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    assert ending.codes[0] == CASES[name].code, launcher.jobs[0].story
    return ending


@pytest.mark.parametrize("name", CASES)
def test_the_box_and_the_file_name_the_cause(name: str, scripts: Launcher) -> None:
    cause = CASES[name].cause
    logs = scripts.folder / "logs"
    ending = end(name, scripts, f"--log-dir={logs}")
    for console, code in zip(ending.consoles, ending.codes, strict=True):
        if code is None:  # the test has killed this agent
            continue
        assert len(reports_of(console)) == 1, console
        assert judge(cause, console, console) == (True, True, True), console
        assert f'File "{_PACKAGE}' not in console, "a traceback of the launcher"
    failures = [json.loads(path.read_text()) for path in logs.glob("**/failure.json")]
    assert len(failures) == len([code for code in ending.codes if code is not None])
    for failure in failures:
        assert mismatches(failure, cause) == [], failure


@pytest.mark.parametrize("name", _LIGHT)
def test_the_last_line_is_the_cause_as_json(name: str, scripts: Launcher) -> None:
    console = end(name, scripts, "--summary=json").consoles[0]
    assert mismatches(json.loads(console.splitlines()[-1]), CASES[name].cause) == [], console
    assert reports_of(console) == []


def test_the_core_is_found(scripts: Launcher) -> None:
    if Path("/proc/sys/kernel/core_pattern").read_text().startswith(("|", "@", "/")):
        pytest.skip("the kernel does not write cores into the working directory")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("the limit of cores is 0")
    console = end("core-dumped", scripts, "--summary=json").consoles[0]
    core = Path(json.loads(console.splitlines()[-1])["first"]["core"])
    assert core.parent == scripts.folder
    assert core.stat().st_size > 0
