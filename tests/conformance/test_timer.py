"""``timer``: what its clients and servers do, on both implementations, with real processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance.implementations import module_name
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.implementations import Implementation

LONG_S = 60.0
ROOT = Path(__file__).parents[2]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Recorder:
    """The calls of a client."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self.calls.append((scope_id, expiration_time))

    def release(self, scope_id: str) -> None:
        self.calls.append((scope_id, None))


@pytest.fixture
def recorder(impl: Implementation) -> Iterator[Recorder]:
    recorder = Recorder()
    impl("timer").configure(recorder)
    yield recorder
    impl("timer").configure(None)


# ---- expires


class TestExpires:
    def test_an_exception_goes_through(self, impl: Implementation, recorder: Recorder) -> None:
        with pytest.raises(RuntimeError, match="foobar"), impl("timer").expires(after=1, scope="s"):
            raise RuntimeError("foobar")
        assert [scope for scope, _ in recorder.calls] == ["s", "s"]

    def test_without_a_client(self, impl: Implementation) -> None:
        impl("timer").configure(None)
        with pytest.raises(RuntimeError), impl("timer").expires(after=1):
            pytest.fail("entered")

    def test_a_client_that_is_given(self, impl: Implementation, recorder: Recorder) -> None:
        given = Recorder()
        before = time.time()
        with impl("timer").expires(after=5, scope="test", client=given):
            pass
        (scope, at), release = given.calls
        assert scope == "test"
        assert before + 5 <= at <= time.time() + 5
        assert release == ("test", None)
        assert recorder.calls == []

    def test_a_decorator(self, impl: Implementation, recorder: Recorder) -> None:
        def increase(value: int) -> int:
            return value + 1

        function = impl("timer").expires(after=5, scope="f")(increase)
        assert [function(1), function(value=2)] == [2, 3]
        assert [scope for scope, _ in recorder.calls] == ["f"] * 4

    def test_a_scope_of_its_own(self, impl: Implementation, recorder: Recorder) -> None:
        with impl("timer").expires(after=5):
            pass
        scope, _ = recorder.calls[0]
        assert scope.endswith(".py#" + scope.rpartition("#")[2])
        here = f"{__file__}#{sys._getframe().f_lineno - 4}"
        assert (scope == here) is impl.expect("callers-scope", torch=False, ours=True)

    def test_more_than_once(self, impl: Implementation, recorder: Recorder) -> None:
        expiring = impl("timer").expires(after=5, scope="s")
        times = 0
        with contextlib.suppress(AttributeError, RuntimeError):
            for _ in range(2):
                with expiring:
                    times += 1
        assert times == impl.expect("reused-timer", torch=1, ours=2)


# ---- an own server


def mock_server(impl: Implementation) -> Any:
    """Worker 1 cannot be ended and raises, worker 2 is ended, worker 3 cannot be ended."""
    api = impl("timer.api")

    class Queue(api.RequestQueue):  # type: ignore[misc,name-defined]  # whose class is known when the test runs
        def size(self) -> int:
            return 2

        def get(self, size: int, timeout: float) -> list[Any]:
            return [api.TimerRequest(1, "a", 0), api.TimerRequest(2, "b", 0)][:size]

    class Server(api.TimerServer):  # type: ignore[misc,name-defined]  # as above
        def __init__(self) -> None:
            super().__init__(Queue(), max_interval=1)
            self.registered: list[Any] = []
            self.cleared: list[set[int]] = []

        def register_timers(self, timer_requests: list[Any]) -> None:
            self.registered += timer_requests

        def clear_timers(self, worker_ids: set[int]) -> None:
            self.cleared.append(worker_ids)

        def get_expired_timers(self, deadline: float) -> Any:
            return {worker: [api.TimerRequest(worker, "scope", 0)] * 2 for worker in (1, 2, 3)}

        def _reap_worker(self, worker_id: int) -> bool:
            if worker_id == 1:
                raise RuntimeError("test error")
            return worker_id == 2

    return Server()


def test_a_server_of_ones_own(impl: Implementation) -> None:
    server = mock_server(impl)
    server._run_watchdog()
    assert [request.scope_id for request in server.registered] == ["a", "b"]
    assert server.cleared == [{1, 2}]
    assert isinstance(server, impl("timer").TimerServer)


# ---- the server of a queue


