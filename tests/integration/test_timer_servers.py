"""The server of timers with real processes: ours, and those of torch on either side."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.forking import fork
from tests.support.waiting import eventually

pytest.importorskip("ferroelastic._rust")

from ferroelastic import timer
from ferroelastic._rust import ForkedError
from ferroelastic.timer import FileTimerClient, FileTimerRequest, FileTimerServer, file_based_local_timer

pytestmark = pytest.mark.engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LONG_S = 60.0

# A process that sets itself a deadline of so many seconds, and hangs.
HANG = """
import os, sys, time
from {package} import timer
client = timer.FileTimerClient(sys.argv[1], int(sys.argv[3]))
client.acquire("hang", time.time() + float(sys.argv[2]))
print("set", flush=True)
time.sleep(1000)
"""


class Events:
    """What a server tells of itself; ``wait`` waits for one of that name."""

    def __init__(self) -> None:
        self.all: list[tuple[str, FileTimerRequest | None]] = []
        self.news = threading.Condition()

    def __call__(self, name: str, request: FileTimerRequest | None) -> None:
        with self.news:
            self.all.append((name, request))
            self.news.notify_all()

    def wait(self, name: str) -> FileTimerRequest | None:
        with self.news:
            assert self.news.wait_for(lambda: name in self.names, LONG_S), self.names
            return next(request for found, request in self.all if found == name)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.all]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "pipe")


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def serve(path: str, events: Events) -> Iterator[Callable[..., FileTimerServer]]:
    """Makes a server that does not signal this process, and starts it."""
    servers: list[FileTimerServer] = []

    def build(*, start: bool = True, **options: Any) -> FileTimerServer:
        servers.append(FileTimerServer(path, "the-run", **{"log_event": events, "reap_server": False, **options}))
        if start:
            servers[-1].start()
        return servers[-1]

    yield build
    while servers:
        servers.pop().stop()


@pytest.fixture
def hang(path: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process with a timer, and waits until that is set."""
    processes: list[subprocess.Popen[str]] = []

    def start(
        after_s: float = 0.0, number: int = signal.SIGKILL, package: str = "ferroelastic", code: str = HANG, **env: str
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code.replace("{package}", package), path, str(after_s), str(int(number))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() in {"set", ""}  # nothing, where the deadline came first
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def send(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.write(descriptor, data)
    os.close(descriptor)


# ---- expiry


def test_a_process_that_misses_its_deadline_is_ended(
    serve: Callable[..., FileTimerServer], hang: Callable[..., subprocess.Popen[str]], events: Events
) -> None:
    server = serve()
    process = hang(0.2)
    assert process.wait(LONG_S) == -signal.SIGKILL
    request = events.wait("kill worker process")
    assert request is not None
    assert (request.worker_pid, request.scope_id, request.signal) == (process.pid, "hang", signal.SIGKILL)
    assert events.names == ["watchdog started", "timer expired", "kill worker process"]
    expiry = server.expiry(process.pid)
    assert expiry is not None
    assert (expiry.scope, expiry.outcome, expiry.expiration_time) == ("hang", "signalled", request.expiration_time)
    assert server._timers == {}
    server.stop()
    assert events.names[-1] == "watchdog stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_signal_is_the_clients(
    serve: Callable[..., FileTimerServer], hang: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    serve()
    assert hang(0.1, number).wait(LONG_S) == -number


def test_without_a_signal_an_expiry_is_only_reported(
    serve: Callable[..., FileTimerServer], hang: Callable[..., subprocess.Popen[str]], events: Events
) -> None:
    server = serve()
    process = hang(0, 0)
    events.wait("timer expired")
    server.stop()
    assert "kill worker process" not in events.names
    assert process.poll() is None


def test_several_timers_of_a_process_are_one_end(
    serve: Callable[..., FileTimerServer], events: Events, hang: Callable[..., subprocess.Popen[str]]
) -> None:
    """The earliest with a signal counts, as in torch."""
    server = serve(start=False)
    now = time.time()
    process = hang(1000)
    server.register_timers(
        [
            FileTimerRequest(process.pid, "later", now - 1, signal.SIGKILL),
            FileTimerRequest(process.pid, "without", now - 3, 0),
            FileTimerRequest(process.pid, "earlier", now - 2, signal.SIGTERM),
        ]
    )
    server.start()
    assert process.wait(LONG_S) == -signal.SIGTERM
    request = events.wait("kill worker process")
    assert request is not None
    assert request.scope_id == "earlier"
    told = [request.scope_id for name, request in events.all if name == "timer expired" and request is not None]
    assert told == ["without", "earlier"]


def test_the_debug_hook_is_looked_up_where_programs_replace_it(
    serve: Callable[..., FileTimerServer], hang: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, dict[int, list[str]]]] = []
    monkeypatch.setattr(file_based_local_timer, "log_debug_info_for_expired_timers", lambda *args: seen.append(args))
    server = serve()
    process = hang()
    process.wait(LONG_S)
    server.stop()
    ((run_id, expired),) = seen
    assert run_id == "the-run"
    assert [json.loads(text)["scope_id"] for text in expired[process.pid]] == ["hang"]


def test_a_hook_that_fails_does_not_end_the_watchdog(
    serve: Callable[..., FileTimerServer],
    hang: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    events: Events,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    monkeypatch.setattr(file_based_local_timer, "log_debug_info_for_expired_timers", fail)
    serve()
    assert [hang().wait(LONG_S), hang().wait(LONG_S)] == [-signal.SIGKILL] * 2
    events.wait("kill worker process")  # of the second
    assert "Error running watchdog" in caplog.text
    caplog.clear()  # what it holds refers to the server


def test_the_server_may_be_stopped_by_its_own_event(path: str, hang: Callable[..., subprocess.Popen[str]]) -> None:
    def on_event(name: str, _: FileTimerRequest | None) -> None:
        if name == "kill worker process":
            server.stop()

    server = FileTimerServer(path, "r", log_event=on_event, reap_server=False)
    server.start()
    thread = server._watchdog_thread
    assert thread is not None
    hang()
    thread.join(LONG_S)
    assert not thread.is_alive()
    assert not os.path.exists(path)


ALONE = """
import sys, time
from ferroelastic.timer import FileTimerServer
server = FileTimerServer(sys.argv[1], "r", **eval(sys.argv[2]))
server.start()
print("serves", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_standing_alone_it_signals_its_own_process_too(path: str, number: signal.Signals) -> None:
    """The worker is a child of the server's process, whose timers another one may ask for."""
    code = (
        "import os, subprocess, sys, time\n"
        "from ferroelastic.timer import FileTimerClient, FileTimerRequest, FileTimerServer\n"
        "FileTimerServer(sys.argv[1], 'r').start()\n"
        "worker = subprocess.Popen(['sleep', '1000'])\n"
        "print(worker.pid, flush=True)\n"
        "client = FileTimerClient(sys.argv[1])\n"
        "client._send_request(FileTimerRequest(worker.pid, 'scope', time.time(), int(sys.argv[2])))\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, path, str(int(number))], stdout=subprocess.PIPE) as server:
        assert server.wait(LONG_S) == -number
        assert server.stdout is not None
        worker = int(server.stdout.read())
    assert eventually(lambda: not FileTimerServer.is_process_running(worker))


# ---- what a server is asked


def test_timers_are_registered_released_and_cleared(serve: Callable[..., FileTimerServer]) -> None:
    server = serve()
    assert server.get_last_progress_time() <= time.time()
    assert not server._is_client_started
    later = time.time() + 1000
    mine = [FileTimerRequest(os.getpid(), scope, later + number, 9) for number, scope in enumerate("abc")]
    server.register_timers([*mine, FileTimerRequest(os.getppid(), "theirs", later, 9)])
    server.register_timers([FileTimerRequest(os.getpid(), "c", -1), FileTimerRequest(os.getpid(), "none", -1)])
    assert server._timers[os.getpid(), "a"] == mine[0]
    assert sorted(server._timers) == sorted([(os.getpid(), "a"), (os.getpid(), "b"), (os.getppid(), "theirs")])
    assert server.get_expired_timers(later)[os.getpid()] == [mine[0]]
    assert {request.scope_id for request in server.get_expired_timers(later + 1)[os.getpid()]} == {"a", "b"}
    server.clear_timers({os.getpid()})
    assert list(server._timers) == [(os.getppid(), "theirs")]
    assert server._request_count == 6
    assert server._is_client_started


def test_a_process_that_has_ended_has_no_timers(
    serve: Callable[..., FileTimerServer], hang: Callable[..., subprocess.Popen[str]]
) -> None:
    server = serve()
    process = hang(1000)
    assert eventually(lambda: list(server._timers) == [(process.pid, "hang")])
    process.kill()
    process.wait()
    if os.environ.get("FERROELASTIC_PIDFD") == "0":  # nobody tells the engine
        server.clear_timers(set())
    assert eventually(lambda: server._timers == {})


def test_a_process_that_misses_a_deadline_and_stays_is_no_progress(
    serve: Callable[..., FileTimerServer], hang: Callable[..., subprocess.Popen[str]], events: Events
) -> None:
    server = serve()
    start = time.time()
    code = HANG.replace("import os", "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nimport os")
    process = hang(-100, signal.SIGTERM, code=code)
    events.wait("kill worker process")
    assert server.get_last_progress_time() <= start - 99
    process.kill()
    assert eventually(lambda: server.get_last_progress_time() >= int(start))


def test_run_once_deals_with_all_that_was_sent_and_stops(
    serve: Callable[..., FileTimerServer], path: str, events: Events
) -> None:
    server = serve(start=False)
    thread_before = threading.active_count()
    client = FileTimerClient(path)
    later = time.time() + 1000
    for scope in "abc":
        client.acquire(scope, later)
    client.release("c")
    server.start()
    server.run_once()
    assert threading.active_count() == thread_before
    assert sorted(server._timers) == [(os.getpid(), "a"), (os.getpid(), "b")]
    assert server._request_count == 4
    assert not os.path.exists(path)
    assert events.names == ["watchdog started"]


def test_run_once_and_stop_without_a_start_remove_the_pipe(serve: Callable[..., FileTimerServer], path: str) -> None:
    for way in ("run_once", "stop"):
        server = serve(start=False)
        assert os.path.exists(path)
        getattr(server, way)()
        assert not os.path.lexists(path)
        assert not os.path.lexists(path + ".beats")


def test_an_invalid_request_costs_itself_and_is_reported_once(
    serve: Callable[..., FileTimerServer], path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    request = FileTimerRequest(os.getpid(), "good", time.time() + 1000, 9).to_json().encode()
    send(path, b"garbage\n" + request + b'\n{"pid": "x"}\n' + request.replace(b'"version": 1', b'"version": 7') + b"\n")
    assert eventually(lambda: server._counts.unknown_version == 1)
    assert list(server._timers) == [(os.getpid(), "good")]
    server.stop()
    server.stop()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(
        f"dropped 3 timer requests at {path}. In total 3 were broken (2 malformed, 0 too long, 1 of an unknown"
    )


def test_invalid_requests_are_reported_at_an_expiry(
    serve: Callable[..., FileTimerServer],
    path: str,
    hang: Callable[..., subprocess.Popen[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    serve()
    send(path, b"garbage\n")
    hang().wait(LONG_S)
    assert eventually(lambda: "dropped 1 timer requests" in caplog.text)


# ---- the pipe


def test_a_pipe_that_is_served_is_refused(serve: Callable[..., FileTimerServer], path: str) -> None:
    server = serve()
    with pytest.raises(OSError, match="another process serves it") as raised:
        FileTimerServer(path, "r")
    assert raised.value.errno == errno.EADDRINUSE
    FileTimerClient(path).acquire("a", time.time() + 1000)
    assert eventually(lambda: len(server._timers) == 1)


def test_a_removed_pipe_is_made_again(serve: Callable[..., FileTimerServer], path: str) -> None:
    server = serve()
    client = FileTimerClient(path)
    client.acquire("a", time.time() + 1000)
    assert eventually(lambda: len(server._timers) == 1)
    threads = threading.active_count()
    os.remove(path)
    server.start()
    assert threading.active_count() == threads
    client.acquire("b", time.time() + 1000)
    assert eventually(lambda: len(server._timers) == 2)


def test_the_pipe_of_a_dead_server_is_taken_over(path: str, serve: Callable[..., FileTimerServer]) -> None:
    with subprocess.Popen([sys.executable, "-c", ALONE, path, "{}"], stdout=subprocess.PIPE) as dead:
        assert dead.stdout is not None
        assert dead.stdout.readline() == b"serves\n"
        dead.kill()
    assert os.path.exists(path)
    server = serve()
    FileTimerClient(path).acquire("a", time.time() + 1000)
    assert eventually(lambda: len(server._timers) == 1)


FORK = "import os\nif os.fork() == 0: raise SystemExit\nos.wait()\nassert os.path.exists(sys.argv[1])"


# One that is no daemon lives until the server is stopped.
@pytest.mark.parametrize(
    ("way", "daemon"), [("", True), (FORK, True), ("server.stop()", True), ("server.stop()", False)]
)
def test_a_process_that_ends_removes_the_pipe(path: str, way: str, daemon: bool) -> None:
    code = ALONE.replace("time.sleep(1000)", way)
    ended = subprocess.run(
        # From CPython 3.12 on, a fork of a process with several threads warns.
        [sys.executable, "-Wignore", "-c", code, path, str({"daemon": daemon})],
        timeout=LONG_S,
        check=False,
        capture_output=True,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert not os.path.lexists(path)
    assert not os.path.lexists(path + ".beats")


def test_a_forked_process_cannot_stop_the_server(serve: Callable[..., FileTimerServer], path: str) -> None:
    server = serve()
    child = fork()
    if child == 0:
        with suppress(BaseException):
            server.stop()
        os._exit(0)
    os.waitpid(child, 0)
    FileTimerClient(path).acquire("a", time.time() + 1000)
    assert eventually(lambda: len(server._timers) == 1)


# ---- heartbeats


BEAT = """
import sys, time
from ferroelastic import timer
heart = timer.heartbeat("steps", float(sys.argv[2]), client=timer.FileTimerClient(sys.argv[1], int(sys.argv[3])))
print("set", flush=True)
for line in sys.stdin:
    heart.beat()
    print("beaten", flush=True)
time.sleep(1000)
"""


def test_a_process_that_does_not_beat_is_ended(
    serve: Callable[..., FileTimerServer], hang: Callable[..., subprocess.Popen[str]]
) -> None:
    server = serve()
    process = hang(0.3, signal.SIGTERM, code=BEAT)
    assert process.wait(LONG_S) == -signal.SIGTERM
    expiry = server.expiry(process.pid)
    assert expiry is not None
    assert expiry.scope == "steps"


def test_a_beat_puts_the_deadline_off(serve: Callable[..., FileTimerServer], path: str, events: Events) -> None:
    serve()
    with timer.heartbeat("steps", 2, client=FileTimerClient(path, 0)) as heart:
        time.sleep(0.3)
        last_beat = time.time()
        heart.beat()
        request = events.wait("timer expired")
    assert request is not None
    assert request.expiration_time > last_beat + 2 - 0.1


def test_a_heartbeat_that_is_closed_is_not_expected(
    serve: Callable[..., FileTimerServer], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setenv("TORCHELASTIC_TIMER_FILE", path)
    heart = timer.heartbeat("steps", 1000)
    assert eventually(lambda: list(server._timers) == [(os.getpid(), "steps")])
    heart.close()
    heart.close()
    heart.beat()
    assert eventually(lambda: server._timers == {})


def test_a_heartbeat_belongs_to_the_process_that_made_it(serve: Callable[..., FileTimerServer], path: str) -> None:
    server = serve()
    with timer.heartbeat("steps", 1000, client=FileTimerClient(path)) as heart:
        assert eventually(lambda: len(server._timers) == 1)
        child = fork()
        if child == 0:
            code = 1
            with suppress(BaseException):
                try:
                    heart.beat()
                except ForkedError:
                    heart.close()
                    code = 0
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        heart.beat()
        assert list(server._timers) == [(os.getpid(), "steps")]


def test_a_heartbeat_without_a_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_TIMER_FILE", raising=False)
    with pytest.raises(RuntimeError, match="TORCHELASTIC_ENABLE_FILE_TIMER=1"):
        timer.heartbeat("steps", 1)


def test_a_heartbeat_without_a_server(path: str) -> None:
    with pytest.raises(BrokenPipeError, match=f"no process serves {path}"):
        timer.heartbeat("steps", 1, client=FileTimerClient(path))


def test_a_heartbeat_with_torchs_server(path: str) -> None:
    os.mkfifo(path)
    with pytest.raises(RuntimeError, match="does not support heartbeats"):
        timer.heartbeat("steps", 1, client=FileTimerClient(path))


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_heartbeat_needs_a_timeout(path: str, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s of heartbeat 'steps' must be positive and finite"):
        timer.heartbeat("steps", timeout_s, client=FileTimerClient(path))


def test_a_heartbeat_that_cannot_be_sent_is_an_error(serve: Callable[..., FileTimerServer], path: str) -> None:
    """Nothing might be sent after it, and the hang would go unseen."""
    server = serve(start=False)
    client = FileTimerClient(path)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n" * 4096)
    os.close(writer)
    with pytest.raises(RuntimeError, match="the watchdog does not read its pipe"):
        timer.heartbeat("steps", 1000, client=client)
    assert client.unsent == 0
    server.start()
    assert eventually(lambda: server._request_count == 0)
    timer.heartbeat("steps", 1000, client=client).close()


# ---- torch on the other side


def test_torchs_client(serve: Callable[..., FileTimerServer], hang: Callable[..., subprocess.Popen[str]]) -> None:
    pytest.importorskip("torch")
    server = serve()
    process = hang(0.1, signal.SIGTERM, package="torch.distributed.elastic")
    assert process.wait(LONG_S) == -signal.SIGTERM
    expiry = server.expiry(process.pid)
    assert expiry is not None
    assert expiry.scope == "hang"


TORCHS_SERVER = """
import sys, time
from torch.distributed.elastic.timer import FileTimerServer
FileTimerServer(sys.argv[1], "r", max_interval=0.01).start()
print("serves", flush=True)
time.sleep(1000)
"""


def test_torchs_server(path: str, hang: Callable[..., subprocess.Popen[str]]) -> None:
    """Which looks at its timers only while nobody has the pipe open, and ends itself as well."""
    pytest.importorskip("torch")
    with subprocess.Popen([sys.executable, "-c", TORCHS_SERVER, path], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"serves\n"
        lives = hang(1000)
        hung = hang(0.1)
        assert hung.wait(LONG_S) == -signal.SIGKILL
        assert server.wait(LONG_S) == -signal.SIGKILL
        assert lives.poll() is None
