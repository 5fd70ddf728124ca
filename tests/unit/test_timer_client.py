"""The client of the named pipe, with a pipe that the test reads itself."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from select import PIPE_BUF
from typing import TYPE_CHECKING, Any

import pytest

from ferroelastic.timer import FileTimerClient, FileTimerRequest, _pipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Reader:
    """Stands for a server of this package: there is a page of heartbeats beside the pipe."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pipe"
        self.beats = folder / "pipe.beats"
        self.beats.touch()
        self._filler = -1
        self.appear()

    def appear(self) -> None:
        os.mkfifo(self.path)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def vanish(self) -> None:
        os.close(self.fd)
        self.path.unlink()

    def fill(self) -> None:
        """Make the pipe full, so that a line does not fit."""
        writer = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            while True:
                os.write(writer, b"\n" * PIPE_BUF)
        except BlockingIOError:
            pass
        finally:
            os.close(writer)

    def read(self) -> bytes:
        found = b""
        while True:
            try:
                chunk = os.read(self.fd, 1 << 20)
            except BlockingIOError:
                return found
            if not chunk:
                return found
            found += chunk

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.read().splitlines() if line]

    def scopes(self) -> list[tuple[str, bool]]:
        """Scopes of the requests since the last look, and whether they are armed."""
        return [(request["scope_id"], request["expiration_time"] >= 0) for request in self.requests()]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    os.close(reader.fd)


@pytest.fixture
def client(reader: Reader) -> Iterator[FileTimerClient]:
    client = FileTimerClient(str(reader.path))
    yield client
    client._pipe._close_fd()


def writers_of(path: Path) -> list[int]:
    """This process's descriptors that write to the pipe."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that the listing itself used
            if os.readlink(f"/proc/self/fd/{name}") == str(path):
                flags = Path(f"/proc/self/fdinfo/{name}").read_text().split("flags:")[1].split()[0]
                if int(flags, 8) & os.O_ACCMODE == os.O_WRONLY:
                    found.append(int(name))
    return found


def run(code: str, *arguments: str, **env: str) -> str:
    """Run code in a process of its own; return what it prints."""
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# ---- the wire format


def test_requests_are_lines_of_json(client: FileTimerClient, reader: Reader) -> None:
    client.acquire("train.py#42", 1700000000.25)
    client.release("train.py#42")
    common = {"version": 1, "pid": os.getpid(), "scope_id": "train.py#42"}
    assert reader.requests() == [
        {**common, "expiration_time": 1700000000.25, "signal": 9},
        {**common, "expiration_time": -1, "signal": 0},
    ]


@pytest.mark.parametrize("scope", ["plain", 'with "quotes" \\ and\nlines', "ünïcödé \N{SNOWMAN}\N{GRINNING FACE}", ""])
@pytest.mark.parametrize("time", [1e9, 0.1, 1700000000.123456789, 1e300, 5e-324, 3, 0, True, float("inf")])
@pytest.mark.parametrize("number", [signal.SIGKILL, 15, 0, -1])
def test_a_request_is_encoded_as_json(
    client: FileTimerClient, reader: Reader, scope: str, time: float, number: int
) -> None:
    client.signal = number
    client.acquire(scope, time)
    fields = {"version": 1, "pid": os.getpid(), "scope_id": scope, "expiration_time": time, "signal": number}
    assert reader.read().decode() == json.dumps(fields) + "\n"
    assert FileTimerRequest(os.getpid(), scope, time, number).to_json() == json.dumps(fields)


def test_not_a_number_is_written_as_json_does(client: FileTimerClient, reader: Reader) -> None:
    client.acquire("scope", float("nan"))
    assert b'"expiration_time": NaN,' in reader.read()


def test_a_request_that_does_not_fit_in_one_piece_is_an_error(client: FileTimerClient, reader: Reader) -> None:
    client.acquire("", 1.5)
    longest = PIPE_BUF - len(reader.read())
    client.acquire("x" * longest, 1.5)
    assert len(reader.read()) == PIPE_BUF
    with pytest.raises(RuntimeError, match=f"FileTimerRequest larger than {PIPE_BUF} bytes is not supported: "):
        client.acquire("x" * (longest + 1), 1.5)
    with pytest.raises(RuntimeError, match="larger than"):
        client.acquire("é" * (longest // 6 + 1), 1.5)  # six bytes each
    assert (client.unsent, reader.read()) == (0, b"")


# ---- the pipe


def test_the_pipe_is_opened_once_and_kept(reader: Reader) -> None:
    client = FileTimerClient(str(reader.path))
    assert writers_of(reader.path) == []
    client.acquire("a", 1.5)
    (descriptor,) = writers_of(reader.path)
    client.release("a")
    client.acquire("b", 1.5)
    assert writers_of(reader.path) == [descriptor]
    assert not os.get_blocking(descriptor)
    assert not os.get_inheritable(descriptor)
    del client
    assert writers_of(reader.path) == []


def test_for_torchs_server_the_pipe_is_opened_for_each_request(client: FileTimerClient, reader: Reader) -> None:
    """torch's server would wait for the end of the pipe, and see no deadline."""
    reader.beats.unlink()
    for scope in ("a", "b"):
        client.acquire(scope, 1.5)
        assert writers_of(reader.path) == []
    assert reader.scopes() == [("a", True), ("b", True)]