class TestLocalTimer:
    @pytest.fixture
    def requests(self) -> Iterator[Any]:
        requests: Any = multiprocessing.Queue()
        yield requests
        requests.close()
        requests.join_thread()

    def test_a_queue(self, impl: Implementation, requests: Any) -> None:
        reader = impl("timer.local_timer").MultiprocessingRequestQueue(requests)
        assert reader.get(1, timeout=0.01) == []
        request = impl("timer").TimerRequest(1, "scope", 0)
        requests.put(request)
        assert reader.get(1, timeout=LONG_S) == [request]
        assert reader.size() == 0

    def test_a_queue_that_has_less(self, impl: Implementation) -> None:
        requests: Any = queue.Queue()
        made = [impl("timer").TimerRequest(number, "scope", 0) for number in range(3)]
        for request in made:
            requests.put(request)
        reader = impl("timer.local_timer").MultiprocessingRequestQueue(requests)
        assert reader.size() == 3
        assert reader.get(2, timeout=1) == made[:2]
        assert reader.get(5, timeout=0.01) == made[2:]

    def test_a_client(self, impl: Implementation, requests: Any) -> None:
        client = impl("timer").LocalTimerClient(requests)
        client.acquire("scope", 5.5)
        client.release("scope")
        found = [requests.get(timeout=LONG_S) for _ in range(2)]
        make = impl("timer").TimerRequest
        assert found == [make(os.getpid(), "scope", 5.5), make(os.getpid(), "scope", -1)]

    @pytest.mark.parametrize("state", ["expired", "released", "valid"])
    def test_timers(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
        make, requests, now = impl("timer").TimerRequest, queue.Queue[Any](), time.time()
        server = impl("timer").LocalTimerServer(requests, max_interval=0.01)
        killed: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
        sent = {
            "expired": [make(-3, "a", now - 60), make(-3, "b", now + 60)],
            "released": [make(-3, "a", now + 60), make(-3, "a", -1), make(-3, "b", -1)],
            "valid": [make(-3, "a", now + 60), make(-3, "b", now + 60), make(-2, "a", now + 60)],
        }
        for request in sent[state]:
            requests.put(request)
        server._run_watchdog()
        assert killed == ([(-3, signal.SIGKILL)] if state == "expired" else [])
        wanted = [(-3, "a"), (-3, "b"), (-2, "a")] if state == "valid" else []
        assert list(server._timers) == wanted
        assert server.get_expired_timers(now).keys() == set()
        server.clear_timers({-3})
        assert list(server._timers) == wanted[2:]

    def test_a_process_that_hangs(self, impl: Implementation, requests: Any) -> None:
        process = subprocess.Popen(["sleep", "1000"])
        server = impl("timer").LocalTimerServer(requests, max_interval=0.01)
        server.start()
        requests.put(impl("timer").TimerRequest(process.pid, "scope", time.time() + 0.1))
        assert process.wait(LONG_S) == -signal.SIGKILL
        thread = server._watchdog_thread
        server.stop()
        thread.join(LONG_S)


# ---- the server of a pipe


class FileTimer:
    """A server that spares this process, and what it does."""

    def __init__(self, impl: Implementation, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.impl, self.path = impl, path
        self.events: list[tuple[str, Any]] = []
        self.news = threading.Condition()
        self.reaped: list[tuple[int, int]] = []
        """What the server signalled through Python: with torch everything, with ours its own process only."""
        self.server = impl("timer").FileTimerServer(path, "run", max_interval=0.1, log_event=self._on_event)
        original = self.server._reap_worker

        def reap(pid: int, number: int) -> bool:
            self.reaped.append((pid, number))
            return True if pid == os.getpid() else original(pid, number)

        monkeypatch.setattr(self.server, "_reap_worker", reap)
        self.client = impl("timer").FileTimerClient(path)

    def _on_event(self, name: str, request: Any) -> None:
        with self.news:
            self.events.append((name, request))
            self.news.notify_all()

    def wait_for(self, name: str) -> Any:
        with self.news:
            assert self.news.wait_for(lambda: name in dict(self.events), LONG_S), self.events
            return dict(self.events)[name]

    def let_in(self) -> None:
        """Open the pipe once: torch's thread waits for somebody to do so, for ever if need be."""

        def is_open() -> bool:
            try:
                os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                return False
            return True

        assert eventually(is_open)

    def send(self, *requests: tuple[int, str, float, int]) -> None:
        for request in requests:
            self.client._send_request(self.impl("timer").FileTimerRequest(*request))


@pytest.fixture
def file_timer(impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileTimer]:
    made = FileTimer(impl, str(tmp_path / "pipe"), monkeypatch)
    yield made
    made.server.stop()
    made.__dict__.clear()  # pytest keeps the fixture


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


@pytest.mark.needs("timer-server")
class TestFileTimerServer:
    def test_a_process_that_hangs(self, file_timer: FileTimer, sleeper: subprocess.Popen[bytes]) -> None:
        file_timer.server.start()
        file_timer.send((sleeper.pid, "scope", time.time() + 0.1, signal.SIGTERM))
        assert sleeper.wait(LONG_S) == -signal.SIGTERM
        request = file_timer.wait_for("kill worker process")
        assert (request.worker_pid, request.scope_id, request.signal) == (sleeper.pid, "scope", signal.SIGTERM)
        assert [name for name, _ in file_timer.events] == [
            "watchdog started",
            "timer expired",
            "kill worker process",
        ]
        # And then, unless it is told not to, its own process.
        assert eventually(lambda: file_timer.reaped[-1:] == [(os.getpid(), signal.SIGTERM)])
        file_timer.server.stop()
        assert file_timer.events[-1] == ("watchdog stopped", None)
        assert not os.path.exists(file_timer.path)

    def test_all_timers_of_a_process_go_with_it(self, file_timer: FileTimer, sleeper: subprocess.Popen[bytes]) -> None:
        now = time.time()
        file_timer.server.start()
        file_timer.send((sleeper.pid, "b", now + 1000, 9), (sleeper.pid, "a", now - 60, 9))
        assert sleeper.wait(LONG_S) == -signal.SIGKILL
        file_timer.server.run_once()
        assert file_timer.server._timers == {}
        assert file_timer.server._request_count == 2
        assert not os.path.exists(file_timer.path)

    def test_timers_that_are_released(self, file_timer: FileTimer) -> None:
        later = time.time() + 1000
        file_timer.server.start()
        file_timer.send((os.getpid(), "a", later, 9), (os.getpid(), "a", -1, 0), (os.getpid(), "b", -1, 0))
        file_timer.server.run_once()
        assert file_timer.server._timers == {}
        assert file_timer.server._request_count == 3
        assert file_timer.reaped == []

    def test_timers_that_are_valid(self, file_timer: FileTimer) -> None:
        later = time.time() + 1000
        mine = [(os.getpid(), scope, later, 9) for scope in "ab"]
        file_timer.server.start()
        file_timer.send(*mine)
        file_timer.server.run_once()
        make = file_timer.impl("timer").FileTimerRequest
        assert file_timer.server._timers == {
            (os.getpid(), scope): make(*request) for request in mine for scope in request[1]
        }
        assert file_timer.reaped == []

    def test_an_expiry_without_a_signal(self, file_timer: FileTimer, sleeper: subprocess.Popen[bytes]) -> None:
        file_timer.server.start()
        file_timer.send((sleeper.pid, "scope", time.time(), 0))
        assert file_timer.wait_for("timer expired").scope_id == "scope"
        file_timer.server.stop()
        assert sleeper.poll() is None
        assert file_timer.reaped == []

    def test_many_clients(self, file_timer: FileTimer) -> None:
        code = (
            "import sys\n"
            f"from {module_name(file_timer.impl.name, 'timer')} import FileTimerClient, configure, expires\n"
            "configure(FileTimerClient(sys.argv[1]))\n"
            "for number in range(10):\n"
            "    with expires(after=100, scope=str(number)): pass\n"
        )
        file_timer.server.start()
        command = [sys.executable, "-c", code, file_timer.path]
        clients = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
        assert [client.wait(LONG_S) for client in clients] == [0] * 3
        file_timer.server.run_once()
        assert file_timer.server._request_count == 2 * 10 * 3
        assert file_timer.server._timers == {}

    def test_a_process_that_ends_before_it_releases(
        self, file_timer: FileTimer, sleeper: subprocess.Popen[bytes]
    ) -> None:
        file_timer.server.start()
        file_timer.send((sleeper.pid, "scope", time.time() + 1000, 9))
        assert eventually(lambda: len(file_timer.server._timers) == 1)
        sleeper.kill()
        sleeper.wait()
        file_timer.server.clear_timers(set())
        assert file_timer.server._timers == {}

    def test_methods_of_a_server(self, file_timer: FileTimer) -> None:
        server, later = file_timer.server, time.time() + 1000
        make = file_timer.impl("timer").FileTimerRequest
        mine = [make(os.getpid(), "a", later, 9), make(os.getpid(), "b", later + 1, 9)]
        server.register_timers([*mine, make(os.getppid(), "c", later, 9)])
        assert server._timers[os.getpid(), "a"] == mine[0]
        assert server.get_expired_timers(later)[os.getpid()] == mine[:1]
        assert server.get_expired_timers(later + 1)[os.getpid()] == mine
        assert server.get_expired_timers(later - 1) == {}
        server.register_timers([make(os.getpid(), "a", -1, 0)])
        server.clear_timers({os.getppid()})
        assert list(server._timers) == [(os.getpid(), "b")]
        assert server._request_count == 4
        assert abs(server.get_last_progress_time() - time.time()) < LONG_S
        assert isinstance(server.get_last_progress_time(), int)
        assert server._get_scopes(mine) == ["a", "b"]

    def test_is_process_running(self, impl: Implementation, sleeper: subprocess.Popen[bytes]) -> None:
        is_running = impl("timer").FileTimerServer.is_process_running
        assert is_running(sleeper.pid)
        sleeper.kill()
        sleeper.wait()
        assert not is_running(sleeper.pid)

    def test_the_debug_hook(
        self, file_timer: FileTimer, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = file_timer.impl.expect("hook-after-signal", torch=False, ours=True)
        seen: list[Any] = []

        def hook(run_id: str, expired: dict[int, list[str]]) -> None:
            if expired:
                found = eventually(lambda: is_gone(sleeper.pid) is wanted)
                seen.append(
                    (run_id, {pid: [json.loads(text) for text in texts] for pid, texts in expired.items()}, found)
                )

        module = file_timer.impl("timer.file_based_local_timer")
        monkeypatch.setattr(module, "log_debug_info_for_expired_timers", hook)
        file_timer.server.start()
        at = time.time() + 0.01
        file_timer.send((sleeper.pid, "scope", at, 9))
        file_timer.wait_for("kill worker process")
        request = {"version": 1, "pid": sleeper.pid, "scope_id": "scope", "expiration_time": at, "signal": 9}
        assert seen == [("run", {sleeper.pid: [request]}, True)]

    def test_a_line_that_is_not_understood(self, file_timer: FileTimer) -> None:
        request = file_timer.impl("timer").FileTimerRequest(os.getpid(), "scope", time.time() + 1000, 9)
        server = file_timer.server
        server._max_interval = LONG_S  # torch's takes both lines in one go
        server.start()
        with open(file_timer.path, "w") as pipe:
            pipe.write(request.to_json() + "\ngarbage\n")
        server.run_once()
        assert server._request_count == file_timer.impl.expect("broken-lines", torch=0, ours=1)

    def test_a_process_that_is_not_a_descendant(self, file_timer: FileTimer) -> None:
        """Its parent has ended, so that it is nobody's."""
        found = subprocess.run(
            ["sh", "-c", "sleep 1000 >&- & echo $!"], stdout=subprocess.PIPE, check=True, timeout=LONG_S
        )
        pid = int(found.stdout)
        descriptor = os.pidfd_open(pid)
        try:
            file_timer.server.start()
            file_timer.send((pid, "scope", time.time(), 9))
            file_timer.wait_for("timer expired")
            file_timer.server.stop()
            wanted = file_timer.impl.expect("own-processes", torch=True, ours=False)
            ended, _, _ = select.select([descriptor], [], [], LONG_S if wanted else 0)
            assert bool(ended) is wanted
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)

    def test_two_servers(self, file_timer: FileTimer) -> None:
        try:
            second = file_timer.impl("timer").FileTimerServer(file_timer.path, "run")
            second.stop()
        except OSError:
            is_refused = True
        else:
            is_refused = False
        assert is_refused is file_timer.impl.expect("pipe-in-use", torch=False, ours=True)

    def test_no_client_ever(self, file_timer: FileTimer) -> None:
        file_timer.server.start()
        assert not file_timer.server._is_client_started
        assert abs(file_timer.server.get_last_progress_time() - time.time()) < LONG_S
        file_timer.let_in()
        file_timer.server.stop()
        assert not os.path.exists(file_timer.path)


class TestFileTimerClient:
    @pytest.fixture
    def pipe(self, tmp_path: Path) -> Iterator[tuple[str, int]]:
        """A pipe and its reader, which never blocks."""
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        yield path, reader
        os.close(reader)

    def test_the_written_request(self, impl: Implementation, pipe: tuple[str, int]) -> None:
        client = impl("timer").FileTimerClient(pipe[0], signal.SIGTERM)
        client.acquire('a "scope" \N{SNOWMAN}', 1700000000.125)
        client.release("b")
        start = f'{{"version": 1, "pid": {os.getpid()}, "scope_id": '
        assert os.read(pipe[1], 1 << 16).decode() == (
            start
            + '"a \\"scope\\" \\u2603", "expiration_time": 1700000000.125, "signal": 15}\n'
            + start
            + '"b", "expiration_time": -1, "signal": 0}\n'
        )

    def test_a_full_pipe(self, impl: Implementation, pipe: tuple[str, int]) -> None:
        writer = os.open(pipe[0], os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"\n" * 4096)
        os.close(writer)
        client = impl("timer").FileTimerClient(pipe[0])
        try:
            client.acquire("scope", 1.5)
        except BlockingIOError:
            outcome = "raises"
        else:
            outcome = f"keeps {client.unsent}"
        assert outcome == impl.expect("kept-requests", torch="raises", ours="keeps 1")

    def test_without_a_server(self, impl: Implementation, tmp_path: Path) -> None:
        client = impl("timer").FileTimerClient(str(tmp_path / "nowhere"))
        with pytest.raises(BrokenPipeError, match="Could not send the FileTimerRequest because FileTimerServer is not"):
            client.acquire("scope", 1.5)

    @pytest.mark.parametrize("beyond", [0, 1])
    def test_a_long_scope(self, impl: Implementation, pipe: tuple[str, int], beyond: int) -> None:
        make = impl("timer").FileTimerRequest
        short = len(make(os.getpid(), "", 1.5, 9).to_json())
        scope = "x" * (select.PIPE_BUF - short + beyond)
        client = impl("timer").FileTimerClient(pipe[0])
        try:
            client.acquire(scope, 1.5)
        except RuntimeError as error:
            outcome = str(error)
        else:
            outcome = "sent"
        refused = (
            f"FileTimerRequest larger than 4096 bytes is not supported: {make(os.getpid(), scope, 1.5, 9).to_json()}"
        )
        if beyond:
            assert outcome == refused
        else:
            assert outcome == impl.expect("encoded-length", torch="sent", ours=refused)

    def test_requests(self, impl: Implementation) -> None:
        make = impl("timer").FileTimerRequest
        assert make(1, "a", 2.5) == make(1, "a", 2.5, 0)
        assert make(1, "a", 2.5) != make(1, "a", 2.5, 9)
        assert make(1, "a", 2.5) != impl("timer").TimerRequest(2, "a", 2.5)
        assert json.loads(make(1, "a", 2.5, 9).to_json()) == {
            "version": 1,
            "pid": 1,
            "scope_id": "a",
            "expiration_time": 2.5,
            "signal": 9,
        }


# ---- an agent

AGENT = """
import signal, sys
from tests.conformance import stubs
from tests.conformance.implementations import Implementation
from tests.support.memory_store import MemoryStore
impl = Implementation(sys.argv[1])
handler = stubs.rendezvous(impl, MemoryStore())
worker = (sys.executable, "-c", open(sys.argv[2]).read(), impl("timer").__name__)
spec = stubs.spec(impl, handler, entrypoint=worker[0], args=worker[1:], max_restarts=1)
module = impl("agent.server.local_elastic_agent")
result = module.LocalElasticAgent(spec, impl.mp.DefaultLogsSpecs(sys.argv[3])).run()
print(result.state.value)
"""

WORKER = """
import importlib, os, sys, time
timer = importlib.import_module(sys.argv[1])
timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
with timer.expires(after=0.1 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 1000):
    time.sleep(1000 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
"""


@pytest.mark.needs("timer-server")
def test_an_agent_whose_worker_hangs(impl: Implementation, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", AGENT, impl.name, str(tmp_path / "worker.py"), str(tmp_path / "logs")]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TORCHELASTIC_ENABLE_FILE_TIMER": "1", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    outcome = (ended.returncode, ended.stdout.strip())
    assert outcome == impl.expect("agent-outlives-expiry", torch=(-signal.SIGKILL, ""), ours=(0, "SUCCEEDED"))
