"""A rank that hangs is found, shown and started again: the example, run as its text says."""

from __future__ import annotations

import os
import signal

import pytest
from tests.support.harness import ALONE, ROOT, Launcher

from ferroelastic.timer import FileTimerServer

pytest.importorskip("torch")

HANG = str(ROOT / "examples" / "hang.py")
HUNG_LINE = "return messages.get()  # blocks if the queue is empty"
ENABLED = {"TORCHELASTIC_ENABLE_FILE_TIMER": "1"}


def test_the_summary_names_the_timer_and_shows_the_line(launch: Launcher) -> None:
    job = launch(HANG, env=ENABLED)
    assert job.end() == 128 + signal.SIGKILL, job.story
    assert job.output.decode().splitlines() == ["rank 0 has finished attempt 0"]
    _, _, summary = job.errors.partition("examples/hang.py FAILED")
    lines = [line.strip() for line in summary.splitlines()]
    assert any("timer 'exchange of step 1' expired: deadline" in line for line in lines), job.errors
    shown = lines.index(HUNG_LINE)
    assert lines[shown - 1].startswith(f'File "{HANG}", line ')
    assert lines[shown - 1].endswith(" in exchange_gradients")
    assert "rank      : 1 (local_rank: 1)" in lines
    assert "Traceback" not in job.errors
    assert list(launch.folder.glob("watchdog_timer_*")) == []


def test_the_job_comes_back(launch: Launcher) -> None:
    job = launch("--max-restarts=1", HANG, env=ENABLED)
    assert job.end() == 0, job.story
    # Python without buffers writes a line and its end apart, so the ranks' lines may be torn.
    for rank in range(2):
        assert job.output.decode().count(f"rank {rank} has finished attempt 1") == 1, job.output
    assert "rank 1: timer 'exchange of step 1' expired" in job.errors


@pytest.mark.parametrize("log_dir", [False, True])
def test_a_pipe_that_another_agent_serves_is_one_line(launch: Launcher, log_dir: bool) -> None:
    path = str(launch.folder / "pipe")
    other = FileTimerServer(path, "other", reap_server=False)
    try:
        # Neither the port of the rendezvous nor the folder of the logs is to be taken for what is in use.
        flags = ("--rdzv-endpoint=localhost:29400", *((f"--log-dir={launch.folder}",) if log_dir else ()))
        env = {**ENABLED, "TORCHELASTIC_TIMER_FILE": path}
        job = launch(*flags, HANG, launcher=ALONE, env=env)
        assert job.end() == 1, job.story
    finally:
        other.stop()
    # The rest are events.
    (line,) = [line for line in job.errors.splitlines() if not line.startswith("{") and "WARNING" not in line]
    assert line.startswith(f"ferrorun: error: failed to create the watchdog's pipe {path} (another process serves it)")
    assert line.endswith("set TORCHELASTIC_TIMER_FILE to another path, or do not set it")
    assert job.output == b""
    assert not os.path.exists(path)
