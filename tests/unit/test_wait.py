from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.forking import fork
from tests.support.waiting import LONG_S

from ferroelastic import _engine, _wait
from ferroelastic._wait import wait_for_event

_rust = pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from tests.support.waiting import WhenWaiting

SOON_S = 10.0


class HandlerError(Exception):
    pass


def raise_it(signum: int, _frame: FrameType | None) -> None:
    raise HandlerError(signum)


def spawn(*argv: str) -> Any:
    return _engine.get_engine().spawn([_rust.Command(argv, dict(os.environ))])


def stop(group: Any) -> None:
    group.stop(signal.SIGKILL, 0, 5)
    while group.stop_report() is None:
        wait_for_event(group, group.generation, 1)


@contextmanager
def sleeping() -> Iterator[Any]:
    """A group that lives as long as the caller's variable: a fixture's value would outlive the check for leaks."""
    group = spawn("sleep", "1000")
    try:
        yield group
    finally:
        stop(group)


def test_an_exit_ends_the_wait() -> None:
    group = spawn("true")
    assert wait_for_event(group, 0, LONG_S)
    assert group.exits()[0].code == 0
    stop(group)


def test_an_event_that_was_missed_counts_at_once() -> None:
    with sleeping() as group:
        group.signal(0, signal.SIGKILL)
        assert wait_for_event(group, 0, LONG_S)
        assert wait_for_event(group, 0, LONG_S)
        assert wait_for_event(group, 0, 0)


@pytest.mark.parametrize("timeout_s", [0, -1, 0.01])
def test_without_event_it_is_a_timeout(timeout_s: float) -> None:
    with sleeping() as group:
        assert not wait_for_event(group, 0, timeout_s)


@pytest.mark.parametrize("timeout_s", [None, float("inf"), LONG_S])
def test_a_handler_that_raises_ends_the_wait(when_waiting: WhenWaiting, timeout_s: float | None) -> None:
    with sleeping() as group:
        signal.signal(signal.SIGUSR1, raise_it)
        when_waiting(os.kill, os.getpid(), signal.SIGUSR1)
        start = time.monotonic()
        with pytest.raises(HandlerError):
            wait_for_event(group, 0, timeout_s)
        assert time.monotonic() - start < SOON_S


def test_a_handler_that_returns_leaves_the_wait_waiting(when_waiting: WhenWaiting) -> None:
    with sleeping() as group:

        def kill_it(_signum: int, _frame: FrameType | None) -> None:
            group.signal(0, signal.SIGKILL)

        signal.signal(signal.SIGUSR1, kill_it)
        when_waiting(os.kill, os.getpid(), signal.SIGUSR1)
        # True, not False at once: the handler's signal is no event of the group, but the exit that it brings about is.
        assert wait_for_event(group, 0, LONG_S)
        assert group.exits()[0].signal == signal.SIGKILL


def test_the_former_wakeup_descriptor_gets_its_bytes_and_comes_back(when_waiting: WhenWaiting) -> None:
    with sleeping() as group:
        mine, theirs = socket.socketpair()
        with mine, theirs:
            mine.setblocking(False)
            signal.set_wakeup_fd(mine.fileno())
            signal.signal(signal.SIGUSR1, raise_it)
            when_waiting(os.kill, os.getpid(), signal.SIGUSR1)
            with pytest.raises(HandlerError):
                wait_for_event(group, 0, LONG_S)
            assert theirs.recv(10) == bytes([signal.SIGUSR1])
            assert signal.set_wakeup_fd(-1) == mine.fileno()


def test_a_full_former_wakeup_descriptor_is_no_error(when_waiting: WhenWaiting) -> None:
    with sleeping() as group:
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
        try:
            os.write(write_fd, bytes(1 << 16))
            signal.set_wakeup_fd(write_fd)
            signal.signal(signal.SIGUSR1, lambda *_: group.signal(0, signal.SIGKILL))
            when_waiting(os.kill, os.getpid(), signal.SIGUSR1)
            assert wait_for_event(group, 0, LONG_S)
            assert signal.set_wakeup_fd(-1) == write_fd
        finally:
            os.close(read_fd)
            os.close(write_fd)


def test_two_signals_at_once_put_everything_back(when_waiting: WhenWaiting) -> None:
    both = [signal.SIGUSR1, signal.SIGUSR2]
    for number in both:
        signal.signal(number, raise_it)
    mine, theirs = socket.socketpair()
    with mine, theirs, sleeping() as group:
        mine.setblocking(False)
        signal.set_wakeup_fd(mine.fileno())
        # In one call, so that the main thread is not back from its wait between the two.
        when_waiting(list, map(os.kill, [os.getpid()] * 2, both))
        with pytest.raises(HandlerError) as raised:
            wait_for_event(group, 0, LONG_S)
        assert isinstance(raised.value.__context__, HandlerError)
        assert signal.set_wakeup_fd(-1) == mine.fileno()


def test_a_handler_may_wait_itself(when_waiting: WhenWaiting) -> None:
    with sleeping() as group:
        mine, theirs = socket.socketpair()
        with mine, theirs:
            mine.setblocking(False)
            signal.set_wakeup_fd(mine.fileno())

            def wait_inside(_signum: int, _frame: FrameType | None) -> None:
                group.signal(0, signal.SIGKILL)
                assert wait_for_event(group, 0, LONG_S)

            signal.signal(signal.SIGUSR1, wait_inside)
            when_waiting(os.kill, os.getpid(), signal.SIGUSR1)
            assert wait_for_event(group, 0, LONG_S)
            assert theirs.recv(10) == bytes([signal.SIGUSR1])
            assert signal.set_wakeup_fd(-1) == mine.fileno()


def test_another_thread_waits_without_touching_signals() -> None:
    group = spawn("true")
    outcomes: list[bool] = []
    thread = threading.Thread(target=lambda: outcomes.append(wait_for_event(group, 0, LONG_S)))
    thread.start()
    thread.join(SOON_S)
    assert outcomes == [True]
    stop(group)


def test_a_forked_child_has_its_own_engine_and_pipe() -> None:
    parent_engine = _engine.get_engine()
    group = spawn("sleep", "1000")
    pid = fork()
    if pid == 0:
        status = 1
        try:
            assert signal.set_wakeup_fd(-1) == -1
            assert _wait._pipe is None
            with pytest.raises(_rust.ForkedError):
                group.exits()
            assert _engine.get_engine() is not parent_engine
            own = spawn("true")
            assert wait_for_event(own, 0, LONG_S)
            stop(own)
            _engine._close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert _engine.get_engine() is parent_engine
    assert not wait_for_event(group, 0, 0)
    stop(group)


def test_the_environment_forces_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERROELASTIC_PIDFD", "0")
    monkeypatch.setattr(_engine, "_engine", None)
    assert _engine.get_engine().backend == "thread"
    group = spawn("true")
    assert wait_for_event(group, 0, LONG_S)
    stop(group)
    del group
    _engine._close()
