"""Workers started from a command, from start to the last of their descendants."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.waiting import LONG_S, WhenWaiting, eventually, is_alive

from ferroelastic.multiprocessing import (
    DefaultLogsSpecs,
    PContext,
    RunProcsResult,
    SignalException,
    Std,
    SubprocessContext,
    start_processes,
)
from ferroelastic.multiprocessing.subprocess_handler import SubprocessHandler, get_subprocess_handler
from ferroelastic.utils.process_state import read_proc_state

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SOON_S = 10.0


class Launcher:
    """Starts shell scripts, one per rank."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.started: list[PContext] = []

    def __call__(self, *scripts: str, redirects: Any = Std.NONE, tee: Any = Std.NONE, **options: Any) -> PContext:
        ranks = range(len(scripts))
        env = options.pop("env", {})
        context = start_processes(
            name="worker",
            entrypoint="/bin/sh",
            args={rank: ("-c", scripts[rank]) for rank in ranks},
            envs={rank: {"RANK": str(rank), **env} for rank in ranks},
            logs_specs=DefaultLogsSpecs(str(self.log_dir), redirects, tee, options.pop("local_ranks_filter", None)),
            **options,
        )
        self.started.append(context)
        return context


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path / "logs")
    yield launcher
    for context in launcher.started:
        context.close(signal.SIGKILL, 0)
    launcher.started.clear()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """Opening it for reading waits for a writer and the other way round: two workers meet there."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def finished(context: PContext) -> RunProcsResult:
    result = context.wait(60)
    assert result is not None
    return result


def content(path: str | Path) -> str:
    with open(path) as file:
        return file.read()


def test_success_of_all(launch: Launcher) -> None:
    context = launch("exit 0", "exit 0")
    assert isinstance(context, SubprocessContext)
    result = finished(context)
    assert not result.is_failed()
    assert result.return_values == {0: None, 1: None}
    assert result.stopped == {}
    assert not any(map(is_alive, context.pids().values()))


def test_no_workers_at_all(launch: Launcher) -> None:
    context = launch()
    assert context.pids() == {}
    assert finished(context).return_values == {}


def test_a_failure_stops_the_peers_and_is_the_only_failure(launch: Launcher) -> None:
    context = launch("exec sleep 1000", "exit 138", "exec sleep 1000")
    pids = context.pids()
    result = finished(context)
    assert list(result.failures) == [1]
    failure = result.failures[1]
    assert (failure.exitcode, failure.pid, failure.local_rank) == (138, pids[1], 1)
    assert failure.exit is not None
    assert failure.exit.order == 0
    assert {rank: peer.exitcode for rank, peer in result.stopped.items()} == {0: -15, 2: -15}
    assert result.return_values == {}
    assert not any(map(is_alive, pids.values()))


def test_death_by_signal(launch: Launcher) -> None:
    failure = finished(launch("kill -SEGV $$")).failures[0]
    assert failure.exitcode == -signal.SIGSEGV
    assert failure.signal_name() == "SIGSEGV"


def test_all_that_failed_by_themselves_are_failures(launch: Launcher, fifo: Path) -> None:
    # The second ignores the stop that the first one's failure begins, and the third fails before it.
    context = launch(f"read x < {fifo}; exit 3", f"exec 3> {fifo}; kill -KILL $$")
    failures = finished(context).failures
    assert failures[1].exitcode == -signal.SIGKILL
    assert {rank: failure.exitcode for rank, failure in failures.items()} in ({0: 3, 1: -9}, {1: -9})


def test_a_deaf_worker_is_killed_after_the_shutdown_timeout(launch: Launcher, fifo: Path) -> None:
    context = launch(
        f"trap '' TERM; : > {fifo}; while :; do sleep 1000; done", f"read x < {fifo}; exit 7", shutdown_timeout=0.3
    )
    start = time.monotonic()
    result = finished(context)
    assert 0.25 < time.monotonic() - start < SOON_S
    assert result.failures[1].exitcode == 7
    assert result.stopped[0].exitcode == -signal.SIGKILL


def test_a_deaf_grandchild_of_a_dead_worker_is_killed_too(launch: Launcher, fifo: Path, tmp_path: Path) -> None:
    context = launch(
        f"(trap '' TERM; : > {fifo}; exec sleep 1000) & echo $! > {tmp_path}/pid; read x < {fifo}; exit 5",
        shutdown_timeout=0.1,
    )
    result = finished(context)
    assert result.failures[0].exitcode == 5
    assert not is_alive(int(content(tmp_path / "pid")))


def test_close_ends_processes_in_the_group_of_a_finished_worker(launch: Launcher, tmp_path: Path) -> None:
    context = launch(f"sleep 1000 & echo $! > {tmp_path}/pid")
    context.shutdown_timeout = 0.1
    assert not finished(context).is_failed()
    assert not is_alive(int(content(tmp_path / "pid")))


def test_wait_without_limit_with_timeout_and_just_looking(launch: Launcher, fifo: Path) -> None:
    context = launch(f"read x < {fifo}")
    assert context.wait(0) is None
    assert context.wait(timeout=0.01, period=1000) is None
    with open(fifo, "w") as meeting:
        meeting.write("go\n")
    assert context.wait() is not None
    assert context.wait(0) is not None


def test_an_exit_is_noticed_without_polling(launch: Launcher, fifo: Path) -> None:
    """The worker exits just after the wait has begun, so an agent that polls every 0.1 s notices each exit 0.1 s late."""
    moments: list[float] = []

    def let_go() -> None:
        with open(fifo, "w"):
            moments.append(time.monotonic())

    delays_s = []
    for _ in range(10):
        context = launch(f"read x < {fifo}")
        when_waiting = WhenWaiting()
        when_waiting(let_go)
        assert finished(context).is_failed()  # `read` at end of file
        delays_s.append(time.monotonic() - moments[-1])
        when_waiting.close()
    assert statistics.median(delays_s) < 0.05, delays_s


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_wait_at_once(launch: Launcher, when_waiting: WhenWaiting, number: signal.Signals) -> None:
    context = launch("exec sleep 1000")
    when_waiting(os.kill, os.getpid(), number)
    start = time.monotonic()
    with pytest.raises(SignalException) as raised:
        context.wait()
    assert time.monotonic() - start < SOON_S
    assert raised.value.sigval == number
    context.close(raised.value.sigval)
    assert not any(map(is_alive, context.pids().values()))


def test_which_signals_are_handled_can_be_chosen(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGUSR1")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    context = launch("exit 0")
    assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    with pytest.raises(SignalException):
        signal.raise_signal(signal.SIGUSR1)
    context.close()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_while_closing_is_raised_when_all_is_closed(
    launch: Launcher, fifo: Path, when_waiting: WhenWaiting, tmp_path: Path
) -> None:
    """The worker takes its time to save, and has it."""
    context = launch(f"trap 'sleep 0.3; : > {tmp_path}/saved; exit 0' TERM; : > {fifo}; while :; do sleep 0.01; done")
    assert content(fifo) == ""
    when_waiting(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(SignalException):
        context.close(timeout=600)
    assert (tmp_path / "saved").exists()
    assert not any(map(is_alive, context.pids().values()))
    assert all(tail.stopped() for tail in context._tail_logs)


def test_a_second_interrupt_while_closing_ends_the_grace(
    launch: Launcher, fifo: Path, when_waiting: WhenWaiting
) -> None:
    context = launch(f"trap '' TERM; : > {fifo}; exec sleep 1000")
    assert content(fifo) == ""
    when_waiting(os.kill, os.getpid(), signal.SIGINT)
    when_waiting(os.kill, os.getpid(), signal.SIGINT)
    start = time.monotonic()
    with pytest.raises(SignalException):
        context.close(timeout=600)
    assert time.monotonic() - start < SOON_S
    assert not any(map(is_alive, context.pids().values()))


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGQUIT])
def test_a_second_interrupt_while_answering_the_first_only_ends_the_grace(
    launch: Launcher, fifo: Path, when_waiting: WhenWaiting, first: signal.Signals
) -> None:
    context = launch(f"trap '' INT QUIT; : > {fifo}; exec sleep 1000")
    assert content(fifo) == ""
    when_waiting(os.kill, os.getpid(), signal.SIGINT)
    start = time.monotonic()
    try:
        signal.raise_signal(first)
    except SignalException as caught:
        context.close(caught.sigval, 600)
    assert time.monotonic() - start < SOON_S
    assert not any(map(is_alive, context.pids().values()))


def test_a_signal_while_a_failure_is_cleaned_up_is_not_lost(
    launch: Launcher, fifo: Path, when_waiting: WhenWaiting, tmp_path: Path
) -> None:
    context = launch(
        f"trap ': > {tmp_path}/told; sleep 1; exit 0' TERM; : > {fifo}; while :; do sleep 0.01; done",
        f"read x < {fifo}; exit 7",
        shutdown_timeout=600,
    )

    def interrupt_the_stop() -> None:
        assert eventually((tmp_path / "told").exists, LONG_S)
        os.kill(os.getpid(), signal.SIGTERM)

    when_waiting(interrupt_the_stop)
    with pytest.raises(SignalException):
        context.wait()
    assert not any(map(is_alive, context.pids().values()))
    result = finished(context)
    assert result.failures[1].exitcode == 7
    assert result.stopped[0].exitcode == 0


def test_close_twice_and_before_start(launch: Launcher, tmp_path: Path) -> None:
    context = launch("exec sleep 1000")
    context.close()
    context.close()
    unstarted = SubprocessContext("w", "true", {0: ()}, {0: {}}, DefaultLogsSpecs(str(tmp_path)))
    unstarted.close()


def test_start_twice_is_an_error(launch: Launcher) -> None:
    context = launch("exit 0")
    with pytest.raises(ValueError, match="got called twice"):
        context.start()


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        start_processes("w", "no-such-program", {0: (), 1: ()}, {0: {}, 1: {}}, DefaultLogsSpecs(str(tmp_path)))


def test_a_program_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("echo")
    with pytest.raises(PermissionError):
        start_processes("w", str(tmp_path / "script"), {0: ()}, {0: {}}, DefaultLogsSpecs(str(tmp_path)))


@pytest.mark.parametrize(("args", "envs"), [({0: ()}, {0: {}, 1: {}}), ({0: (), 1: ()}, {0: {}}), ({1: ()}, {1: {}})])
def test_ranks_must_agree(args: dict[int, Any], envs: dict[int, Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="local rank mapping mismatch"):
        start_processes("w", "true", args, envs, DefaultLogsSpecs(str(tmp_path)))


def test_environment_and_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "from the agent")
    monkeypatch.setenv("REPLACED", "old")
    monkeypatch.setitem(os.environ, "ODD", "\udcff")  # bytes that are no UTF-8
    script = "import os, sys; print(sys.argv[1:], *(os.environ[k] for k in ('INHERITED', 'REPLACED', 'RANK')), ascii(os.environ['ODD']))"
    context = start_processes(
        "w",
        sys.executable,
        {0: ("-c", script, 1, ["two"])},
        {0: {"REPLACED": "new", "RANK": "0"}},
        DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL),
    )
    result = finished(context)
    assert content(result.stdouts[0]) == "['1', \"['two']\"] from the agent new 0 '\\udcff'\n", content(
        result.stderrs[0]
    )


def test_workers_have_their_own_session_and_default_signals(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        context = start_processes("w", "cat", {0: ("/proc/self/status",)}, {0: {}}, specs)
        result = finished(context)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    status = dict(line.split(":", 1) for line in content(result.stdouts[0]).splitlines())
    assert int(status["NSsid"]) == int(status["NSpgid"]) == context.pids()[0]
    assert int(status["SigBlk"], 16) == 0
    assert int(status["SigIgn"], 16) == 0  # where Python itself ignores SIGPIPE


def test_redirect_and_tee(launch: Launcher, capfd: pytest.CaptureFixture[str]) -> None:
    script = "echo out $RANK; echo err $RANK >&2"
    context = launch(script, script, redirects={0: Std.ERR}, tee={0: Std.OUT, 1: Std.ERR})
    result = finished(context)
    assert content(result.stdouts[0]) == "out 0\n"
    assert content(result.stderrs[0]) == "err 0\n"
    assert result.stdouts[1] == ""
    assert content(result.stderrs[1]) == "err 1\n"
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[worker0]:out 0", "out 1"]
    assert "[worker1]:err 1\n" in err
    assert "err 0" not in err
    assert all(tail.stopped() for tail in context._tail_logs)


def test_tee_goes_to_a_replaced_stream(launch: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    finished(launch("echo hello", tee=Std.OUT, log_line_prefixes={0: "<zero>"}))
    assert capsys.readouterr().out == "<zero>hello\n"


def test_only_chosen_ranks_show(launch: Launcher, capfd: pytest.CaptureFixture[str]) -> None:
    result = finished(launch("echo a", "echo b", tee={0: Std.OUT}, local_ranks_filter={1}))
    assert content(result.stdouts[0]) == "a\n"
    assert capfd.readouterr().out == "b\n"


def test_duplicate_filters(launch: Launcher, tmp_path: Path) -> None:
    context = launch(
        "echo apple; echo plum >&2; echo pear",
        "echo plum; echo pear >&2",
        tee=Std.ALL,
        duplicate_stdout_filters=["apple", "pea"],
        duplicate_stderr_filters=["plum"],
    )
    finished(context)
    (attempt,) = (tmp_path / "logs").glob("*/attempt_0")
    assert content(attempt / "filtered_stdout.log") == "[worker0]:apple\n[worker0]:pear\n"
    assert content(attempt / "filtered_stderr.log") == "[worker0]:plum\n"
    assert context.filtered_stdout is not None
    assert context.filtered_stdout.closed


def test_the_last_output_of_a_killed_worker_is_shown(launch: Launcher, capfd: pytest.CaptureFixture[str]) -> None:
    finished(launch("echo last words; kill -KILL $$", tee=Std.OUT))
    assert capfd.readouterr().out == "[worker0]:last words\n"


def test_error_files_are_read(launch: Launcher) -> None:
    error = '{"message": {"message": "ValueError: no", "extraInfo": {"py_callstack": "...", "timestamp": "12"}}}'
    failure = finished(launch(f"echo '{error}' > $TORCHELASTIC_ERROR_FILE; exit 1")).failures[0]
    assert failure.message["message"] == "ValueError: no"  # type: ignore[index]  # an object here


def test_workers_on_another_thread(launch: Launcher, caplog: pytest.LogCaptureFixture) -> None:
    results: list[RunProcsResult] = []
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=lambda: results.append(finished(launch("exit 3"))))
        thread.start()
        thread.join(SOON_S)
    assert results[0].failures[0].exitcode == 3
    assert "running on a child thread" in caplog.text


def test_workers_end_with_a_killed_agent(tmp_path: Path) -> None:
    agent = f"""
