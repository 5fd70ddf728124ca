"""Signals to a process that waits for a context or closes it."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance.contexts import finished
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conformance.implementations import Implementation
    from tests.support.waiting import WhenWaiting


@pytest.mark.needs("signals-to-handle")
@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}),
        ("SIGUSR1", {"SIGUSR1"}),
        ("SIGUSR2, SIGTERM", {"SIGUSR2", "SIGTERM"}),
        ("SIGNONSENSE,SIGUSR1", {"SIGUSR1"}),
    ],
)
def test_which_signals_are_handled(
    impl: Implementation,
    shell: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    expected: set[str],
) -> None:
    if variable is not None:
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", variable)
    watched = [getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2")]
    before = {number: signal.getsignal(number) for number in watched}

    def changed() -> set[str]:
        return {number.name for number in watched if signal.getsignal(number) is not before[number]}

    context = shell("exit 0")
    assert changed() == expected
    finished(context)
    assert changed() == impl.expect("handlers-are-restored", torch=expected, ours=set())


def test_a_signal_raises_while_waiting(impl: Implementation, shell: Callable[..., Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    context = shell(f"read line < {tmp_path}/go; kill -TERM {os.getpid()}; exec sleep 1000")
    with pytest.raises(impl.mp.SignalException, match=rf"^Process {os.getpid()} got signal: ") as raised:
        tell_and_wait(context, tmp_path / "go")
    assert raised.value.sigval is signal.SIGTERM
    context.close(raised.value.sigval, 30)
    assert context.subprocess_handlers[0].proc.poll() == -signal.SIGTERM


def test_a_signal_while_closing(
    impl: Implementation, shell: Callable[..., Any], tmp_path: Path, when_waiting: WhenWaiting
) -> None:
    """The worker saves when it is told to end, and has the time to."""
    os.mkfifo(tmp_path / "ready")
    script = f"trap 'sleep 0.5; : > {tmp_path}/saved; exit 0' TERM; : > {tmp_path}/ready; while :; do sleep 0.01; done"
    context = shell(script)
    (tmp_path / "ready").read_text()
    when_waiting(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(impl.mp.SignalException):
        context.close(signal.SIGTERM, 30)
    was_saved = (tmp_path / "saved").exists()
    assert was_saved == impl.expect("signal-in-a-stop", torch=False, ours=True)
    context.close(signal.SIGTERM, 30)


def test_a_process_left_by_a_worker_that_succeeded_may_finish(
    impl: Implementation, shell: Callable[..., Any], tmp_path: Path
) -> None:
    """It is done before the result is there; torch does not wait for it."""
    os.mkfifo(tmp_path / "go")
    context = shell(f"(read line < {tmp_path}/go; sleep 0.3; : > {tmp_path}/saved) & exit 0")
    thread = threading.Thread(target=(tmp_path / "go").write_text, args=("\n",))
    thread.start()
    assert not finished(context).is_failed()
    was_saved = (tmp_path / "saved").exists()
    thread.join()
    assert was_saved == impl.expect("success-leaves-time", torch=False, ours=True)
    assert eventually((tmp_path / "saved").exists)


def tell_and_wait(context: Any, fifo: Path) -> None:
    fifo.write_text("\n")
    context.wait(60, period=0.01)


def test_nohup(impl: Implementation, shell: Callable[..., Any]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    finished(shell("exit 0"))
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert is_ignored == impl.expect("nohup", torch=False, ours=True)


def test_on_another_thread_signals_stay(shell: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    results = []
    thread = threading.Thread(target=lambda: results.append(finished(shell("exit 0"))))
    thread.start()
    thread.join(60)
    assert not results[0].is_failed()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "running on a child thread" in caplog.text
