"""The text that standard error has not accepted yet."""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

import ferroelastic._rust  # noqa: F401 - before it is loaded, writes block
from ferroelastic import _report
from ferroelastic._console import Console, stderr

if TYPE_CHECKING:
    import pytest

TEXT = "".join(f"line {number}\n" for number in range(5000))


def full_pipe() -> tuple[int, int, int]:
    """Return both ends of a full pipe, and the number of bytes in it."""
    reader, writer = os.pipe()
    # The size that a console requests.
    size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    assert os.write(writer, b"x" * size) == size
    return reader, writer, size


def test_a_slow_reader_gets_all_of_the_last_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of a failure, and the log lines before it."""
    reader, writer, size = full_pipe()
    found = []

    def read() -> None:
        while part := os.read(reader, 10_000):
            found.append(part)
            time.sleep(0.002)

    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        stderr().write("a line\n")
        slow = threading.Thread(target=read)
        slow.start()
        _report._print(TEXT)
    slow.join()
    os.close(reader)
    assert b"".join(found)[size:].decode() == f"a line\n{TEXT}\n"


def test_a_reader_that_is_stuck_is_given_up() -> None:
    reader, writer, size = full_pipe()
    with open(writer, "w") as stream:
        console = Console(stream)
        console.write(TEXT)
        assert not console.finish(0.01)
        assert os.read(reader, 2 * size) == b"x" * size
    os.close(reader)


def test_a_reader_that_is_gone_is_not_waited_for() -> None:
    reader, writer, _ = full_pipe()
    with open(writer, "w") as stream:
        console = Console(stream)
        console.write(TEXT)
        os.close(reader)
        assert console.finish(60.0)
    assert Console(None).finish(60.0), "a closed standard error"
