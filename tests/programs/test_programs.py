"""Programs that use torch's launcher do the same under torch's agent and under the agent of this package."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from tests.programs.programs import BIN, ENVIRONMENT, NOT_STARTING, PROGRAMS, SIDES, WORKERS, Program, Side
from tests.programs.table import NOT_APPLICABLE, Table
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.harness import Job, Launcher

_LIMIT_S = 150.0  # on a loaded machine the imports of two ranks take most of it

_RANKS = ("0", "1")

both = pytest.mark.parametrize("side", SIDES)
each = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name.replace(" ", "-"))


def _start(programs: Launcher, program: Program, side: Side, task: str, restarts: int = 0) -> Job:
    return programs.start(*program.command(side, restarts), env=_environment(programs, side, task, restarts))


def _environment(programs: Launcher, side: Side, task: str, restarts: int = 0) -> dict[str, str]:
    assert (BIN / "python").exists(), "the environment is missing: run 'just test-programs'"
    return {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "TORCHRUNX_LOG_DIR": "",  # no files in the working directory
        "PYTHONPATH": str(WORKERS),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
        "PROGRAMS_TASK": task,
        "PROGRAMS_FOLDER": str(programs.folder),
        "PROGRAMS_AGENT": side,
        "PROGRAMS_RESTARTS": str(restarts),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(ENVIRONMENT.parent / "extensions"),
        "HF_HUB_OFFLINE": "1",
    }


def _reports(programs: Launcher, pattern: str) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted(programs.folder.glob(pattern))}


def _check_ranks(programs: Launcher, table: Table, program: Program, side: Side) -> None:
    """Check that both ranks have met, and that the agent of this side has started them."""
    with table.cell(program, "one node", side) as cell:
        for rank in _RANKS:
            assert _reports(programs, f"sum.{rank}.0")[f"sum.{rank}.0"]["total"] == len(_RANKS)
        assert {report["agent"] for report in _reports(programs, "start.*").values()} == {side}
        cell.result = "yes"


@both
@each
def test_one_node(programs: Launcher, table: Table, program: Program, side: Side) -> None:
    job = _start(programs, program, side, "sum")
    assert job.end(timeout_s=_LIMIT_S) == 0, job.story
    _check_ranks(programs, table, program, side)
    assert set(_reports(programs, "done.*")) == {f"done.{rank}.0" for rank in _RANKS}


@both
@each
def test_a_killed_rank_comes_back(
    request: pytest.FixtureRequest, programs: Launcher, table: Table, program: Program, side: Side
) -> None:
    if side == "torch":
        reason = "workers read the addresses of the former attempt, and some restarts fail or hang"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    with table.cell(program, "killed rank comes back", side) as cell:
        if side not in program.restarts:
            cell.result = NOT_APPLICABLE
            pytest.skip("the program does not start workers again")
        job = _start(programs, program, side, "killed", restarts=3)
        assert job.end(timeout_s=_LIMIT_S) == 0, job.story
        _check_ranks(programs, table, program, side)
        assert "done.1.1" in _reports(programs, "done.1.*")
        cell.result = "yes"


@both
@each
def test_the_exit_code_of_a_failed_worker(programs: Launcher, table: Table, program: Program, side: Side) -> None:
    with table.cell(program, "exit code", side) as cell:
        job = _start(programs, program, side, "exit3")
        code = job.end(timeout_s=_LIMIT_S)
        cell.result = str(code)
        assert code == program.exit_codes[side], job.story


@both
@each
def test_sigterm_lets_workers_save_and_leaves_no_process(
    programs: Launcher, table: Table, program: Program, side: Side
) -> None:
    with table.cell(program, "clean end", side) as cell:
        job = _start(programs, program, side, "held")

        def all_report(prefix: str) -> Callable[[], bool]:
            return lambda: len(_reports(programs, f"{prefix}.*")) == len(_RANKS)

        assert eventually(lambda: all_report("held")() or job.agent.is_gone(), _LIMIT_S), job.story
        assert not job.agent.is_gone(), job.story
        _check_ranks(programs, table, program, side)
        job.send(signal.SIGTERM)
        job.end(timeout_s=_LIMIT_S)
        saved = eventually(all_report("saved"))  # a program may end before its workers
        left = len(job.clean_up())
        cell.result = "yes" if saved and not left else f"{'saved' if saved else 'not saved'}, {left} processes left"
        assert cell.result in program.clean_ends[side], job.story


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["hyperpodrun", "train.py"], "conflicting option string: --shutdown-timeout"),
        (["dlrover-run", "--standalone", "train.py"], "missing 1 required positional argument: 'numa_options'"),
    ],
    ids=NOT_STARTING,
)
def test_a_version_that_does_not_start_with_torchs_agent(programs: Launcher, command: list[str], reason: str) -> None:
    job = programs.start(str(BIN / command[0]), *command[1:], env=_environment(programs, "torch", "sum"))
    assert job.end(timeout_s=_LIMIT_S) == 1
    assert reason in job.errors


def test_torchx_writes_torchrun_into_jobs_of_slurm(programs: Launcher) -> None:
    options = ["--dryrun", "-s", "slurm", "dist.ddp", "-j", "2x2", "--script", "train.py"]
    job = programs.start(str(BIN / "torchx"), "run", *options, env=_environment(programs, "torch", "sum"))
    assert job.end(timeout_s=_LIMIT_S) == 0, job.story
    assert b"torchrun --rdzv_backend c10d" in job.output
