"""The event handler ``jsonl``: whole lines in a file, and no harm from a file that takes none."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ferroelastic.events import Event, EventSource, _jsonl, handlers, record
from ferroelastic.events._jsonl import EVENT_FILE_ENV, JsonLinesHandler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ferroelastic._rust")


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[JsonLinesHandler]:
    monkeypatch.delenv(EVENT_FILE_ENV, raising=False)
    made = JsonLinesHandler()
    yield made
    made.finish()


def put(handler: JsonLinesHandler, *texts: str) -> None:
    for text in texts:
        handler.emit(logging.LogRecord("n", logging.INFO, "", 0, text, None, None))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_early_events_wait_for_the_folder(handler: JsonLinesHandler, tmp_path: Path) -> None:
    before = time.time_ns()
    put(handler, '{"n": 1}', '{"n": 2}')
    handler.use_folder(None)
    handler.use_folder(str(tmp_path))
    put(handler, '{"n": 3}')
    handler.use_folder("/nowhere")  # the first folder counts
    handler.finish()
    found = lines(tmp_path / "events.jsonl")
    assert [one["n"] for one in found] == [1, 2, 3]
    assert all(before <= one["time_ns"] <= time.time_ns() for one in found)


def test_a_folder_that_is_known_before_the_first_event(handler: JsonLinesHandler, tmp_path: Path) -> None:
    handler.use_folder(str(tmp_path))
    assert not (tmp_path / "events.jsonl").exists()
    put(handler, '{"n": 1}')
    handler.finish()
    assert [one["n"] for one in lines(tmp_path / "events.jsonl")] == [1]
    handler.use_folder(str(tmp_path / "next"))
    assert handler._folder == str(tmp_path / "next"), "the next run has a folder of its own"


def test_the_variable_names_the_file_and_events_are_appended(
    handler: JsonLinesHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine"
    file.write_text('{"former": 1}\n')
    monkeypatch.setenv(EVENT_FILE_ENV, str(file))
    put(handler, '{"text": "ä\udcff"}', "a\nb")
    handler.use_folder(str(tmp_path))
    handler.finish()
    put(handler, '{"later": 1}')
    handler.finish()
    first, second, third, fourth = file.read_text().splitlines()
    assert (first, third) == ('{"former": 1}', "a b")
    assert second.endswith('"text": "ä\\udcff"}')
    assert "later" in fourth
    assert not (tmp_path / "events.jsonl").exists()


def test_without_a_folder_the_loss_is_reported(handler: JsonLinesHandler, caplog: pytest.LogCaptureFixture) -> None:
    put(handler, '{"n": 1}')
    handler.finish()
    assert caplog.messages == [
        "1 events were not written: the run has no log folder. Set FERROELASTIC_EVENT_FILE",
    ]
    handler.finish()
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/dev/full", "No space left on device"),
        ("/nonexistent/events", "No such file or directory"),
        ("{folder}", "Is a directory"),
        ("{folder}/pipe", "No such device or address"),
    ],
)
def test_a_file_that_takes_nothing_is_reported_once(
    handler: JsonLinesHandler,
    path: str,
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = path.format(folder=tmp_path)
    monkeypatch.setenv(EVENT_FILE_ENV, path)
    put(handler, *['{"n": 1}'] * 3)
    handler.finish()
    first, last = caplog.messages
    assert first.startswith(f"Failed to write an event to {path}: ")
    assert error in first
    assert last == f"3 events were not written to {path}"


def test_a_line_after_a_torn_one_is_whole(
    handler: JsonLinesHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "events"
    monkeypatch.setenv(EVENT_FILE_ENV, str(file))
    write, calls = os.write, []

    def full_for_a_moment(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 1:
            return write(descriptor, data[:5])
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr("os.write", full_for_a_moment)
    put(handler, '{"n": 1}', '{"n": 2}')
    handler.finish()
    _, last = file.read_text().splitlines()
    assert json.loads(last)["n"] == 2


def test_a_disk_that_hangs_delays_neither_an_event_nor_the_end_by_much(
    handler: JsonLinesHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(EVENT_FILE_ENV, str(tmp_path / "events"))
    released = threading.Event()
    opened = os.open

    def hang(*arguments: Any) -> int:
        released.wait()
        return opened(*arguments)

    monkeypatch.setattr("os.open", hang)
    monkeypatch.setattr(_jsonl, "_MAX_PENDING_BYTES", 1000)
    start = time.monotonic()
    put(handler, *['{"n": 1}'] * 1000)
    writer = handler._writer
    handler.finish()
    assert time.monotonic() - start < 5
    released.set()
    assert writer is not None
    writer._thread.join()
    assert any("does not take data" in message for message in caplog.messages)
    assert 0 < len(lines(tmp_path / "events")) < 1000
    assert writer.lost == 1000 - len(lines(tmp_path / "events"))


def test_the_handler_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVENT_FILE_ENV, str(tmp_path / "events"))
    record(Event("name", EventSource.AGENT, metadata={"n": 1}), "jsonl")
    handlers.finish()
    (line,) = lines(tmp_path / "events")
    assert (line["name"], line["source"], line["metadata"]) == ("name", "AGENT", {"n": 1})
    del line["time_ns"]
    assert Event.deserialize(json.dumps(line)).name == "name"
