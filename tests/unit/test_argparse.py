"""The command line's options, held against torch's where torch is installed."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.support import torch_versions

import ferroelastic
from ferroelastic import argparse_util
from ferroelastic.run import get_args_parser, parse_args

VARIABLES = {
    "PET_NNODES": "2:4",
    "PET_NPROC_PER_NODE": "auto",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_ENDPOINT": "node0:1234",
    "PET_RDZV_ID": "job",
    "PET_RDZV_CONF": "timeout=5",
    "PET_STANDALONE": "1",
    "PET_MAX_RESTARTS": "7",
    "PET_MONITOR_INTERVAL": "2.5",
    "PET_START_METHOD": "fork",
    "PET_EVENT_LOG_HANDLER": "console",
    "PET_ROLE": "trainer",
    "PET_MODULE": "1",
    "PET_NO_PYTHON": "0",
    "PET_RUN_PATH": "2",
    "PET_LOG_DIR": "/logs",
    "PET_REDIRECTS": "3",
    "PET_TEE": "0:1",
    "PET_LOCAL_RANKS_FILTER": "0,1",
    "PET_LOG_LINE_PREFIX_TEMPLATE": "${rank}",
    "PET_DUPLICATE_STDOUT_FILTERS": "a,,b,c",
    "PET_DUPLICATE_STDERR_FILTERS": "d",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "10.0.0.1",
    "PET_MASTER_PORT": "1234",
    "PET_LOCAL_ADDR": "10.0.0.2",
    "PET_LOGS_SPECS": "ignored",
    "PET_NUMA_BINDING": "ignored",
    "PET_SIGNALS_TO_HANDLE": "SIGTERM",
    "PET_SHUTDOWN_TIMEOUT": "11",
    "PET_VIRTUAL_LOCAL_RANK": "1",
}

COMMAND_LINES = [
    ["train.py"],
    ["--nnodes", "1:3", "--nproc_per_node=4", "train.py", "--lr", "0.1", "--", "-x"],
    ["--nproc-per-node", "gpu", "--standalone", "-m", "pkg.train", "-t3", "-r", "0:1,1:2"],
    ["--rdzv_backend=c10d", "--rdzv-endpoint", "h:1", "--rdzv_id", "7", "--rdzv-conf", "a=b", "--no_python", "./t.sh"],
    [
        "--max_restarts=3",
        "--monitor-interval=1",
        "--start_method",
        "forkserver",
        "--event_log_handler",
        "console",
        "t.py",
    ],
    ["--role", "r", "--run_path", "--log_dir", "/l", "--local_ranks_filter", "0,2", "/abs/t.py"],
    ["--duplicate-stdout-filters", "apple,,pie,plum", "--duplicate_stderr_filters", "", "t.py"],
    ["--node-rank=1", "--master_addr", "[::1]", "--master-port", "29501", "--local_addr", "::1", "t.py"],
    ["--logs_specs", "x", "--numa-binding", "core-complex", "--signals_to_handle", "SIGUSR1", "t.py"],
    ["--shutdown_timeout", "5", "--virtual-local-rank", "--max-rest", "2", "t.py", "--max-restarts", "9"],
]


ADDED: dict[str, Any] = {
    "signals_to_forward": "",
    "interactive_rank": None,
    "summary": "full",
    "warm_workers": "0",
    "warm_imports": ["torch"],
    "preload": False,
    "restart_backoff": 0.25,
    "restart_backoff_max": 5.0,
    "healthy_window": 0.0,
    "restart_rate": "none",
    "fatal_exit_codes": "none",
    "fatal_causes": "stuck",
    "min_uptime": 0.0,
    "restarts_without_progress": None,
    "progress_file": None,
    "on_node_failure": "restart",
    "early_exit_timeout": 0.0,
    "restart_policy": None,
    "ranks_filter": "",
    "log_format": "text",
    "fail_on_log": [],
    "warn_on_log": [],
    "log_max_size": "",
    "log_max_files": 5,
    "exit_barrier_timeout": None,
    "grace_signal_target": "group",
    "keep_detached": False,
    "end_detached": False,
    "no_scheduler": False,
    "exec": False,
}
"""Options that torch has not. Each is off by default, except the back-off."""


@pytest.fixture(autouse=True)
def _no_pet_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PET_"):
            monkeypatch.delenv(name)


@pytest.fixture(params=["bare", "variables"])
def _environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "variables":
        for name, value in VARIABLES.items():
            monkeypatch.setenv(name, value)


def _facts(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    return [
        {
            "options": action.option_strings,
            "dest": action.dest,
            "default": action.default,
            "type": getattr(action.type, "__name__", None),
            "choices": list(action.choices) if action.choices is not None else None,
            "nargs": action.nargs,
            "const": action.const,
            "required": action.required,
            "metavar": action.metavar,
            "action": type(action).__name__,
        }
        for action in parser._actions
        if action.dest != "print_completion"  # an action of each package
    ]


@pytest.mark.usefixtures("_environment")
def test_every_option_is_torchs() -> None:
    torch_run = pytest.importorskip("torch.distributed.run")

    ours, theirs = _facts(get_args_parser()), _facts(torch_run.get_args_parser())
    added = {fact["dest"]: fact["default"] for fact in ours if fact["dest"] in ADDED}
    ours = [fact for fact in ours if fact["dest"] not in ADDED]

    ours = [fact for fact in ours if torch_versions.has_option(fact["dest"])]

    assert [fact["dest"] for fact in ours] == [fact["dest"] for fact in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == its
    assert added == ADDED


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if torch_versions.knows(line)], ids=" ".join)
def test_a_command_line_means_the_same_as_to_torch(line: list[str]) -> None:
    torch_run = pytest.importorskip("torch.distributed.run")

    known = {name: value for name, value in vars(parse_args(line)).items() if torch_versions.has_option(name)}
    assert known == {**vars(torch_run.parse_args(line)), **ADDED}


@pytest.fixture
def shtab(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package shtab with one more shell than usual."""
    module = mock.Mock(SUPPORTED_SHELLS=["bash", "zsh", "tcsh", "fish"])
    module.complete.side_effect = lambda parser, shell: f"completes {parser.prog} in {shell}"
    monkeypatch.setitem(sys.modules, "shtab", module)
    return module


