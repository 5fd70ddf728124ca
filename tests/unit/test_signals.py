from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ferroelastic import _signals
from ferroelastic._signals import Handling, SignalException, _terminate_process_handler
from ferroelastic._wait import wait_for_event

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Silent:
    """A group to which nothing happens."""

    def wait(self, _generation: int, timeout_s: float | None, *_: object) -> str:
        time.sleep(min(timeout_s or 0.01, 0.01))
        return "timeout"


@pytest.fixture
def handling() -> Iterator[Handling]:
    with Handling("SIGTERM,SIGINT,SIGHUP,SIGQUIT") as installed:
        yield installed


def test_a_named_signal_raises() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with (
            Handling("SIGTERM, SIGUSR1,"),
            pytest.raises(SignalException, match=f"Process {os.getpid()} got signal: ") as caught,
        ):
            signal.raise_signal(number)
        assert caught.value.sigval == number
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


@pytest.mark.parametrize("name", ["SIGNOSUCH", "SIG_DFL", "alarm", "SIGKILL"])
def test_a_signal_that_cannot_be_handled_is_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with Handling(f"{name},SIGTERM"):
        assert f"Failed to register signal handler for {name}" in caplog.text
        assert signal.getsignal(signal.SIGTERM) is _terminate_process_handler


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Handling("SIGHUP"):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with Handling("SIGHUP"):
        assert signal.getsignal(signal.SIGHUP) is _terminate_process_handler


def test_a_process_under_nohup_ignores_sighup() -> None:
    program = (
        "import signal; from ferroelastic._signals import Handling\n"
        "with Handling('SIGHUP'): signal.raise_signal(signal.SIGHUP); print('alive')"
    )
    done = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_another_thread_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=Handling("SIGTERM").install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_former_handlers_come_back() -> None:
    theirs = lambda *_: None  # noqa: E731 - a program's own handler
    signal.signal(signal.SIGTERM, theirs)
    outer, inner = Handling("SIGTERM"), Handling("SIGTERM,SIGUSR1")
    outer.install()
    inner.install()
    inner.restore()
    assert signal.getsignal(signal.SIGTERM) is _terminate_process_handler
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    outer.restore()
    outer.restore()
    assert signal.getsignal(signal.SIGTERM) is theirs


def test_a_handler_that_a_program_has_set_meanwhile_stays() -> None:
    theirs = lambda *_: None  # noqa: E731 - a program's own handler
    with Handling("SIGTERM"):
        signal.signal(signal.SIGTERM, theirs)
    assert signal.getsignal(signal.SIGTERM) is theirs


@pytest.mark.usefixtures("handling")
def test_only_the_first_signal_raises() -> None:
    with pytest.raises(SignalException):
        signal.raise_signal(signal.SIGHUP)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    first = _signals.received()
    assert first is not None
    assert first.sigval == signal.SIGHUP


def test_during_a_stop_nothing_raises_and_the_signal_stays_pending(handling: Handling) -> None:
    with _signals.shielded(lambda: None):
        signal.raise_signal(signal.SIGTERM)
        _signals.raise_pending()
    pending = handling.restore()
    assert pending is not None
    assert pending.sigval == signal.SIGTERM


@pytest.mark.usefixtures("handling")
def test_after_a_stop_the_pending_signal_is_raised() -> None:
    with _signals.shielded(lambda: None):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SignalException):
        _signals.raise_pending()


def test_only_the_outermost_handling_reports_an_unhandled_signal(handling: Handling) -> None:
    inner = Handling("SIGTERM")
    inner.install()
    with _signals.shielded(lambda: None):
        signal.raise_signal(signal.SIGTERM)
    assert inner.restore() is None
    _signals.conclude()
    assert handling.restore() is None


@pytest.mark.usefixtures("handling")
def test_a_signal_that_was_swallowed_is_raised_by_the_next_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swallower:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    swallowed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda caught: swallowed.append(caught.exc_value))
    made = Swallower()
    del made
    assert len(swallowed) == 1
    swallowed.clear()
    with pytest.raises(SignalException):
        wait_for_event(_Silent(), 0, 60)  # type: ignore[arg-type]  # what it needs of a group


