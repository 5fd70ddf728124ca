"""Lines of workers on the console and in the search for patterns, from the launcher to the worker and back."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.support.health_probes import ask
from tests.support.rendezvous_handlers import AloneRendezvous

import ferroelastic
from ferroelastic._engine import get_engine
from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std, start_processes
from ferroelastic.multiprocessing._log_options import LogOptions

pytestmark = pytest.mark.engine

FOLDER = str(Path(ferroelastic.__file__).parents[1])
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

# Each line is one write: writes of several workers mix.
WORKER = """
import os, sys, threading
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
os.write(1, f"rank {rank} says \\"hello\\"\\n".encode() + b"bytes \\xff\\xfe\\n")
os.write(2, b"half a line")
command = sys.argv[1:]
if command and rank == "1" and attempt == "0":
    os.write(2 if "stderr" in command else 1, b"\\nloss=nan\\n" if "newline" in command else b"\\nloss=nan")
    if "exit" in command:
        os._exit(0)
if command and attempt == "0":
    threading.Event().wait(100)
"""


class Ended:
    """A job that has ended."""

    def __init__(self, folder: Path, *line: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}
        (folder / "train.py").write_text(WORKER)
        done = subprocess.run(
            [sys.executable, "-m", "ferroelastic.run", "--standalone", "--nproc-per-node=2", "--log-dir=logs", *line],
            cwd=folder,
            env={**clean, "PYTHONPATH": FOLDER, "LOGLEVEL": "WARNING"},
            capture_output=True,
            check=False,
            timeout=120,
        )
        self.code, self.output, self.errors = done.returncode, done.stdout, done.stderr.decode(errors="replace")

    def objects(self) -> list[dict[str, Any]]:
        """All lines of both streams, each of which is one JSON object."""
        return [json.loads(line) for line in [*self.output.decode().splitlines(), *self.errors.splitlines()]]


def test_the_console_has_json_lines_only(tmp_path: Path) -> None:
    job = Ended(tmp_path, "--log-format=json", "train.py")
    assert job.code == 0
    objects = job.objects()
    assert all(re.fullmatch(TIME, line["time"]) for line in objects)
    workers = [line for line in objects if line["stream"] != "ferrorun"]
    assert sorted((line["stream"], line["rank"], line["local_rank"], line["round"], line["message"]) for line in workers) == [
        ("stderr", 0, 0, 0, "half a line"),
        ("stderr", 1, 1, 0, "half a line"),
        ("stdout", 0, 0, 0, "bytes \ufffd\ufffd"),
        ("stdout", 0, 0, 0, 'rank 0 says "hello"'),
        ("stdout", 1, 1, 0, "bytes \ufffd\ufffd"),
        ("stdout", 1, 1, 0, 'rank 1 says "hello"'),
    ]  # fmt: skip
    assert {line["host"] for line in objects} == {socket.gethostname()}
    assert {line["level"] for line in objects if line["stream"] == "ferrorun"} == {"WARNING"}
    (log,) = tmp_path.glob("logs/latest/attempt_0/0/stdout.log")
    assert log.read_bytes() == b'rank 0 says "hello"\nbytes \xff\xfe\n'


def test_a_prefix_has_time_host_pid_and_round(tmp_path: Path) -> None:
    template = "${time}|$hostname|${pid}|${round}|${rank}:"
    job = Ended(tmp_path, "--tee=1", "--ranks-filter=1-9", f"--log-line-prefix-template={template}", "train.py")
    assert job.code == 0
    lines = job.output.decode(errors="replace").splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(rf"{TIME}\|{socket.gethostname()}\|[1-9]\d*\|0\|1:.*", line), line
    assert job.errors.count("half a line") == 1, "standard error of rank 0 is hidden, too"


@pytest.mark.parametrize("stream", ["--redirects=3", "--tee=3", ""])
def test_a_pattern_fails_the_worker_that_hangs_after_the_line(tmp_path: Path, stream: str) -> None:
    rule = "--fail-on-log=^loss=nan$=loss is NaN"
    job = Ended(tmp_path, *filter(None, [stream]), rule, "--max-restarts=0", "train.py", "newline", "stderr")
    assert job.code == 128 + 9
    assert "rank 1 has failed because of a log line: loss is NaN (stderr of rank 1: 'loss=nan')" in job.errors
    assert "loss is NaN" in job.errors.partition("Root Cause")[2]
    assert (b"says" in job.output) == (stream != "--redirects=3")


def test_a_worker_that_ends_with_success_after_the_line_has_failed(tmp_path: Path) -> None:
    job = Ended(tmp_path, "--redirects=3", "--fail-on-log=nan=loss is NaN", "train.py", "newline", "exit")
    assert job.code == 1
    assert job.errors.count("rank 1 has failed because of a log line") == 1


def test_each_restart_searches_the_new_logs(tmp_path: Path) -> None:
    job = Ended(tmp_path, "--fail-on-log=nan=loss is NaN", "--max-restarts=1", "train.py", "newline")
    assert job.code == 0
    assert job.errors.count("rank 1 has failed because of a log line") == 1
    assert len(list(tmp_path.glob("logs/latest/attempt_1/*/stdout.log"))) == 2


def test_a_pattern_that_warns_is_logged_once(tmp_path: Path) -> None:
    job = Ended(tmp_path, "--redirects=1", "--warn-on-log=says=a rank speaks", "train.py")
    assert job.code == 0
    assert (
        len(re.findall(r"WARNING: a rank speaks: \"rank . says \\\"hello\\\"\" in stdout of rank .", job.errors)) == 1
    )


def speak_and_return(text: str) -> str:
    sys.stdout.write(text)
    sys.stdout.flush()
    return "fine"


def speak_and_wait(text: str) -> None:
    speak_and_return(text)
    time.sleep(100)


OPTIONS = LogOptions(fail_on=[("loss=nan", "loss is NaN")])


@pytest.mark.parametrize("function", [speak_and_return, speak_and_wait])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pattern_fails_a_function_worker(tmp_path: Path, function: Any, method: str) -> None:
    text = "loss=nan" if function is speak_and_return else "loss=nan\n"
    context = start_processes(
        "worker",
        function,
        args={rank: (text if rank == 1 else "fine\n",) for rank in range(2)},
        envs={rank: {"RANK": str(rank + 6)} for rank in range(2)},
        logs_specs=DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT),
        start_method=method,
        shutdown_timeout=5,
        log_options=OPTIONS,
    )
    result = context.wait(60)
    assert result is not None
    assert list(result.failures) == [1]
    assert result.failures[1].exitcode == (1 if function is speak_and_return else -9)
    assert result.failures[1].message == "loss is NaN (stdout of rank 7: 'loss=nan')"
    assert context.log_failures == {1: "loss is NaN (stdout of rank 7: 'loss=nan')"}


def test_matches_are_counted_in_the_metrics(tmp_path: Path) -> None:
    port = get_engine().health_server("127.0.0.1", 0, 60)
    try:
        spec = WorkerSpec(
            role="counted",
            local_world_size=1,
            rdzv_handler=AloneRendezvous(),
            entrypoint=speak_and_return,
            args=("step 1\nstep 2\n",),
            max_restarts=0,
        )
        options = LogOptions(warn_on=[("^step", 'a "step"')])
        specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT)
        result = LocalElasticAgent(spec, specs, log_options=options).run()
        assert result.return_values == {0: "fine"}
        _, text = ask(port.port, "/metrics")
    finally:
        port.close()
    assert 'ferroelastic_log_matches_total{effect="warn",reason="a \\"step\\""} 2' in text.splitlines()


def test_without_log_files_a_pattern_is_reported_as_useless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = start_processes(
        "worker", "/bin/true", {0: ()}, {0: {}}, DefaultLogsSpecs(str(tmp_path)), log_options=OPTIONS
    )
    assert context.wait(60) is not None
    assert "no output of the workers is written to files, so no log pattern can match" in caplog.text


def speak_and_fail(text: str) -> None:
    if os.environ["RANK"] == "6":
        time.sleep(100)
    speak_and_return(text)
    os._exit(3)


def test_a_line_explains_the_exit_that_follows_at_once(tmp_path: Path) -> None:
    context = start_processes(
        "worker",
        speak_and_fail,
        args=dict.fromkeys(range(2), ("loss=nan",)),
        envs={rank: {"RANK": str(rank + 6)} for rank in range(2)},
        logs_specs=DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT),
        start_method="fork",
        shutdown_timeout=5,
        log_options=OPTIONS,
    )
    result = context.wait(60)
    assert result is not None
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {1: 3}
    assert context.log_failures == {1: "loss is NaN (stdout of rank 7: 'loss=nan')"}


BAR = """
import os, time
for percent in range(0, 101, 20):
    os.write(1, b"\\r%d%%" % percent)
    time.sleep(0.15)
