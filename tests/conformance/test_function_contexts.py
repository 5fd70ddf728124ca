"""Contexts of workers that run a function."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import workers
from tests.conformance.contexts import content, exit_codes, finished
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conformance.implementations import Implementation


def test_functions_return_values(impl: Implementation, start: Callable[..., Any]) -> None:
    context = start(workers.give, ("zero",), ({"one": [1]},), (None,))
    assert isinstance(context, impl.mp.MultiprocessContext)
    assert context.start_method == "fork"
    pids = context.pids()
    assert list(pids) == [0, 1, 2]
    result = finished(context)
    assert result.return_values == {0: "zero", 1: {"one": [1]}, 2: None}
    assert not result.is_failed()
    assert context.pids() == pids


def test_large_return_values(start: Callable[..., Any]) -> None:
    assert finished(start(workers.give, (b"x" * 3_000_000,))).return_values == {0: b"x" * 3_000_000}


def test_spawned_functions(impl: Implementation, start: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    context = start(
        workers.speak, ("hello",), name="fn", start_method="spawn", tee=impl.mp.Std.OUT, redirects=impl.mp.Std.ALL
    )
    result = finished(context)
    assert result.return_values == {0: "hello"}
    assert content(result.stdouts[0]) == "hello out\nhello child out\n"
    assert content(result.stderrs[0]) == "hello err\nhello child err\n"
    shown = capfd.readouterr()
    assert shown.out == "[fn0]:hello out\n[fn0]:hello child out\n"


def test_an_exception_in_a_function(impl: Implementation, start: Callable[..., Any], tmp_path: Path) -> None:
    ready = str(tmp_path / "ready")
    os.mkfifo(ready)
    both = ((workers.wait_and_raise_error, ready, "boom"), (workers.announce_and_wait, ready))
    context = start(workers.by_rank, both, both, redirects=impl.mp.Std.ALL)
    pids = context.pids()
    result = finished(context)
    assert exit_codes(result.failures) == {0: 1}
    failure = result.failures[0]
    assert (failure.local_rank, failure.pid) == (0, pids[0])
    assert failure.error_file == context.error_files[0]
    assert failure.message["message"] == "ValueError: boom"
    assert "in wait_and_raise_error" in failure.message["extraInfo"]["py_callstack"]
    is_logged = "ValueError: boom" in content(result.stderrs[0])
    assert is_logged == impl.expect("traceback-in-log", torch=False, ours=True)


@pytest.mark.parametrize(
    ("function", "argument", "exitcode"),
    [
        (workers.leave, 3, 3),
        (workers.leave_at_once, 4, 4),
        (workers.kill_self, signal.SIGKILL, -9),
        (workers.kill_self, signal.SIGSEGV, -11),
    ],
)
def test_how_a_function_ends(start: Callable[..., Any], function: Any, argument: Any, exitcode: int) -> None:
    result = finished(start(function, (argument,)))
    assert exit_codes(result.failures) == {0: exitcode}


@pytest.mark.parametrize("code", [0, False])
def test_sys_exit_0_is_a_success(start: Callable[..., Any], code: Any) -> None:
    result = finished(start(workers.leave, (code,)))
    assert (result.return_values, result.is_failed()) == ({0: None}, False)


def test_the_environment_of_a_function(start: Callable[..., Any], tmp_path: Path) -> None:
    finished(start(workers.write_environment, (str(tmp_path),), env={"MY_VARIABLE": "x"}))
    environment = json.loads(content(tmp_path / "0.json"))
    assert (environment["RANK"], environment["MY_VARIABLE"]) == ("0", "x")
    assert environment["TORCHELASTIC_ERROR_FILE"].endswith("/attempt_0/0/error.json")
    assert "MY_VARIABLE" not in os.environ


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_function_that_has_returned_is_held_until_all_have(
    start: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    arguments = (str(tmp_path), str(gate))
    context = start(workers.return_and_note_the_end, arguments, arguments, start_method=method)
    assert eventually((tmp_path / "returned 0").exists, 60)
    assert context.wait(0) is None
    with open(gate, "w"):
        pass
    assert sorted(finished(context).return_values) == [0, 1]
    assert [content(tmp_path / f"end of {rank}") for rank in range(2)] == ["returned 0,returned 1"] * 2


def test_functions_are_stopped(impl: Implementation, start: Callable[..., Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    context = start(workers.announce_and_wait, (str(tmp_path / "ready"),))
    content(tmp_path / "ready")
    assert context.wait(0) is None
    (process,) = context._pc.processes
    context.close(signal.SIGTERM, 30)
    assert process.exitcode == impl.expect("clean-handlers", torch=1, ours=-signal.SIGTERM)
    context.close()


_SENT_AFTER_FORK: list[signal.Signals] = []


def _send_after_fork() -> None:
    for number in _SENT_AFTER_FORK:
        os.kill(os.getpid(), number)


os.register_at_fork(after_in_child=_send_after_fork)


def test_a_signal_while_a_worker_is_being_forked(impl: Implementation, start: Callable[..., Any]) -> None:
    """Python ignores what a handler raises while it runs the hooks of a fork. The worker would live on."""
    _SENT_AFTER_FORK.append(signal.SIGTERM)
    try:
        result = finished(start(workers.give, ("it lives",)))
    finally:
        _SENT_AFTER_FORK.clear()
    is_lost = not result.is_failed()
    assert is_lost == impl.expect("clean-handlers", torch=True, ours=False)


def test_starting_functions_twice(start: Callable[..., Any]) -> None:
    context = start(workers.wait_for_ever, ())
    with pytest.raises(ValueError, match="process context already initialized"):
        context.start()