import os, signal
from ferroelastic.multiprocessing import DefaultLogsSpecs, start_processes
context = start_processes("w", "sleep", {{0: ("1000",), 1: ("1000",)}}, {{0: {{}}, 1: {{}}}}, DefaultLogsSpecs({str(tmp_path)!r}))
print(*context.pids().values(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, "-c", agent], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=False
    )
    assert ran.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in ran.stdout.split()]
    assert len(pids) == 2
    assert all(ends_soon(pid) for pid in pids)


def ends_soon(pid: int) -> bool:
    """Whether a process that is no child of ours has ended or ends now."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    import select

    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(SOON_S * 1000))
    finally:
        os.close(descriptor)


def handler(argv: Sequence[str], stdout: str | None = None) -> SubprocessHandler:
    return get_subprocess_handler(argv[0], tuple(argv[1:]), {"ADDED": "x"}, stdout or "", "", 0)


@pytest.mark.parametrize("start_method", ["", "fork", "spawn"])
def test_two_signals_that_come_together_while_workers_start_leave_none(tmp_path: Path, start_method: str) -> None:
    """The second raises where the answer to the first begins: then the workers are stopped all the same."""
    done = subprocess.run(
        [sys.executable, "-c", TWO_SIGNALS, str(tmp_path / "pids"), start_method],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "SIGHUP\n", done.stdout + done.stderr
    pids = [int(line) for line in content(tmp_path / "pids").split()]
    assert len(pids) == 2
    assert all(ends_soon(pid) for pid in pids)


# The engine's own hooks, which end what is left when the process does, are not to help.
TWO_SIGNALS = """
import os, signal, sys, time
from ferroelastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes
from ferroelastic.multiprocessing import _multiprocess_context, _subprocess_context

