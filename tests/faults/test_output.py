"""What workers write is in their log files and reaches the console, whatever becomes of either end."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import FERRORUN, Launcher

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

LINES = 30_000
WIDTH = 99
FLOOD = "".join(f"{line:0{WIDTH}}\n" for line in range(LINES))


def logs(folder: Path, name: str) -> dict[int, str]:
    """Content of the log files of the only attempt, by local rank."""
    return {int(path.parent.name): path.read_text() for path in folder.glob(f"logs/*/attempt_0/*/{name}")}


@pytest.mark.parametrize("code", [0, 3])
def test_a_console_that_nobody_reads_holds_up_neither_the_job_nor_the_logs(launch: Launcher, code: int) -> None:
    job = launch(
        "--tee=1",
        f"--log-dir={launch.folder}/logs",
        *launch.shell(f'"$ZOO" flood {LINES} {WIDTH}; exit {code}'),
    )
    assert job.end(drain=False) == code
    written = logs(launch.folder, "stdout.log")
    if code == 0:
        assert written == dict.fromkeys(range(2), FLOOD)
    else:  # the other one was stopped, perhaps
        assert FLOOD in written.values()


def test_a_standard_error_that_nobody_reads_does_not_hold_up_the_job_either(launch: Launcher) -> None:
    flood = launch.shell(f'"$ZOO" flood {LINES} {WIDTH} >&2')
    command = [*FERRORUN, "--standalone", "--tee=2", f"--log-dir={launch.folder}/logs", *flood]
    job = launch.start("/bin/sh", "-c", 'exec "$@" 2>&1', "sh", *command)
    assert job.end(drain=False, timeout_s=20) == 0
    assert logs(launch.folder, "stderr.log") == {0: FLOOD}


LAST_WORDS = """
import os, signal, sys
for stream in (sys.stdout, sys.stderr):
    print("first line", file=stream)
    print(f"last words of {os.environ['RANK']}", end="", file=stream, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_last_words_of_a_killed_worker_come_out(launch: Launcher) -> None:
    """Though they end without a newline."""
    job = launch("--tee=3", f"--log-dir={launch.folder}/logs", launch.write("train.py", LAST_WORDS), nproc=1)
    assert job.end() == 128 + signal.SIGKILL
    assert job.output.decode().splitlines() == ["[default0]:first line", "[default0]:last words of 0"]
    errors = job.errors.splitlines()
    assert errors.count("[default0]:first line") == errors.count("[default0]:last words of 0") == 1
    assert logs(launch.folder, "stdout.log") == {0: "first line\nlast words of 0"}
    assert logs(launch.folder, "stderr.log") == {0: "first line\nlast words of 0"}


def test_all_lines_come_out_whole_and_in_order(launch: Launcher) -> None:
    job = launch("--tee=1", "--no-python", launch.zoo, "flood", str(LINES), str(WIDTH), nproc=3)
    assert job.end() == 0
    numbers: dict[bytes, list[int]] = {b"[default%d]" % rank: [] for rank in range(3)}
    for line in job.output.splitlines():
        head, _, number = line.partition(b":")
        assert len(number) == WIDTH
        numbers[head].append(int(number))
    assert all(seen == list(range(LINES)) for seen in numbers.values())


def test_output_of_every_attempt_comes_out_though_workers_die_writing(launch: Launcher) -> None:
    script = 'echo "attempt $TORCHELASTIC_RESTART_COUNT of $RANK"; printf "and then"; kill -KILL $$'
    job = launch("--tee=1", "--max-restarts=3", *launch.shell(script), nproc=1)
    assert job.end() == 128 + signal.SIGKILL
    expected = [f"[default0]:{text}" for n in range(4) for text in (f"attempt {n} of 0", "and then")]
    assert job.output.decode().splitlines() == expected
