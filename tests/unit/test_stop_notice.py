"""The deadline of a stop, as the code of a worker reads it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import ferroelastic
from ferroelastic import StopNotice, stop_deadline
from ferroelastic._stop_notice import STOP_FILE_ENV

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Memory:
    """A file as that of the agent."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ferroelastic-stop")
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"

    def add(self, text: str) -> None:
        os.write(self.fd, text.encode())


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    made = Memory()
    monkeypatch.setenv(STOP_FILE_ENV, made.path)
    yield made
    os.close(made.fd)


def line(**fields: Any) -> str:
    deadline_ns = time.monotonic_ns() + 5_000_000_000
    known = {"version": 1, "reason": "signal", "signal": 15, "deadline_s": 1.5, "deadline_monotonic_ns": deadline_ns}
    return json.dumps({**known, **fields}) + "\n"


def test_without_an_agent_there_is_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STOP_FILE_ENV, raising=False)
    assert stop_deadline() is None
    monkeypatch.setenv(STOP_FILE_ENV, "")
    assert stop_deadline() is None
    monkeypatch.setenv(STOP_FILE_ENV, "/proc/1/fd/12345")
    assert stop_deadline() is None


def test_an_empty_file_is_no_stop(memory: Memory) -> None:
    assert stop_deadline() is None
    memory.add(line())
    notice = stop_deadline()
    assert notice is not None
    assert (notice.reason, notice.signal, notice.deadline_s) == ("signal", signal.SIGTERM, 1.5)
    assert isinstance(notice.signal, signal.Signals)
    assert 4 < notice.remaining_s() <= 5


def test_the_last_whole_line_counts(memory: Memory) -> None:
    memory.add(line(reason="failure"))
    memory.add(line(reason="membership", deadline_monotonic_ns=1) + line()[:-1])
    notice = stop_deadline()
    assert notice is not None
    assert (notice.reason, notice.remaining_s()) == ("membership", 0)


def test_a_stop_without_a_deadline(memory: Memory) -> None:
    memory.add(line(deadline_s=None, deadline_monotonic_ns=None, signal=63, further="field"))
    assert stop_deadline() == StopNotice("signal", 63, None, None)
    notice = stop_deadline()
    assert notice is not None
    assert notice.remaining_s() == float("inf")


@pytest.mark.parametrize(
    "text", ["\n", "{}\n", "[]\n", "nonsense\n", '{"signal": "x"}\n', "\x00" * 10 + "\n", "\xff\n"]
)
def test_other_content_is_no_stop(memory: Memory, text: str) -> None:
    memory.add(text)
    assert stop_deadline() is None
    memory.add(line())
    assert stop_deadline() is not None


def test_a_reused_number_is_neither_read_nor_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, line().encode())
    monkeypatch.setenv(STOP_FILE_ENV, f"/proc/{os.getpid()}/fd/{reader}")
    assert stop_deadline() is None
    assert os.read(reader, 1 << 16).startswith(b'{"version"')
    assert stop_deadline() is None  # does not wait for data
    os.close(reader)
    os.close(writer)
    file = tmp_path / "file"
    file.write_text(line())
    monkeypatch.setenv(STOP_FILE_ENV, str(file))
    assert stop_deadline() is None


def test_the_import_is_light() -> None:
    program = """
import sys
before = set(sys.modules)
from ferroelastic import stop_deadline
assert stop_deadline() is None
print(*sorted(name for name in set(sys.modules) - before if not name.startswith(("json", "_json", "collections", "re", "_"))))
"""
    env = {name: value for name, value in os.environ.items() if name != STOP_FILE_ENV}
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=env).stdout
    heavy = {"torch", "asyncio", "logging", "subprocess", "multiprocessing", "ferroelastic._rust", "argparse"}
    assert not heavy & set(loaded.split()), loaded


def test_the_names_are_those_of_the_package() -> None:
    assert {"StopNotice", "stop_deadline"} <= set(ferroelastic.__all__)
    assert ferroelastic.stop_deadline is stop_deadline