path, start_method = sys.argv[1:]
both = {signal.SIGHUP, signal.SIGTERM}

def interrupt(pids):
    with open(path, "w") as file:
        print(*pids, file=file)
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    for number in both:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)

def spawn(commands, groups, *rest):
    real_spawn(commands, groups, *rest)
    interrupt(groups[0].pids)

def start(self, processes):
    real_start(self, processes)
    interrupt([process.pid for process in processes])

real_spawn, real_start = _subprocess_context.spawn, _multiprocess_context.MultiprocessContext._start_processes
_subprocess_context.spawn, _multiprocess_context.MultiprocessContext._start_processes = spawn, start
entrypoint, args = (time.sleep, (1000,)) if start_method else ("sleep", ("1000",))
try:
    start_processes(
        "w", entrypoint, {0: args, 1: args}, {0: {}, 1: {}}, DefaultLogsSpecs(os.devnull), start_method=start_method or "spawn"
    )
except SignalException as error:
    gone = all(not os.path.exists(f"/proc/{pid}") for pid in map(int, open(path).read().split()))
    print(error.sigval.name if gone else "they run", flush=True)
os._exit(0)
"""


def test_a_handler_of_its_own(tmp_path: Path) -> None:
    own = handler(["sh", "-c", "echo $ADDED; exit 4"], str(tmp_path / "out"))
    assert own.proc.wait(60) == 4
    assert own.proc.returncode == 4
    assert own.proc.args == ("sh", "-c", "echo $ADDED; exit 4")
    assert content(tmp_path / "out") == "x\n"
    own.close()


def test_a_handler_has_the_popen_attributes_in_use() -> None:
    own = handler(["sleep", "1000"])
    assert own.local_rank_id == 0
    assert own.proc.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        own.proc.wait(0.01)
    assert own.proc.returncode is None
    own.proc.send_signal(signal.SIGSTOP)
    # Until it is stopped it would take SIGTERM first.
    assert eventually(lambda: read_proc_state(own.proc.pid) == "T")
    own.proc.terminate()
    own.proc.kill()
    assert own.proc.wait() == -signal.SIGKILL
    own.proc.kill()


def test_a_handler_closes_the_whole_group(tmp_path: Path) -> None:
    meeting = tmp_path / "fifo"
    os.mkfifo(meeting)
    own = handler(["sh", "-c", f"sleep 1000 & echo $! > {meeting}; wait"])
    grandchild = int(content(meeting))
    own.close(signal.SIGKILL)
    assert own.proc.wait() == -signal.SIGKILL
    assert ends_soon(grandchild)


def test_the_handlers_of_a_context_are_views_on_it(launch: Launcher) -> None:
    context = launch("exec sleep 1000", "exec sleep 1000")
    assert isinstance(context, SubprocessContext)
    handlers = context.subprocess_handlers
    assert {rank: one.proc.pid for rank, one in handlers.items()} == context.pids()
    handlers[1].proc.kill()
    assert handlers[1].proc.wait(SOON_S) == -signal.SIGKILL
    assert finished(context).failures[1].exitcode == -signal.SIGKILL
    assert handlers[0].proc.poll() == -signal.SIGTERM


def test_a_context_written_for_torch_is_polled(tmp_path: Path) -> None:
    class Polled(PContext):
        looks = 0

        def _start(self) -> None:
            pass

        def _poll(self) -> RunProcsResult | None:
            self.looks += 1
            return RunProcsResult() if self.looks == 3 else None

        def pids(self) -> dict[int, int]:
            return {}

        def _close(self, death_sig: signal.Signals, timeout: float = 30) -> None:
            pass

    context = Polled("w", "true", {0: ()}, {0: {}}, DefaultLogsSpecs(str(tmp_path)))
    context.start()
    assert context.wait(period=0.001) is not None
    assert context.looks == 3
    context.close()


def test_an_interactive_rank_needs_a_terminal_and_a_worker(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^interactive_rank=2 is not a local rank; give 0 to 1$"):
        launch("exit 0", "exit 0", interactive_rank=2)
    monkeypatch.setattr(os, "isatty", lambda _descriptor: False)
    with pytest.raises(ValueError, match=r"^standard input is not a terminal; start ferrorun in a terminal"):
        launch("exit 0", "exit 0", interactive_rank=0)