@pytest.mark.usefixtures("handling")
def test_an_outcome_that_stands_is_not_interrupted() -> None:
    _signals.conclude()
    signal.raise_signal(signal.SIGTERM)
    _signals.raise_pending()
    assert _signals.received() is not None


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([signal.SIGTERM] * 5, 0),
        ([signal.SIGTERM, signal.SIGHUP] * 3, 0),
        ([signal.SIGTERM, signal.SIGINT], 0),
        ([signal.SIGINT, signal.SIGTERM], 0),
        ([signal.SIGINT, signal.SIGINT], 1),
        ([signal.SIGINT, signal.SIGQUIT], 1),
        ([signal.SIGTERM, signal.SIGQUIT, signal.SIGTERM, signal.SIGINT], 1),
    ],
)
def test_signals_that_shorten_a_grace(numbers: list[signal.Signals], expected: int) -> None:
    shortened = []
    with _signals.shielded(lambda: shortened.append(1)):
        for number in numbers:
            signal.raise_signal(number)
    assert len(shortened) == expected
    assert _signals.is_impatient() == bool(expected)


@pytest.mark.usefixtures("handling")
def test_was_before_signal_compares_times() -> None:
    assert _signals.was_before_signal(time.monotonic_ns())
    earlier = time.monotonic_ns()
    with pytest.raises(SignalException):
        signal.raise_signal(signal.SIGTERM)
    assert _signals.was_before_signal(earlier)
    assert not _signals.was_before_signal(time.monotonic_ns())


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize(
    ("returncode", "before_ms", "was_before"),
    [
        (-signal.SIGTERM, 50, False),
        (128 + signal.SIGTERM, 50, False),
        (-signal.SIGTERM, 200, True),
        (-signal.SIGKILL, 50, True),
        (-signal.SIGINT, 50, True),
        (1, 50, True),
        (0, 50, True),
        (None, 50, True),
        (1, -1, False),
    ],
)
def test_a_worker_that_the_same_signal_ended_at_that_instant_belongs_to_the_stop(
    returncode: int | None, before_ms: int, was_before: bool
) -> None:
    with pytest.raises(SignalException):
        signal.raise_signal(signal.SIGTERM)
    at_ns = _signals._state.first_at_ns - before_ms * 1_000_000
    assert _signals.was_before_signal(at_ns, returncode) == was_before


class Ended(NamedTuple):
    """What the wait reads of the end of a worker."""

    returncode: int | None
    stopped: bool = False
    monotonic_ns: int = 1 << 62
    """Later than any clock, so a wait ends with a signal only."""


@pytest.mark.usefixtures("handling")
def test_the_end_of_a_worker_by_a_signal_waits_for_the_signal_to_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SignalException):
        _signals.wait_for_same_signal([Ended(1), Ended(-signal.SIGTERM)])  # type: ignore[list-item]  # the attributes that it reads


@pytest.mark.usefixtures("handling")
@pytest.mark.parametrize(
    "ended",
    [
        Ended(1),
        Ended(0),
        Ended(None),
        Ended(-signal.SIGKILL),
        Ended(-signal.SIGSEGV),
        Ended(-signal.SIGTERM, stopped=True),
        Ended(-signal.SIGTERM, monotonic_ns=0),
    ],
)
def test_another_end_of_a_worker_waits_for_nothing(ended: Ended) -> None:
    _signals.wait_for_same_signal([ended])  # type: ignore[list-item]  # the attributes that it reads


def test_a_new_outermost_one_begins_with_nothing_received() -> None:
    for _ in range(2):
        with Handling("SIGTERM"):
            assert _signals.received() is None
            with pytest.raises(SignalException):
                signal.raise_signal(signal.SIGTERM)


def test_a_signal_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    passed: list[int] = []

    def receive(number: int) -> int:
        passed.append(number)
        return 1

    with Handling("SIGTERM", forward="SIGUSR1,SIGUSR2"):
        signal.raise_signal(signal.SIGUSR1)
        _signals.report()
        assert caplog.messages == ["SIGUSR1 was not forwarded: no worker is running"]
        inner = Handling("SIGTERM", receiver=receive)
        inner.install()
        signal.raise_signal(signal.SIGUSR2)
        inner.restore()
        _signals.report()
    assert passed == [signal.SIGUSR2]
    assert len(caplog.messages) == 1


def test_the_rest_is_ignored_and_reported_once() -> None:
    program = """if True:
        import logging, signal
        from ferroelastic import _signals
        logging.basicConfig(format="%(message)s")
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        former = _signals.ignore_the_rest("SIGTERM, SIGXCPU")
        assert signal.SIGTERM not in former and signal.SIGXCPU not in former and signal.SIGINT in former
        assert signal.SIGUSR2 not in former and signal.SIGCHLD not in former and signal.SIGSEGV not in former
        for _ in range(3):
            for number in former:
                signal.raise_signal(number)
        _signals.report()
        for number, disposition in former.items():
            signal.signal(number, disposition)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    names = [line.split(":")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert {"Ignored SIGUSR1", "Ignored SIGALRM", "Ignored SIGRTMIN", "Ignored SIGRTMIN+1"} <= set(names)
