"""Workers that run a function, under every start method."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.function_workers import METHODS, content, finished, run, started

from ferroelastic.multiprocessing import (
    DefaultLogsSpecs,
    MultiprocessContext,
    SignalException,
    Std,
    start_processes,
)
from ferroelastic.utils.process_state import read_proc_state

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.waiting import WhenWaiting

SOON_S = 10.0


def give(value: Any) -> Any:
    print("out", os.environ["RANK"])
    print("err", os.environ["RANK"], file=sys.stderr)
    return value


def give_much(size: int) -> list[str]:
    return [f"item {number}" for number in range(size)]


def fail(message: str) -> None:
    raise ValueError(message)


def leave(code: Any) -> None:
    sys.exit(code)


def leave_abruptly(code: int) -> None:
    os._exit(code)


def crash() -> None:
    ctypes.string_at(0)


def die_by(number: int) -> None:
    os.kill(os.getpid(), number)


def interrupt() -> None:
    raise KeyboardInterrupt


def give_lambda() -> Callable[[], None]:
    return lambda: None


class Bomb:
    """Can be sent, but not received."""

    def __reduce__(self) -> Any:
        return fail, ("cannot be unpickled",)


def give_bomb() -> Bomb:
    return Bomb()


def sleep_or_fail(path: str, how: str) -> None:
    """Meet at the FIFO ``path``: rank 1 fails once rank 0 is in its sleep."""
    if os.environ["RANK"] == "0":
        if how == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open(path, "w"):
            time.sleep(1000)
    with open(path):
        sys.exit(7)


def describe_self() -> dict[str, Any]:
    handlers = {number.name: str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    return {
        "leads a session": os.getsid(0) == os.getpid() == os.getpgrp(),
        "handlers": handlers,
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "wakeup": signal.set_wakeup_fd(-1),
        "env": os.environ["ADDED"],
    }


def own_engine_works() -> int:
    """A worker may itself be an agent."""
    context = start_processes("inner", "true", {0: ()}, {0: {}}, DefaultLogsSpecs(os.devnull))
    result = context.wait(60)
    assert result is not None
    return len(result.return_values)


def start_grandchild(path: str) -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(1000)
    with open(path, "w") as file:
        file.write(str(pid))


@pytest.mark.parametrize("method", METHODS)
def test_return_values(tmp_path: Path, method: str) -> None:
    with started(tmp_path, method, give, ("a",), ({"b": [1]},), (None,)) as context:
        pids = context.pids()
        assert len(set(pids.values())) == 3
        result = finished(context)
        assert not result.is_failed()
        assert result.return_values == {0: "a", 1: {"b": [1]}, 2: None}
        assert all(read_proc_state(pid) is None for pid in pids.values())
        assert context.wait(0) is not None
        assert context._return_folder is not None
        assert not os.path.exists(context._return_folder)


@pytest.mark.parametrize("method", METHODS)
def test_large_return_values(tmp_path: Path, method: str) -> None:
    values = run(tmp_path, method, give_much, (200_000,), (100_000,)).return_values
    assert [len(value) for value in values.values()] == [200_000, 100_000]


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_is_a_failure_with_an_error_file(tmp_path: Path, method: str) -> None:
    result = run(tmp_path, method, fail, ("no good",), redirects=Std.ALL)
    failure = result.failures[0]
    assert failure.exitcode == 1
    assert failure.error_file.endswith("/attempt_0/0/error.json")
    message = json.loads(content(failure.error_file))["message"]
    assert message["message"] == "ValueError: no good"
    assert "raise ValueError(message)" in message["extraInfo"]["py_callstack"]
    assert "ValueError: no good" in content(result.stderrs[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("code", "expected"), [(138, 138), ("a message", 1), (True, 1)])
def test_sys_exit_is_an_exit_code(tmp_path: Path, method: str, code: Any, expected: int) -> None:
    result = run(tmp_path, method, leave, (code,), redirects=Std.ERR)
    assert result.failures[0].exitcode == expected
    assert content(result.stderrs[0]) == ("a message\n" if code == "a message" else "")


@pytest.mark.parametrize("code", [0, None])
def test_sys_exit_without_error_is_a_success(tmp_path: Path, code: int | None) -> None:
    assert run(tmp_path, "fork", leave, (code,)).return_values == {0: None}


def test_an_abrupt_end(tmp_path: Path) -> None:
    assert run(tmp_path, "fork", leave_abruptly, (0,)).return_values == {0: None}
    assert run(tmp_path, "fork", leave_abruptly, (9,)).failures[0].exitcode == 9


@pytest.mark.parametrize("method", METHODS)
def test_death_by_signal(tmp_path: Path, method: str) -> None:
    failure = run(tmp_path, method, die_by, (signal.SIGKILL,)).failures[0]
    assert failure.exitcode == -signal.SIGKILL
    assert failure.signal_name() == "SIGKILL"


def test_a_segmentation_fault(tmp_path: Path) -> None:
    assert run(tmp_path, "fork", crash, (), redirects=Std.ERR).failures[0].exitcode == -signal.SIGSEGV


@pytest.mark.parametrize("method", METHODS)
def test_a_keyboard_interrupt_is_no_success(tmp_path: Path, method: str) -> None:
    result = run(tmp_path, method, interrupt, (), redirects=Std.ERR)
    assert result.failures[0].exitcode == -signal.SIGINT
    assert "KeyboardInterrupt" in content(result.stderrs[0])


def test_a_value_that_cannot_be_sent(tmp_path: Path) -> None:
    failure = run(tmp_path, "fork", give_lambda, ()).failures[0]
    assert failure.exitcode == 1
    assert "pickle" in str(failure.message).lower()


def test_a_value_that_cannot_be_received(tmp_path: Path) -> None:
    with (
        started(tmp_path, "fork", give_bomb, ()) as context,
        pytest.raises(
            RuntimeError, match="failed to read the return value of worker 0: ValueError: cannot be unpickled"
        ),
    ):
        context.wait(60)


def test_a_function_that_cannot_be_sent_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"(?i)pickle|local object"):  # the type depends on the Python version
        start_processes(
            "fn", lambda: None, {0: (), 1: ()}, {0: {}, 1: {}}, DefaultLogsSpecs(str(tmp_path)), start_method="spawn"
        )


def test_a_start_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    args = {0: ("fine",), 1: (lambda: None,)}
    with pytest.raises(Exception, match=r"(?i)pickle|local object"):  # the type depends on the Python version
        start_processes("fn", give, args, {0: {}, 1: {}}, DefaultLogsSpecs(str(tmp_path)), start_method="spawn")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["obedient", "deaf"])
def test_a_failure_stops_the_peers(tmp_path: Path, method: str, how: str) -> None:
    meeting = tmp_path / "fifo"
    os.mkfifo(meeting)
    timeout_s = 0.2 if how == "deaf" else 600
    with started(
        tmp_path, method, sleep_or_fail, (str(meeting), how), (str(meeting), how), shutdown_timeout=timeout_s
    ) as context:
        result = finished(context)
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {1: 7}
    expected = -signal.SIGKILL if how == "deaf" else -signal.SIGTERM
    assert {rank: peer.exitcode for rank, peer in result.stopped.items()} == {0: expected}
    assert result.return_values == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_is_clean_of_its_agent(tmp_path: Path, method: str) -> None:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(write_fd)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        told = run(tmp_path, method, describe_self, (), env={"ADDED": "x"}).return_values[0]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.set_wakeup_fd(-1)
        os.close(read_fd)
        os.close(write_fd)
    assert told["leads a session"]
    assert "terminate" not in str(told["handlers"])
    assert "default_int_handler" in told["handlers"]["SIGINT"]
    assert told["mask"] == set()
    assert told["wakeup"] == -1
    assert told["env"] == "x"


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_can_be_an_agent(tmp_path: Path, method: str) -> None:
    assert run(tmp_path, method, own_engine_works, ()).return_values == {0: 1}


def test_fork_with_warnings_as_errors(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path, "fork", give, (1,), (2,)).return_values == {0: 1, 1: 2}


def test_parallel_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MP_PARALLEL_START", "1")
    assert run(tmp_path, "forkserver", give, (1,), (2,), (3,)).return_values == {0: 1, 1: 2, 2: 3}


@pytest.mark.parametrize("method", METHODS)
def test_redirect_and_tee(tmp_path: Path, method: str, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, method, give, (1,), (2,), redirects={0: Std.ERR}, tee={0: Std.OUT, 1: Std.ALL})
    assert content(result.stdouts[0]) == "out 0\n"
    assert content(result.stderrs[0]) == "err 0\n"
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[fn0]:out 0", "[fn1]:out 1"]
    assert "[fn1]:err 1\n" in err
    assert "err 0" not in err


def test_a_signal_ends_the_wait_at_once(tmp_path: Path, when_waiting: WhenWaiting) -> None:
    with started(tmp_path, "fork", time.sleep, (1000,)) as context:
        when_waiting(os.kill, os.getpid(), signal.SIGTERM)
        with pytest.raises(SignalException):
            context.wait()
        context.close(signal.SIGTERM)
        assert all(read_proc_state(pid) is None for pid in context.pids().values())


def test_a_process_left_in_the_group_of_a_worker_is_ended(tmp_path: Path) -> None:
    with started(tmp_path, "spawn", start_grandchild, (str(tmp_path / "pid"),)) as context:
        context.shutdown_timeout = 0.1
        assert not finished(context).is_failed()
    assert read_proc_state(int(content(tmp_path / "pid"))) in {None, "Z"}


def test_no_workers_at_all(tmp_path: Path) -> None:
    assert run(tmp_path, "spawn", give).return_values == {}


def test_start_twice_is_an_error(tmp_path: Path) -> None:
    with started(tmp_path, "fork", give, (1,)) as context, pytest.raises(ValueError, match="got called twice"):
        context.start()


def test_before_start_there_is_nothing_to_ask(tmp_path: Path) -> None:
    context = MultiprocessContext("fn", give, {0: (1,)}, {0: {}}, "fork", DefaultLogsSpecs(str(tmp_path)))
    with pytest.raises(AssertionError, match="call start"):
        context.wait(0)
    with pytest.raises(AssertionError, match="call start"):
        context.pids()
    context.close()


def test_a_worker_reaped_before_it_could_be_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MultiprocessContext._observe

    def observe_late(self: MultiprocessContext, processes: list[Any]) -> None:
        processes[0].join(60)
        original(self, processes)

    monkeypatch.setattr(MultiprocessContext, "_observe", observe_late)
    result = run(tmp_path, "fork", leave, (3,), (0,))
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {0: 3}


@pytest.mark.parametrize("method", METHODS)
def test_workers_end_with_a_killed_agent(tmp_path: Path, method: str) -> None:
    meeting = tmp_path / "pid"
    os.mkfifo(meeting)
    agent = f"""
import os, signal, sys
from tests.support.function_workers import show_pid_and_sleep, started
if __name__ == "__main__":
    from pathlib import Path
    with started(Path({str(tmp_path)!r}), {method!r}, show_pid_and_sleep, ({str(meeting)!r},)) as context:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "agent.py").write_text(agent)
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "agent.py")],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
    ) as process:
        worker = os.pidfd_open(int(content(meeting)))
        try:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == -signal.SIGKILL
            poller = select.poll()
            poller.register(worker, select.POLLIN)
            assert poller.poll(SOON_S * 1000)
        finally:
            os.close(worker)
