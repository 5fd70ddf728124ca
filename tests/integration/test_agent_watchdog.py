"""An agent whose workers set themselves deadlines."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.rendezvous_handlers import AloneRendezvous

pytest.importorskip("ferroelastic._rust")

from ferroelastic import timer
from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec, WorkerState
from ferroelastic.multiprocessing import DefaultLogsSpecs, SignalException
from ferroelastic.timer import FileTimerServer

pytestmark = pytest.mark.engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMER_FILE = "TORCHELASTIC_TIMER_FILE"


def is_first_attempt() -> bool:
    return os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


def configure(number: int = signal.SIGKILL) -> None:
    timer.configure(timer.FileTimerClient(os.environ[TIMER_FILE], number))


def hang_at_first(folder: str) -> str:
    """Rank 1 hangs in the first attempt, when rank 0 is there; all leave the path that they were told."""
    configure()
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    path = os.environ[TIMER_FILE]
    Path(folder, f"{attempt}.{rank}").write_text(path)
    assert os.path.exists(path)
    while not Path(folder, f"{attempt}.0").exists():
        time.sleep(0.01)
    if not is_first_attempt():
        return "came back"
    with timer.expires(after=0.3 if rank == "1" else 1000, scope=f"exchange of rank {rank}"):
        wait_for_a_message()
    return ""


def wait_for_a_message() -> None:
    time.sleep(1000)  # the line that hangs


def ignore_the_signal_and_fail() -> None:
    """A deadline that ends in an exception of the worker's own."""

    def fail(*_: object) -> None:
        raise TimeoutError("what the worker said")

    signal.signal(signal.SIGUSR1, fail)
    configure(signal.SIGUSR1)
    with timer.expires(after=0.1, scope="the step"):
        wait_for_a_message()


def have_a_child_that_hangs() -> None:
    """The child has the timer; the worker is signalled as well."""
    code = (
        "import os, time; from ferroelastic import timer\n"
        f"timer.configure(timer.FileTimerClient(os.environ['{TIMER_FILE}']))\n"
        "with timer.expires(after=0.1, scope='loading'): time.sleep(1000)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    wait_for_a_message()


def stop_beating() -> None:
    with timer.heartbeat("steps", 0.2) as heart:
        heart.beat()
        wait_for_a_message()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalElasticAgent]]:
    monkeypatch.setenv("TORCHELASTIC_ENABLE_FILE_TIMER", "1")
    monkeypatch.setenv(TIMER_FILE, str(tmp_path / "pipe"))
    monkeypatch.setenv("FERROELASTIC_EVIDENCE_S", "30")  # on a busy machine
    agents: list[LocalElasticAgent] = []

    def build(entrypoint: Any, *args: Any, nproc: int = 1, log_dir: str = "", **spec: Any) -> LocalElasticAgent:
        worker_spec = WorkerSpec(
            role="trainer",
            local_world_size=nproc,
            rdzv_handler=AloneRendezvous(),
            entrypoint=entrypoint,
            args=args,
            **{"max_restarts": 0, "monitor_interval": 600, **spec},
        )
        logs = DefaultLogsSpecs(log_dir or str(tmp_path / "logs"))
        agents.append(LocalElasticAgent(worker_spec, logs, start_method="fork"))
        return agents[-1]

    yield build
    while agents:
        agent = agents.pop()
        agent._shutdown(signal.SIGKILL, 0)
        agent._pcontext = None


# ---- expiry


