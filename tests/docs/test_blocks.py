"""The commands in the documentation work: those that one machine can run are run, the others are parsed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.docs.pages import Block, blocks, commands, ferrorun_arguments, name_of, pages

from ferroelastic.run import get_args_parser

if TYPE_CHECKING:
    from pathlib import Path

_TIME_LIMIT_S = 30
_ALL = [block for page in pages() for block in blocks(page)]
_SESSIONS = [block for block in _ALL if block.language == "console"]
_IN_DOCS = [block for block in _SESSIONS if name_of(block.page).startswith("docs/")]
_RUN = [block for block in _IN_DOCS if not block.not_run and name_of(block.page) != "docs/index.md"]
_SHELL = [*_SESSIONS, *(block for block in _ALL if block.language in ("bash", "ini"))]

# Options of other programs that the text names.
_FOREIGN = {
    "--cpu",
    "--cpus-per-task",
    "--enable_elastic_training",
    "--env",
    "--exclude",
    "--gpus",
    "--help",
    "--hostfile",
    "--include",
    "--kill-on-bad-exit",
    "--local_rank",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
    "--master_port",
    "--max_retries",
    "--network",
    "--no-kill",
    "--num_gpus",
    "--num_machines",
    "--num_nodes",
    "--rdzv_port",
    "--requeue",
    "--shm-size",
    "--side",
    "--signal",
    "--stop-timeout",
}


def place(block: Block) -> str:
    return f"{name_of(block.page)}:{block.line}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port


def with_free_ports(text: str) -> str:
    for port in set(re.findall(r"\b29\d{3}\b", text)):
        text = text.replace(port, str(free_port()))
    return text


@pytest.mark.parametrize("block", _RUN, ids=place)
def test_a_session_runs_and_shows_its_output(block: Block, tmp_path: Path) -> None:
    for script in _ALL:
        if script.language == "python" and script.caption:
            (tmp_path / script.caption).write_text(script.text)
    lines, shown = commands(block)
    assert lines, f"{place(block)} has no command"
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", with_free_ports("\n".join(lines))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIME_LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, f"{place(block)}: {ended.stderr[-2000:]}"
    printed = [line.strip() for line in (ended.stdout + ended.stderr).splitlines()]
    missing = [line for line in shown if line.strip() not in printed]
    assert not missing, f"{place(block)} prints {printed}"


def test_pages_for_beginners_have_sessions_that_run() -> None:
    assert {"docs/quickstart.md", "docs/recipes/library.md", "docs/health.md", "docs/output.md"} <= {
        name_of(block.page) for block in _RUN
    }


@pytest.mark.parametrize("block", _SESSIONS, ids=place)
def test_a_session_is_shell(block: Block) -> None:
    lines, _ = commands(block)
    subprocess.run(["bash", "-n", "-c", "\n".join(lines)], check=True)


@pytest.mark.parametrize("block", [block for block in _SHELL if ferrorun_arguments(block.text)], ids=place)
def test_the_options_of_a_call_exist(block: Block) -> None:
    for arguments in ferrorun_arguments(block.text):
        if arguments[0] == "--print-completion":
            with pytest.raises(SystemExit, match=r"^0$"):
                get_args_parser().parse_args(arguments)
        else:
            parsed = get_args_parser().parse_args(arguments)
            assert parsed.training_script.endswith((".py", "script")), arguments


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_the_options_in_the_text_exist(page: Path) -> None:
    known = {name for action in get_args_parser()._actions for name in action.option_strings} | _FOREIGN
    spans = re.findall(
        r"`(--[a-z][a-z_-]*)[^`]*`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    )
    assert set(spans) - known == set()