os.write(1, b"\\nend\\n")
"""


def bar_on(folder: Path, console_fd: int) -> subprocess.Popen[bytes]:
    (folder / "bar.py").write_text(BAR)
    return subprocess.Popen(
        [sys.executable, "-m", "ferroelastic.run", "--standalone", "--tee=1", "--log-dir=logs", "bar.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": FOLDER},
        stdout=console_fd,
        stderr=subprocess.DEVNULL,
    )


def test_a_progress_bar_is_redrawn_in_its_row_of_a_terminal(tmp_path: Path) -> None:
    terminal_fd, console_fd = os.openpty()
    job = bar_on(tmp_path, console_fd)
    os.close(console_fd)
    output = b""
    with suppress(OSError):  # the end of a terminal is an error
        while chunk := os.read(terminal_fd, 1 << 16):
            output += chunk
    os.close(terminal_fd)
    assert job.wait(60) == 0
    bar, end, rest = output.replace(b"\x1b[?7l", b"").replace(b"\x1b[?7h", b"").split(b"\r\n")
    states = bar.split(b"\r\x1b[K")
    assert (states[-1], end, rest) == (b"[default0]:100%", b"[default0]:end", b"")
    assert len(states) > 2
    assert all(re.fullmatch(rb"\[default0\]:\d+%", state) for state in states if state), states
    (log,) = tmp_path.glob("logs/latest/attempt_0/0/stdout.log")
    assert log.read_bytes() == b"\r0%\r20%\r40%\r60%\r80%\r100%\nend\n"


def test_each_state_of_a_progress_bar_is_a_line_in_a_pipe(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    job = bar_on(tmp_path, write_fd)
    os.close(write_fd)
    with open(read_fd, "rb") as console:
        lines = console.read().splitlines()
    assert job.wait(60) == 0
    assert [line for line in lines if line != b"[default0]:"] == [
        b"[default0]:" + text for text in (b"0%", b"20%", b"40%", b"60%", b"80%", b"100%", b"end")
    ]