def test_a_full_pipe_keeps_the_newest_request_of_each_scope(client: FileTimerClient, reader: Reader) -> None:
    client.acquire("sent", 1.5)
    assert reader.scopes() == [("sent", True)]
    reader.fill()
    client.acquire("a", 1.5)
    client.acquire("b", 1.5)
    client.release("a")
    assert (client.unsent, client.delayed) == (2, 3)
    assert reader.scopes() == []
    client.release("sent")
    assert reader.scopes() == [("b", True), ("a", False), ("sent", False)]
    assert (client.unsent, client.delayed) == (0, 3)


def test_a_server_that_has_gone_is_no_error(client: FileTimerClient, reader: Reader) -> None:
    client.acquire("a", 1.5)
    reader.vanish()
    client.release("a")
    client.acquire("b", 1.5)
    assert client.unsent == 2
    reader.appear()
    client.acquire("c", 1.5)
    assert reader.scopes() == [("a", False), ("b", True), ("c", True)]
    assert client.unsent == 0


def test_a_server_that_was_replaced_gets_the_request_at_once(client: FileTimerClient, reader: Reader) -> None:
    client.acquire("a", 1.5)
    reader.vanish()
    reader.appear()
    client.release("a")
    assert (client.unsent, client.delayed) == (0, 0)
    assert reader.scopes() == [("a", False)]


def test_of_a_server_that_stays_away_so_much_is_kept(
    client: FileTimerClient, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pipe, "_MAX_UNSENT", 3)
    client.acquire("a", 1.5)
    reader.vanish()
    for number in range(5):
        client.acquire(str(number), 1.5)
    assert (client.unsent, client.delayed) == (3, 5)
    reader.appear()
    client.release("a")
    assert [scope for scope, _ in reader.scopes()] == ["3", "4", "a"]


def test_an_error_is_reported_once(client: FileTimerClient, reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    client.acquire("a", 1.5)
    reader.fill()
    for scope in "bcd":
        client.acquire(scope, 1.5)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        f"failed to send a request to the timer server at {reader.path} (the pipe is full): "
        "it is queued and sent before the next request"
    )


def test_a_descriptor_that_somebody_has_closed_is_opened_again(client: FileTimerClient, reader: Reader) -> None:
    client.acquire("a", 1.5)
    os.close(*writers_of(reader.path))
    client.release("a")
    assert reader.scopes() == [("a", True), ("a", False)]


def test_a_descriptor_that_has_come_to_be_another_is_not_closed(
    client: FileTimerClient, reader: Reader, tmp_path: Path
) -> None:
    client.acquire("a", 1.5)
    (descriptor,) = writers_of(reader.path)
    other = os.open(tmp_path / "other", os.O_CREAT | os.O_RDONLY)
    os.dup2(other, descriptor)
    client.release("a")  # EBADF: the other one is not for writing
    assert reader.scopes() == [("a", True), ("a", False)]
    assert os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path / "other")
    os.close(descriptor)
    os.close(other)


