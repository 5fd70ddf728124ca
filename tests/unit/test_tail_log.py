from __future__ import annotations

import gzip
import io
import os
import sys
import threading
from typing import IO, TYPE_CHECKING

import pytest

from ferroelastic.multiprocessing.tail_log import TailLog, _descriptor, tail_logfile

pytest.importorskip("ferroelastic._rust")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Console(io.StringIO):
    """A stream without descriptor whose content can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._grown = threading.Condition()

    def write(self, text: str) -> int:
        with self._grown:
            self._grown.notify_all()
            return super().write(text)

    def wait_for(self, text: str) -> None:
        with self._grown:
            assert self._grown.wait_for(lambda: text in self.getvalue(), 10)


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_lines_of_all_files_arrive_with_their_headers(tmp_path: Path) -> None:
    files = {rank: str(tmp_path / f"{rank}.log") for rank in range(3)}
    console = Console()
    tail = TailLog("writer", files, console).start()
    assert not tail.stopped()
    for number in range(100):
        for rank in files:
            append(tmp_path / f"{rank}.log", f"{number}\n")
    tail.stop()
    assert tail.stopped()
    lines = console.getvalue().splitlines()
    for rank in files:
        header = f"[writer{rank}]:"
        assert [line for line in lines if line.startswith(header)] == [f"{header}{number}" for number in range(100)]


def test_lines_show_while_the_file_grows(tmp_path: Path) -> None:
    console = Console()
    tail = TailLog("t", {0: str(tmp_path / "log")}, console).start()
    append(tmp_path / "log", "first\n")
    console.wait_for("[t0]:first\n")
    append(tmp_path / "log", "second\n")
    console.wait_for("[t0]:second\n")
    tail.stop()


@pytest.mark.parametrize("native", [True, False])
def test_headers_can_be_given(tmp_path: Path, native: bool) -> None:
    append(tmp_path / "log", "x: y\nlast")
    with (tmp_path / "console").open("w+") if native else Console() as console:
        TailLog("t", {0: str(tmp_path / "log"), 5: str(tmp_path / "log")}, console, {5: "<5> "}).start().stop()
        console.seek(0)
        assert sorted(console) == ["<5> last\n", "<5> x: y\n", "[t0]:last\n", "[t0]:x: y\n"]


def test_a_file_is_written_to_natively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path / "log", "one\n")
    with (tmp_path / "console").open("w") as console:
        console.write("before\n")
        monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("no thread is needed"))
        TailLog("t", {0: str(tmp_path / "log")}, console).start().stop()
        console.write("after\n")
    assert (tmp_path / "console").read_text() == "before\n[t0]:one\nafter\n"


@pytest.mark.parametrize("native", [True, False])
def test_strings_filter_natively(tmp_path: Path, native: bool) -> None:
    append(tmp_path / "log", "apple\nplum\npear\n")
    with (tmp_path / "console").open("w+") if native else Console() as console:
        files = {0: str(tmp_path / "log")}
        TailLog("p", files, console, only_lines_with=["apple", "pear"]).start().stop()
        console.seek(0)
        assert console.read() == "[p0]:apple\n[p0]:pear\n"


def test_a_function_filters_lines_without_their_header(tmp_path: Path) -> None:
    append(tmp_path / "log", "1\n2\n12\n")
    seen: list[str] = []

    def keep(line: str) -> bool:
        seen.append(line)
        return "2" in line

    console = Console()
    TailLog("w2", {0: str(tmp_path / "log")}, console, log_line_filter=keep).start().stop()
    assert seen == ["1\n", "2\n", "12\n"]
    assert console.getvalue() == "[w20]:2\n[w20]:12\n"


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes("grüß \xff".encode("latin-1") + "Gott 😀\n".encode())
    console = Console()
    TailLog("", {0: str(tmp_path / "log")}, console, {0: ""}).start().stop()
    assert console.getvalue() == "gr\ufffd\ufffd \ufffdGott 😀\n"


def test_more_than_a_pipe_holds_arrives_whole(tmp_path: Path) -> None:
    lines = [f"{number:07}" * 20 for number in range(20_000)]
    append(tmp_path / "log", "\n".join(lines))
    console = Console()
    TailLog("", {0: str(tmp_path / "log")}, console, {0: ""}).start().stop()
    assert console.getvalue().splitlines() == lines


def test_a_stream_that_raises_does_not_hold_anything_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError("no space left on device")

    append(tmp_path / "log", "x" * 200_000 + "\n" + "y\n" * 200_000)
    tail = TailLog("t", {0: str(tmp_path / "log")}, Broken()).start()
    tail.stop()
    assert tail.stopped()
    assert "failed to copy log lines" in caplog.text


def test_a_stream_with_nothing_but_write_will_do(tmp_path: Path) -> None:
    class Least:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

    append(tmp_path / "log", "x\n")
    least = Least()
    TailLog("t", {0: str(tmp_path / "log")}, least).start().stop()  # type: ignore[arg-type]  # what people pass
    assert least.text == "[t0]:x\n"


def test_no_files_and_no_console() -> None:
    for tail in (TailLog("t", {}, sys.stdout).start(), TailLog("t", {0: "unused.log"}, None).start()):
        assert not tail.stopped()
        tail.stop()
        assert tail.stopped()
    assert not os.path.exists("unused.log")


def test_stop_without_start_and_twice(tmp_path: Path) -> None:
    never = TailLog("t", {0: str(tmp_path / "log")}, Console())
    never.stop()
    assert never.stopped()
    assert never._threadpool is not None
    assert never._threadpool._shutdown
    twice = TailLog("t", {0: str(tmp_path / "log")}, Console()).start()
    twice.stop()
    twice.stop()


def test_the_null_device_is_not_followed() -> None:
    tail = TailLog("t", {0: os.devnull}, Console()).start()
    assert tail._tail is None
    tail.stop()


def test_a_folder_instead_of_a_file_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for console in (Console(), sys.__stdout__):
        caplog.clear()
        tail = TailLog("t", {0: str(tmp_path)}, console).start()
        tail.stop()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "Is a directory" in caplog.text


def _of_gzip(tmp_path: Path) -> IO[str]:
    return gzip.open(tmp_path / "x.gz", "wt")


@pytest.mark.parametrize(
    ("make", "native"),
    [
        (lambda path: (path / "x").open("w"), True),
        (lambda path: (path / "x").open("w", buffering=1), True),
        (_of_gzip, False),
        (lambda _: io.StringIO(), False),
        (lambda _: io.TextIOWrapper(io.BytesIO()), False),
    ],
)
def test_only_plain_streams_are_written_to_past_python(
    tmp_path: Path, make: Callable[[Path], IO[str]], native: bool
) -> None:
    with make(tmp_path) as stream:
        assert (_descriptor(stream) is not None) == native  # type: ignore[arg-type]  # IO[str] is TextIO in all but name


@pytest.mark.parametrize("line_filter", [None, lambda line: "o" in line])
def test_tail_logfile_follows_until_finished(tmp_path: Path, line_filter: Callable[[str], bool] | None) -> None:
    finished, console = threading.Event(), Console()
    args = ("head ", str(tmp_path / "log"), console, finished, 0.1, line_filter)
    thread = threading.Thread(target=tail_logfile, args=args)
    thread.start()
    append(tmp_path / "log", "one\n")
    console.wait_for("head one\n")
    append(tmp_path / "log", "two\n")
    finished.set()
    thread.join(10)
    assert not thread.is_alive()
    assert console.getvalue() == "head one\nhead two\n"


def test_tail_logfile_of_a_file_that_never_came(tmp_path: Path) -> None:
    finished = threading.Event()
    finished.set()
    tail_logfile("", str(tmp_path / "log"), Console(), finished, 0.1)
    assert list(tmp_path.iterdir()) == []