def test_a_completion_script_is_printed(shtab: mock.Mock, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--print-completion", "--print_completion"):
        with pytest.raises(SystemExit) as exit_:
            parse_args([option, "fish"])
        assert exit_.value.code == 0
        assert capsys.readouterr() == ("completes ferrorun in fish\n", "")


@pytest.mark.usefixtures("shtab")
def test_shtab_knows_the_shells(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--print-completion", "cmd"])
    assert exit_.value.code == 2
    assert "'cmd' (choose from " in capsys.readouterr().err


def test_without_shtab_one_line_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--print-completion", "bash"])
    assert exit_.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "--print-completion needs the package shtab, which is not installed: pip install shtab"


def test_a_launch_does_not_import_shtab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "shtab", raising=False)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} is imported"))
    assert parse_args(["train.py"]).print_completion is None


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_the_completion_script_has_the_options(shell: str) -> None:
    pytest.importorskip("shtab")
    done = subprocess.run(
        [sys.executable, "-m", "ferroelastic.run", "--print-completion", shell],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ferrorun" in done.stdout
    assert "warm-workers" in done.stdout
    assert done.stderr == ""


def test_the_numa_choices_are_the_modes() -> None:
    from ferroelastic.numa.binding import AffinityMode

    (action,) = (action for action in get_args_parser()._actions if action.dest == "numa_binding")

    assert action.choices == [mode.value for mode in AffinityMode]


def _env_parser(**kwargs: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("-f", "--foo", action=argparse_util.env, **kwargs)
    return parser


def test_env_takes_line_then_variable_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _env_parser(default="d").parse_args([]).foo == "d"
    monkeypatch.setenv("PET_FOO", "v")
    assert _env_parser(default="d").parse_args([]).foo == "v"
    assert _env_parser(default="d").parse_args(["-f", "l"]).foo == "l"
    assert _env_parser(required=True).parse_args([]).foo == "v"


@pytest.mark.parametrize("value", [None, ""])
def test_env_keeps_required_without_a_value(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("PET_FOO", value)

    with pytest.raises(SystemExit):
        _env_parser(required=True).parse_args([])


@pytest.mark.parametrize(
    ("variable", "default", "line", "expected"),
    [
        (None, False, [], False),
        (None, False, ["--foo"], True),
        (None, True, [], True),
        ("1", False, [], True),
        ("2", False, [], True),
        ("0", True, [], False),
        ("0", False, ["--foo"], True),
    ],
)
def test_check_env(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, default: bool, line: list[str], expected: bool
) -> None:
    if variable is not None:
        monkeypatch.setenv("PET_FOO", variable)
    parser = argparse.ArgumentParser()
    parser.add_argument("--foo", action=argparse_util.check_env, default=default)

    assert parser.parse_args(line).foo is expected


def test_check_env_names_a_bad_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_STANDALONE", "yes")

    with pytest.raises(ValueError, match="PET_STANDALONE='yes' is not an integer; set it to 1 or 0"):
        get_args_parser()


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("PET_MAX_RESTARTS", "x", "ferrorun: error: PET_MAX_RESTARTS: invalid int value: 'x'"),
        ("PET_MASTER_PORT", "", "ferrorun: error: PET_MASTER_PORT: invalid int value: ''"),
        ("PET_START_METHOD", "thread", "PET_START_METHOD='thread' is not one of spawn, fork, forkserver"),
    ],
)
def test_a_bad_variable_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str, text: str
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(SystemExit) as exit_:
        parse_args(["train.py"])

    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


def test_the_command_line_wins_over_a_bad_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_MAX_RESTARTS", "x")

    assert parse_args(["--max-restarts=2", "train.py"]).max_restarts == 2


@pytest.mark.parametrize("line", [[], ["--bogus", "train.py"], ["--start-method=x", "train.py"], ["--max-restarts"]])
def test_a_parse_error_is_one_line(capsys: pytest.CaptureFixture[str], line: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_args(line)

    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from ferroelastic import run\n"
        "try:\n    run.cli(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'psutil', 'asyncio', 'multiprocessing', 'dataclasses', 'logging', 'importlib.metadata', 'numpy'}\n"
        "if sys.version_info >= (3, 14):\n    heavy.remove('dataclasses')  # argparse imports it\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    # -S: a site folder may hold .pth files that load what they like.
    folder = str(Path(ferroelastic.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={"PYTHONPATH": folder},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "--nproc-per-node" in done.stdout
    assert done.stderr.strip() == "[]"