@pytest.mark.parametrize("call", [1, 2])
def test_a_write_that_was_cut_short_is_repeated_on_a_new_line(
    client: FileTimerClient, reader: Reader, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls: list[int] = []

    def write(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        return os.write(descriptor, data[: len(data) // 2] if len(calls) == call else data)

    monkeypatch.setattr(_pipe, "write", write)
    scopes = ["a", "b", "c"]
    for scope in scopes:
        client.acquire(scope, 1.5)
    lines = reader.read().decode().splitlines()
    whole = [json.loads(line)["scope_id"] for line in lines if line.endswith("}")]
    torn = [line for line in lines if not line.endswith("}")]
    assert whole == scopes
    assert len(torn) == 1
    assert client.unsent == 0


def test_threads_write_whole_lines(client: FileTimerClient, reader: Reader) -> None:
    def send(name: str) -> None:
        for number in range(50):
            client.acquire(f"{name}{number}", 1.5)

    threads = [threading.Thread(target=send, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reader.scopes()) == sorted((f"{name}{number}", True) for name in "abcd" for number in range(50))
    assert len(writers_of(reader.path)) == 1


def test_a_signal_handler_may_send_while_a_request_is_sent(
    client: FileTimerClient, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = iter([signal.SIGUSR1])

    def write(descriptor: int, data: bytes) -> int:
        for number in signals:
            signal.raise_signal(number)
        return os.write(descriptor, data)

    monkeypatch.setattr(_pipe, "write", write)
    signal.signal(signal.SIGUSR1, lambda *_: client.acquire("inner", 1.5))
    client.acquire("outer", 1.5)
    assert {scope for scope, _ in reader.scopes()} == {"inner", "outer"}
    assert client.unsent == 0


@pytest.mark.parametrize(
    "way", [lambda client: pickle.loads(pickle.dumps(client)), copy.copy, copy.deepcopy], ids=["pickle", "copy", "deep"]
)
def test_a_copy_opens_the_pipe_itself(
    client: FileTimerClient, reader: Reader, way: Callable[[FileTimerClient], FileTimerClient]
) -> None:
    client.signal = 15
    client.acquire("a", 1.5)
    again = way(client)
    again.acquire("b", 1.5)
    assert len(writers_of(reader.path)) == 2
    assert [request["signal"] for request in reader.requests()] == [15, 15]


# ---- no server


def opened(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> list[str]:
    """Paths that are opened, with a hook before each; and no time between tries."""
    paths: list[str] = []
    original = os.open

    def open_(path: Any, *arguments: Any) -> int:
        paths.append(str(path))
        before(len(paths))
        return original(path, *arguments)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(_pipe, "_CONNECT_RETRY_S", 0)
    return paths


def test_without_a_server_there_ever_was_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = opened(monkeypatch, lambda _: None)
    client = FileTimerClient(str(tmp_path / "nowhere"))
    message = "Could not send the FileTimerRequest because FileTimerServer is not available."
    with pytest.raises(BrokenPipeError, match=message) as raised:
        client.acquire("a", 1.5)
    assert isinstance(raised.value.__cause__, FileNotFoundError)
    assert len(tries) == 10
    with pytest.raises(BrokenPipeError, match=message):
        client.acquire("b", 1.5)
    assert len(tries) == 11  # it waits once
    assert client.unsent == 0


def test_a_server_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[Reader] = []

    def before(number: int) -> None:
        if number == 4:
            monkeypatch.undo()
            readers.append(Reader(tmp_path))

    opened(monkeypatch, before)
    FileTimerClient(str(tmp_path / "pipe")).acquire("a", 1.5)
    (reader,) = readers
    assert reader.scopes() == [("a", True)]
    os.close(reader.fd)


def test_a_file_that_is_no_pipe_is_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(monkeypatch, lambda _: None)
    (tmp_path / "file").touch()
    with pytest.raises(BrokenPipeError) as raised:
        FileTimerClient(str(tmp_path / "file")).acquire("a", 1.5)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.EINVAL
    assert (tmp_path / "file").read_bytes() == b""


# ---- after a fork


FORK = """
import os, sys
from ferroelastic.timer import FileTimerClient
client = FileTimerClient(sys.argv[1])
client.acquire("of the parent", 1.5)
if sys.argv[2] == "full":
    writer = os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
    try:
        while True:
            os.write(writer, b"\\n" * 4096)
    except BlockingIOError:
        os.close(writer)
    client.acquire("unsent", 1.5)
    assert client.unsent == 1

def writers():
    links = {int(name): f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")}
    return {fd for fd, link in links.items() if os.path.exists(link) and os.readlink(link) == sys.argv[1]}

before = writers()
child = os.fork()
if child == 0:
    client.acquire("of the child", 1.5)
    assert client.unsent == (sys.argv[2] == "full")
    assert len(writers()) == 1, writers()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0
assert writers() == before
print(os.getpid(), child)
"""


def test_a_forked_process_opens_the_pipe_itself(reader: Reader) -> None:
    parent, child = map(int, run(FORK, str(reader.path), "empty").split())
    found = [(request["pid"], request["scope_id"]) for request in reader.requests()]
    assert found == [(parent, "of the parent"), (child, "of the child")]


def test_a_forked_process_does_not_send_queued_requests_of_its_parent(reader: Reader) -> None:
    run(FORK, str(reader.path), "full")


def test_a_forked_process_whose_server_has_gone_does_not_wait(client: FileTimerClient, reader: Reader) -> None:
    client.acquire("a", 1.5)
    reader.vanish()
    client._pipe._pid = 0  # as after a fork
    client.acquire("b", 1.5)
    assert client.unsent == 1
    reader.appear()


# ---- the dump of stacks


DUMP = """
import faulthandler, os, signal, sys
from pathlib import Path
from ferroelastic.timer import FileTimerClient
from ferroelastic.timer._stacks import STACKS_SIGNAL

def file_of(pid):
    return Path(sys.argv[1], f"stacks.{pid}.txt")

def where_it_is():
    os.kill(os.getpid(), STACKS_SIGNAL)

FileTimerClient("/nowhere")
FileTimerClient("/nowhere")
client = FileTimerClient("/nowhere")
where_it_is()
assert file_of(os.getpid()).read_text().count("Current thread") == 1
assert "in where_it_is" in file_of(os.getpid()).read_text()
child = os.fork()
if child == 0:
    FileTimerClient("/nowhere")
    where_it_is()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert "in where_it_is" in file_of(child).read_text()
assert file_of(os.getpid()).read_text().count("Current thread") == 1
where_it_is()
assert file_of(os.getpid()).read_text().count("Current thread") == 2
"""


def test_a_client_arms_a_dump_of_the_stacks_in_each_process(tmp_path: Path) -> None:
    run(DUMP, str(tmp_path), TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))


NO_DUMP = """
import ctypes, os, signal, sys
from ferroelastic.timer import FileTimerClient
from ferroelastic.timer._stacks import STACKS_SIGNAL
handler = {"ignored": signal.SIG_IGN, "handled": lambda *_: None}.get(sys.argv[1])
if handler is not None:
    signal.signal(STACKS_SIGNAL, handler)
if sys.argv[1] == "handled in C":
    ctypes.CDLL(None).signal(STACKS_SIGNAL, ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None))
FileTimerClient("/nowhere")
if handler is not None:
    assert signal.getsignal(STACKS_SIGNAL) == handler
print(*os.listdir(sys.argv[2]))
"""


@pytest.mark.parametrize("how", ["ignored", "handled", "handled in C"])
def test_a_signal_that_has_a_use_is_left_alone(tmp_path: Path, how: str) -> None:
    assert run(NO_DUMP, how, str(tmp_path), TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json")).split() == []


@pytest.mark.parametrize("error_file", ["", "/nowhere/error.json", "/dev/null/error.json"])
def test_without_a_place_for_it_no_dump_is_armed(tmp_path: Path, error_file: str) -> None:
    assert run(NO_DUMP, "", str(tmp_path), TORCHELASTIC_ERROR_FILE=error_file).split() == []