def test_a_worker_that_hangs_is_restarted(
    make: Callable[..., LocalElasticAgent], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = make(hang_at_first, str(tmp_path), nproc=2, max_restarts=1).run()
    assert result.return_values == {0: "came back", 1: "came back"}
    told = {name: (tmp_path / name).read_text() for name in ("0.0", "0.1", "1.0", "1.1")}
    assert set(told.values()) == {str(tmp_path / "pipe")}
    assert "rank 1: timer 'exchange of rank 1' expired: deadline " in caplog.text
    assert not os.path.lexists(tmp_path / "pipe")
    assert not os.path.lexists(tmp_path / "pipe.beats")


def test_the_report_shows_where_the_worker_was(make: Callable[..., LocalElasticAgent], tmp_path: Path) -> None:
    result = make(hang_at_first, str(tmp_path), nproc=2).run()
    assert result.state == WorkerState.FAILED
    ((rank, failure),) = result.failures.items()
    assert (rank, failure.exitcode) == (1, -signal.SIGKILL)
    cause, ended, stack, *frames, evidence = str(failure.message).splitlines()
    assert cause.startswith("timer 'exchange of rank 1' expired: deadline ")
    assert cause.endswith(" ms late, sent SIGKILL")
    assert ended == f"Signal 9 (SIGKILL) received by PID {failure.pid}"
    assert stack == "stack (most recent call first):"
    assert frames[0].startswith(f'  File "{__file__}", line ')
    assert frames[0].endswith(" in wait_for_a_message")
    assert frames[1] == "    time.sleep(1000)  # the line that hangs"
    assert failure.error_file_data["message"] == failure.message
    # Of all ranks.
    files = {path.name: path for path in tmp_path.glob("logs/*/attempt_0/*/*")}
    assert f"{files['evidence.txt'].parent.parent}/1 (evidence.txt, stacks.{failure.pid}.txt)" in evidence
    assert sorted(path.parent.name for path in tmp_path.glob("logs/*/attempt_0/*/evidence.txt")) == ["0", "1"]
    dumps = list(tmp_path.glob("logs/*/attempt_0/*/stacks.*.txt"))
    assert len(dumps) == 2
    assert all("in hang_at_first" in dump.read_text() for dump in dumps)


def test_no_evidence_if_there_is_no_time_for_it(
    make: Callable[..., LocalElasticAgent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FERROELASTIC_EVIDENCE_S", "0")
    result = make(hang_at_first, str(tmp_path), nproc=2).run()
    cause, ended = str(result.failures[1].message).splitlines()
    assert cause.startswith("timer 'exchange of rank 1' expired")
    assert ended.startswith("Signal 9")
    assert list(tmp_path.glob("logs/*/attempt_0/*/evidence.txt")) == []


def test_logs_that_are_not_wanted_get_no_evidence(make: Callable[..., LocalElasticAgent], tmp_path: Path) -> None:
    result = make(hang_at_first, str(tmp_path), nproc=2, log_dir=os.devnull).run()
    assert len(str(result.failures[1].message).splitlines()) == 2
    assert not os.path.exists("/dev/evidence.txt")


def test_the_message_of_the_worker_stays_in_the_report(make: Callable[..., LocalElasticAgent]) -> None:
    result = make(ignore_the_signal_and_fail).run()
    failure = result.failures[0]
    assert failure.exitcode == 1
    assert isinstance(failure.message, dict)
    assert "TimeoutError: what the worker said" in failure.message["message"]
    text = failure.message["extraInfo"]["py_callstack"]
    assert text.startswith("timer 'the step' expired: deadline ")
    assert "in wait_for_a_message" in text
    assert text.rstrip().endswith("TimeoutError: what the worker said")
    assert "timer" not in json.dumps(failure.error_file_data)  # as the worker wrote it


def test_the_timer_of_a_workers_child_is_the_workers(make: Callable[..., LocalElasticAgent]) -> None:
    result = make(have_a_child_that_hangs).run()
    failure = result.failures[0]
    assert failure.exitcode == -signal.SIGKILL
    assert isinstance(failure.message, str)
    assert failure.message.startswith("timer 'loading' of its child process ")


def test_a_worker_that_does_not_beat(make: Callable[..., LocalElasticAgent]) -> None:
    result = make(stop_beating).run()
    assert result.failures[0].exitcode == -signal.SIGKILL
    assert str(result.failures[0].message).startswith("timer 'steps' expired: ")


def test_a_failure_without_a_timer_is_reported_unchanged(make: Callable[..., LocalElasticAgent]) -> None:
    result = make(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)").run()
    failure = result.failures[0]
    assert failure.message == f"Signal 9 (SIGKILL) received by PID {failure.pid}"


# ---- the server


def test_one_server_serves_all_attempts(
    make: Callable[..., LocalElasticAgent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    class Counted(FileTimerServer):
        def __init__(self, file_path: str, *arguments: Any, **options: Any) -> None:
            made.append(file_path)
            super().__init__(file_path, *arguments, **options)

    monkeypatch.setattr(timer, "FileTimerServer", Counted)
    monkeypatch.delenv(TIMER_FILE)
    agent = make("/bin/sh", "-c", f'stat -c %i "${TIMER_FILE}" >> {tmp_path}/inodes; exit 3', max_restarts=2)
    agent.run()
    assert len(made) == 1
    assert os.path.basename(made[0]).startswith("watchdog_timer_")
    inodes = (tmp_path / "inodes").read_text().split()
    assert len(inodes) == 3
    assert len(set(inodes)) == 1
    assert not os.path.lexists(made[0])


def test_a_pipe_that_was_removed_is_there_after_a_restart(
    make: Callable[..., LocalElasticAgent], tmp_path: Path
) -> None:
    agent = make(
        "/bin/sh", "-c", f'[ -p "${TIMER_FILE}" ] && rm "${TIMER_FILE}" && exit $((3 - $TORCHELASTIC_RESTART_COUNT))'
    )
    agent._remaining_restarts = agent._worker_group.spec.max_restarts = 3
    assert agent.run().state == WorkerState.SUCCEEDED


REPLACE_THE_PIPE = """
[ -p "$TORCHELASTIC_TIMER_FILE" ]; echo $? "$TORCHELASTIC_TIMER_FILE" >> "$1/seen"
[ $TORCHELASTIC_RESTART_COUNT = 0 ] && { rm "$TORCHELASTIC_TIMER_FILE"; echo precious > "$TORCHELASTIC_TIMER_FILE"; }
[ $TORCHELASTIC_RESTART_COUNT = 2 ] || exit 3
"""


def test_a_pipe_that_was_replaced_by_a_file_is_made_elsewhere(
    make: Callable[..., LocalElasticAgent], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agent = make("/bin/sh", "-c", REPLACE_THE_PIPE, "worker", str(tmp_path), max_restarts=2)
    assert agent.run().state == WorkerState.SUCCEEDED
    are_pipes, paths = zip(*(line.split() for line in (tmp_path / "seen").read_text().splitlines()), strict=True)
    assert are_pipes == ("0",) * 3
    assert paths[0] == os.environ[TIMER_FILE]
    assert paths[1] == paths[2] != paths[0]
    assert Path(paths[0]).read_text() == "precious\n"
    assert not os.path.lexists(paths[1])
    (warning,) = [text for text in caplog.messages if "the workers use a pipe at" in text]
    assert all(path in warning for path in paths)


def test_without_any_place_for_a_pipe_the_restart_goes_on(
    make: Callable[..., LocalElasticAgent],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    agent = make("/bin/sh", "-c", REPLACE_THE_PIPE, "worker", str(tmp_path), max_restarts=2)
    assert agent.run().state == WorkerState.SUCCEEDED
    assert len((tmp_path / "seen").read_text().splitlines()) == 3
    assert f"the timers of workers will fail; remove the file at {os.environ[TIMER_FILE]}" in caplog.text


def test_the_pipe_of_a_dead_agent_is_taken_over(make: Callable[..., LocalElasticAgent], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = make(hang_at_first, str(tmp_path), nproc=2, max_restarts=1).run()
    assert result.return_values == {0: "came back", 1: "came back"}


def test_the_pipe_of_a_living_agent_is_refused(make: Callable[..., LocalElasticAgent], tmp_path: Path) -> None:
    path = str(tmp_path / "pipe")
    other = FileTimerServer(path, "other", reap_server=False)
    try:
        agent = make("/bin/sh", "-c", f": > {tmp_path}/started")
        with pytest.raises(
            OSError, match=r"another process serves it.*set TORCHELASTIC_TIMER_FILE to another"
        ) as raised:
            agent.run()
        assert (raised.value.errno, raised.value.filename) == (errno.EADDRINUSE, path)
        assert str(raised.value).count(path) == 1
        assert not (tmp_path / "started").exists()
        assert os.path.exists(path)
    finally:
        other.stop()


def test_a_signal_to_the_agent_ends_the_watchdog_too(make: Callable[..., LocalElasticAgent], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    agent = make("/bin/sh", "-c", f": > {tmp_path}/ready; exec sleep 1000")

    def signal_when_ready() -> None:
        (tmp_path / "ready").read_bytes()
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=signal_when_ready)
    thread.start()
    with pytest.raises(SignalException):
        agent.run()
    thread.join()
    assert agent._worker_watchdog is None
    assert not os.path.lexists(tmp_path / "pipe")


def test_workers_that_cannot_be_started_leave_no_watchdog(
    make: Callable[..., LocalElasticAgent], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="nowhere"):
        make("/nowhere").run()
    assert not os.path.lexists(tmp_path / "pipe")


def test_actions_of_the_watchdog_are_events(
    make: Callable[..., LocalElasticAgent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    agent = make(hang_at_first, str(tmp_path), nproc=2)
    monkeypatch.setattr(agent, "_log_watchdog_event", lambda name, _: seen.append(name))
    agent.run()
    assert seen == ["watchdog started", "timer expired", "kill worker process", "watchdog stopped"]
