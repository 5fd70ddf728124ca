"""A log file on a disk that does not respond stops no supervision, and no end of a job."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.support.waiting import eventually

from ferroelastic._engine import get_engine
from ferroelastic._rust import Command, LogRules

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.engine
TIMEOUT_S = 60.0


@contextmanager
def blocking_file(path: Path) -> Iterator[int]:
    """A file whose opening blocks until the end of the context: it has a lease (``F_SETLEASE``), which the kernel asks back."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    # The notice to give the lease back has no effect. The default, SIGIO, would end the process.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_opening(descriptor: int) -> bool:
    """Whether a thread waits for the lease."""
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_WRLCK


def test_supervision_goes_on_and_the_ends_of_tees_and_searches_have_timeouts(tmp_path: Path) -> None:
    engine = get_engine()
    console_read, console_write = os.pipe()
    log = tmp_path / "log"
    tail = engine.tail([(str(log), "> ")], console_fd=console_write)
    worker = engine.spawn([Command(["/bin/sleep", "60"], {})])
    scan = worker.scan_logs([(str(log), 0, "stdout of rank 0")], LogRules(fail=[("never", "never")]))
    opened = []
    with blocking_file(tmp_path / "blocking") as lease:
        path = str(tmp_path / "blocking")
        opener = threading.Thread(target=lambda: opened.append(engine.tail([(path, "")], console_fd=console_write)))
        opener.start()
        assert eventually(lambda: is_opening(lease))
        log.write_text("a line\n")

        other = engine.spawn([Command(["/bin/sh", "-c", "exit 7"], {})])
        assert other.wait(0, TIMEOUT_S) == "event"
        assert [ended.code for ended in other.exits()] == [7]
        worker.stop(signal.SIGTERM, TIMEOUT_S, TIMEOUT_S)
        assert eventually(lambda: worker.stop_report() is not None)
        assert [ended.signal for ended in worker.exits()] == [signal.SIGTERM]

        for _ in range(2):
            report = tail.finish(0.0)
            assert (report.lines, report.unread) == (0, [(str(log), "the disk has not responded for 2 s")])
        assert not scan.finish(0.1)
    opener.join(TIMEOUT_S)
    assert not opener.is_alive()
    # The thread counts as stuck until the end of its turn, which is after the reply to the opener.
    assert eventually(lambda: tail.finish(TIMEOUT_S).unread == [])
    assert tail.finish(TIMEOUT_S).lines == 1
    assert scan.finish(TIMEOUT_S)
    opened[0].finish(TIMEOUT_S)
    assert os.read(console_read, 100) == b"> a line\n"
    os.close(console_read)
    os.close(console_write)
