"""Workers read the deadline of their stop, and save before their children are signalled."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.function_workers import METHODS, started
from tests.support.harness import ALONE
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.harness import Job, Launcher

pytestmark = pytest.mark.engine

# Writes the notice that it reads in its signal handler. Without a stop there is none. Rank 1 of the first attempt fails at the gate.
READER = """
import json, os, signal, sys
import ferroelastic

attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
file = os.path.join(os.environ["DIR"], f"notice.{attempt}.{rank}")

def save(number, frame):
    notice = ferroelastic.stop_deadline()
    with open(file, "w") as out:
        json.dump([notice and (*notice, notice.remaining_s()), number], out)
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
assert ferroelastic.stop_deadline() is None
try:
    os.remove(os.environ["FERROELASTIC_STOP_FILE"])
except OSError:
    pass
os.write(1, f"{attempt} {'light' in sys.modules}\\n".encode())
if (attempt, rank) == ("0", "1"):
    with open(os.environ["DIR"] + "/gate", "rb", buffering=0) as gate:
        gate.read(1)
    sys.exit(3)
while True:
    signal.pause()
"""


def start(launch: Launcher, *options: str, nproc: int = 2) -> Job:
    script = launch.write("reader.py", READER)
    launcher = (*ALONE, "--shutdown-timeout=20")
    return launch(*options, "--no-python", sys.executable, script, nproc=nproc, launcher=launcher)


def notice_of(launch: Launcher, attempt: int, rank: int) -> list[Any]:
    notice: list[Any] = json.loads(launch.read(f"notice.{attempt}.{rank}"))
    return notice


def test_the_deadline_after_a_signal_to_the_agent(launch: Launcher) -> None:
    job = start(launch, nproc=1)
    assert job.lines(1) == ["0 False"]
    job.settle(1)
    told_ns, told_s = time.monotonic_ns(), time.time()
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    (reason, number, deadline_s, deadline_ns, remaining_s), received = notice_of(launch, 0, 0)
    assert (reason, number, received) == ("signal", signal.SIGTERM, signal.SIGTERM)
    assert told_ns + 20e9 <= deadline_ns <= time.monotonic_ns() + 20e9
    assert told_s + 19.9 <= deadline_s <= time.time() + 20.1
    assert 0 < remaining_s <= 20


def test_the_deadline_after_a_failure_is_gone_in_the_next_attempt(launch: Launcher) -> None:
    gate = launch.gate()
    job = start(launch, "--max-restarts=1")
    job.lines(2)
    gate.let_pass()
    job.lines(2)  # none of them has a notice of the former attempt
    (reason, number, _, _, remaining_s), _ = notice_of(launch, 0, 0)
    assert (reason, number) == ("failure", signal.SIGTERM)
    assert 0 < remaining_s <= 20
    job.settle(4)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    assert {notice_of(launch, 1, rank)[0][0] for rank in (0, 1)} == {"signal"}


@pytest.mark.skipif(os.environ.get("FERROELASTIC_PIDFD") == "0", reason="warm workers need pidfds")
def test_warm_workers_read_it_too(launch: Launcher) -> None:
    light = launch.write("light.py", "")
    job = launch(
        "--preload",
        "--warm-imports=light",
        launch.write("reader.py", READER),
        nproc=1,
        launcher=(*ALONE, "--shutdown-timeout=20"),
        env={"PYTHONPATH": f"{launch.folder}:{':'.join(sys.path)}"},
    )
    assert light
    assert job.lines(1) == ["0 True"]
    job.settle(1)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    assert notice_of(launch, 0, 0)[0][0] == "signal"


def wait_for_a_stop(ready: str, file: str) -> None:
    from pathlib import Path

    import ferroelastic

    def save(_number: int, _frame: object) -> None:
        Path(file).write_text(json.dumps(ferroelastic.stop_deadline()))
        sys.exit(0)

    signal.signal(signal.SIGTERM, save)
    Path(ready).touch()
    while True:
        signal.pause()


@pytest.mark.parametrize("method", METHODS)
def test_function_workers_read_it_too(tmp_path: Path, method: str) -> None:
    ready, file = tmp_path / "ready", tmp_path / "notice"
    with started(tmp_path, method, wait_for_a_stop, (str(ready), str(file))) as context:
        assert eventually(ready.exists)
        context.close(timeout=LONG_S)
    reason, number, *_ = json.loads(file.read_text())
    assert (reason, number) == ("shutdown", signal.SIGTERM)


# A trainer with a child, as a data loader has. It cannot save when the child has ended, as a data loader raises then.
TRAINER = """
import os, signal, subprocess, sys, time

loader = subprocess.Popen(["sleep", "1000"])
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
os.write(1, b"%d\\n" % loader.pid)
while not stopping:
    time.sleep(0.001)
for step in range(100):
    if loader.poll() is not None:
        raise RuntimeError(f"the data loader (pid {loader.pid}) was ended by signal {-loader.returncode}")
    time.sleep(0.002)
open(os.path.join(os.environ["DIR"], f"saved.{os.environ['RANK']}"), "w").close()
"""


@pytest.mark.parametrize("target", ["leader", "group"])
def test_a_trainer_saves_if_its_data_loaders_go_on(launch: Launcher, target: str) -> None:
    job = launch(f"--grace-signal-target={target}", *launch.python(TRAINER), launcher=ALONE)
    loaders = [job.watch(int(line)) for line in job.lines(2)]
    job.settle(2)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    saved = sorted(path.name for path in launch.folder.glob("saved.*"))
    assert saved == (["saved.0", "saved.1"] if target == "leader" else [])
    assert all(loader.is_gone() for loader in loaders)


def test_a_trainer_saves_when_a_peer_fails(launch: Launcher) -> None:
    gate = launch.gate()
    failing = """
import os, sys
if os.environ["RANK"] == "1":
    with open(os.environ["DIR"] + "/gate", "rb", buffering=0) as gate:
        gate.read(1)
    sys.exit(3)
"""
    job = launch("--grace-signal-target=leader", *launch.python(failing + TRAINER), launcher=ALONE)
    (loader,) = [job.watch(int(line)) for line in job.lines(1)]
    gate.let_pass()
    assert job.end() == 3
    assert [path.name for path in launch.folder.glob("saved.*")] == ["saved.0"]
    assert loader.is_gone()


def test_the_children_of_a_trainer_that_does_not_end_are_killed_with_it(launch: Launcher) -> None:
    script = TRAINER.replace("while not stopping", "while True")
    job = launch("--grace-signal-target=leader", "--shutdown-timeout=1", *launch.python(script), launcher=ALONE)
    loaders = [job.watch(int(line)) for line in job.lines(2)]
    job.settle(2)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    assert all(loader.is_gone() for loader in loaders)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["leader", "group"])
def test_function_workers_save_too(tmp_path: Path, method: str, target: str) -> None:
    ready, file = tmp_path / "ready", tmp_path / "saved"
    arguments = (str(ready), str(file))
    with started(tmp_path, method, train_with_a_child, arguments, grace_signal_target=target) as context:
        assert eventually(ready.exists)
        context.close(timeout=LONG_S)
    assert file.exists() == (target == "leader")


def train_with_a_child(ready: str, file: str) -> None:
    import subprocess
    from pathlib import Path

    loader = subprocess.Popen(["sleep", "1000"])
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    Path(ready).touch()
    while not stopping:
        time.sleep(0.001)
    for _ in range(100):
        if loader.poll() is not None:
            sys.exit(1)
        time.sleep(0.002)
    Path(file).touch()
