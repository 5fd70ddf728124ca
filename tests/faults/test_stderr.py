"""Standard error that is not redirected: the bytes of workers reach the console unchanged, whatever becomes of either end."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from tests.support.harness import FERRORUN, Launcher
from tests.support.waiting import LONG_S, eventually, is_alive

pytestmark = pytest.mark.engine

FLOOD = 'echo $$ > "$DIR/worker.$RANK"; exec "$ZOO" flood 1000000 99 >&2'


def blocked_job(launch: Launcher) -> tuple[int, list[int]]:
    """Start a job whose workers are blocked by a console that no process reads. Return the pids of its agent and its workers."""
    job = launch.start(
        "/bin/sh", "-c", 'exec "$@" 2>&1', "sh", *FERRORUN, "--standalone", "--nproc-per-node=2", *launch.shell(FLOOD)
    )
    assert eventually(lambda: len(launch.pids("worker.*")) == 2)

    def is_blocked(pid: int) -> bool:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "S"

    workers = launch.pids("worker.*")
    assert eventually(lambda: all(map(is_blocked, workers)))
    return job.process.pid, workers


def test_workers_that_a_console_blocks_end_at_a_signal(launch: Launcher) -> None:
    pid, workers = blocked_job(launch)
    os.kill(pid, signal.SIGTERM)
    assert launch.jobs[-1].end(drain=False, timeout_s=20) == 128 + signal.SIGTERM
    assert not any(map(is_alive, workers))


def test_workers_that_a_console_blocks_end_with_a_killed_agent(launch: Launcher) -> None:
    pid, workers = blocked_job(launch)
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not any(map(is_alive, workers)))


def test_the_traceback_precedes_the_report_of_the_agent(launch: Launcher) -> None:
    for _ in range(5):
        job = launch(*launch.python("raise ValueError('the cause')"))
        assert job.end() == 1
        errors = job.errors
        assert errors.index("ValueError: the cause") < errors.index("failed (exitcode: 1)")


def test_a_helper_with_the_descriptor_does_not_delay_the_end(launch: Launcher) -> None:
    job = launch(
        *launch.shell('setsid sh -c "echo \\$\\$ > $DIR/helper.$RANK; exec sleep 600" & echo worker $RANK >&2')
    )
    assert job.end(timeout_s=20) == 0
    assert {"worker 0", "worker 1"} <= set(job.errors.splitlines())
    for helper in launch.pids("helper.*"):
        os.kill(helper, signal.SIGKILL)


def test_a_helper_that_outlives_the_agent_keeps_its_console(launch: Launcher) -> None:
    gate = launch.folder / "gate"
    script = f'setsid sh -c "until [ -e {gate} ]; do sleep 0.02; done; echo late >&2; echo still >&2; touch {gate}.done" & echo early >&2'
    console = launch.folder / "console"
    job = launch.start(
        "/bin/sh", "-c", f'exec "$@" 2>{console}', "sh", *FERRORUN, "--standalone", *launch.shell(script)
    )
    assert job.end(timeout_s=20) == 0
    assert "early" in console.read_text()
    assert "late" not in console.read_text()
    gate.touch()
    assert eventually(Path(f"{gate}.done").exists)
    assert eventually(lambda: console.read_text().endswith("late\nstill\n"))


BOTH = """
import os
for number in range(300):
    os.write(2, b"error %d\\n" % number)
    os.write(1, b"output %d\\n" % number)
os.write(2, b"terminals %d %d, session %s\\n" % (os.isatty(1), os.isatty(2), open("/proc/self/stat").read().split()[6].encode()))
"""


def run_on_terminal(launch: Launcher, *arguments: str) -> str:
    """Run a job with both streams on a terminal, and return its output."""
    ours, of_job = pty.openpty()
    found = []

    def read() -> None:
        try:
            while True:
                found.append(os.read(ours, 65536))
        except OSError:  # the job has ended
            pass

    command = [*FERRORUN, "--standalone", *arguments]
    job = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=of_job, stderr=of_job, start_new_session=True)
    os.close(of_job)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert job.wait(LONG_S) == 0
    finally:
        job.kill()
        reader.join(LONG_S)
        os.close(ours)
    return b"".join(found).decode()


def test_on_a_terminal_both_streams_keep_their_order(launch: Launcher) -> None:
    output = run_on_terminal(launch, *launch.python(BOTH))
    lines = re.findall(r"(?:error|output) \d+", output)
    assert lines == [f"{stream} {number}" for number in range(300) for stream in ("error", "output")]
    assert "terminals 1 1, session 0\r\n" in output


def test_on_a_terminal_a_redirected_stream_is_no_terminal(launch: Launcher) -> None:
    folder: Path = launch.folder / "logs"
    output = run_on_terminal(launch, "--redirects=1", f"--log-dir={folder}", *launch.python(BOTH))
    assert re.findall(r"(?:error|output) \d+", output) == [f"error {number}" for number in range(300)]
    assert "terminals 0 1, session 0\r\n" in output
