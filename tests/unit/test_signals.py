from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from ferroelastic.multiprocessing._signals import (
    SignalException,
    _terminate_process_handler,
    install_signal_handlers,
)


def test_a_named_signal_raises() -> None:
    install_signal_handlers("SIGTERM, SIGUSR1,")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with pytest.raises(SignalException, match=f"Process {os.getpid()} got signal: ") as caught:
            signal.raise_signal(number)
        assert caught.value.sigval == number
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


@pytest.mark.parametrize("name", ["SIGNOSUCH", "SIG_DFL", "alarm", "SIGKILL"])
def test_what_cannot_be_handled_is_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    install_signal_handlers(f"{name},SIGTERM")
    assert f"Failed to register signal handler for {name}" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is _terminate_process_handler


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    install_signal_handlers("SIGHUP")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    install_signal_handlers("SIGHUP")
    assert signal.getsignal(signal.SIGHUP) is _terminate_process_handler


def test_a_process_under_nohup_ignores_sighup() -> None:
    program = (
        "import signal; from ferroelastic.multiprocessing._signals import install_signal_handlers\n"
        "install_signal_handlers('SIGHUP'); signal.raise_signal(signal.SIGHUP); print('alive')"
    )
    done = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_another_thread_warns_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=install_signal_handlers, args=("SIGTERM",))
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join()
    assert "child thread" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
