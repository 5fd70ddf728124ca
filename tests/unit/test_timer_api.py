"""``expires``, and the server that reads a queue."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from ferroelastic import timer
from ferroelastic.timer import LocalTimerServer, TimerClient, TimerRequest, api
from ferroelastic.timer.local_timer import MultiprocessingRequestQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG_S = 60.0


class Recorder(TimerClient):
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.times: list[float] = []

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self.calls.append(("acquire", scope_id))
        self.times.append(expiration_time)

    def release(self, scope_id: str) -> None:
        self.calls.append(("release", scope_id))


@pytest.fixture
def client() -> Iterator[Recorder]:
    client = Recorder()
    timer.configure(client)
    yield client
    timer.configure(None)


def line_here(offset: int = 0) -> str:
    import inspect

    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return f"{__file__}#{frame.f_back.f_lineno + offset}"


# ---- expires


def test_a_block_has_a_timer_of_its_line(client: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.5)
    with timer.expires(after=10):
        assert client.calls == [("acquire", line_here(-1))]
    scope = line_here(-2)
    assert client.calls == [("acquire", scope), ("release", scope)]
    assert client.times == [1010.5]


def test_timers_within_each_other_have_scopes_of_their_own(client: Recorder) -> None:
    with timer.expires(after=10):
        with timer.expires(after=5):
            pass
        (_, outer), (_, inner), (last, released) = client.calls
    assert outer != inner
    assert (last, released) == ("release", inner)


def test_an_exception_goes_through_and_releases(client: Recorder) -> None:
    with pytest.raises(ZeroDivisionError), timer.expires(after=10, scope="s"):
        divmod(1, 0)
    assert client.calls == [("acquire", "s"), ("release", "s")]


def test_a_timer_that_was_not_acquired_is_not_released(client: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise BrokenPipeError("no server")

    monkeypatch.setattr(client, "acquire", fail)
    with pytest.raises(BrokenPipeError, match="no server"), timer.expires(after=10):
        pytest.fail("entered")
    assert client.calls == []


def test_without_a_client_it_is_an_error_when_it_is_entered() -> None:
    timer.configure(None)
    expiring = timer.expires(after=10)
    with pytest.raises(RuntimeError, match="Configure timer client before using countdown timers"), expiring:
        pytest.fail("entered")


def test_expires_acquires_and_releases(client: Recorder) -> None:
    other = Recorder()
    with timer.expires(after=10, scope="given", client=other):
        pass
    with timer.expires(after=10, scope="default"):
        timer.configure(other)
    assert other.calls == [("acquire", "given"), ("release", "given")]
    assert client.calls == [("acquire", "default"), ("release", "default")]


def test_a_decorated_function_has_a_timer_at_each_call(client: Recorder) -> None:
    @timer.expires(after=10, scope="f")
    def double(value: int) -> int:
        """Twice the value."""
        return 2 * value

    assert [double(3), double(4)] == [6, 8]
    assert double.__doc__ == "Twice the value."
    assert client.calls == [("acquire", "f"), ("release", "f")] * 2


# ---- the server of a queue


@pytest.fixture
def here() -> Any:
    """A queue within this process: what was put is there."""
    return queue.Queue()


def test_a_deadline_is_acted_on_long_before_the_interval_is_over() -> None:
    requests: Any = multiprocessing.Queue()
    process = subprocess.Popen(["sleep", "1000"])
    server = LocalTimerServer(requests, max_interval=10 * LONG_S)
    server.start()
    try:
        requests.put(TimerRequest(process.pid, "scope", time.time() + 0.1))
        assert process.wait(LONG_S) == -signal.SIGKILL
    finally:
        server._max_interval = 0
        requests.put(TimerRequest(process.pid, "wakes the server up", -1))
        thread = server._watchdog_thread
        server.stop()
        assert thread is not None
        thread.join(LONG_S)
        requests.close()
        requests.join_thread()


def test_how_long_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    unused: Any = None
    server = LocalTimerServer(unused, max_interval=60)
    assert server._next_interval() == 60
    server.register_timers([TimerRequest(1, "a", 1007.0), TimerRequest(1, "b", 1090.0)])
    assert server._next_interval() == 7
    server.register_timers([TimerRequest(1, "a", -1)])
    assert server._next_interval() == 60
    # One that has expired since the last look is due; one that was looked at, and whose process could not be ended, is not.
    server.register_timers([TimerRequest(1, "c", 999.0)])
    assert server._next_interval() == 0
    assert server.get_expired_timers(1000.0) == {1: [TimerRequest(1, "c", 999.0)]}
    assert server._next_interval() == 60


def test_a_release_that_is_there_is_seen_before_the_deadline_is_looked_at(
    here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the deadline has come already, so that there is no time to wait."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    server = LocalTimerServer(here)
    server.register_timers([TimerRequest(-3, "scope", time.time() - 1)])
    for scope in ("other", "scope"):
        here.put(TimerRequest(-3, scope, -1))
    server._run_watchdog()
    assert (killed, server._timers) == ([], {})


def test_a_queue_returns_its_requests_without_waiting(here: Any) -> None:
    requests = [TimerRequest(number, "scope", 0) for number in range(3)]
    for request in requests:
        here.put(request)
    reader = MultiprocessingRequestQueue(here)
    assert reader.size() == 3
    assert reader.get(2, timeout=0) == requests[:2]
    assert reader.get(2, timeout=0) == requests[2:]


def test_a_worker_that_cannot_be_ended_is_not_forgotten(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, _: int) -> None:
        raise {1: PermissionError, 2: ProcessLookupError}[pid]

    server = LocalTimerServer(here, max_interval=0)
    server.register_timers([TimerRequest(pid, "scope", 1.0) for pid in (1, 2)])
    monkeypatch.setattr(os, "kill", kill)
    server._run_watchdog()
    assert list(server._timers) == [(1, "scope")]


def test_requests_are_compared_by_value() -> None:
    request = TimerRequest(1, "a", 2.5)
    assert request == TimerRequest(1, "a", 2.5)
    others: list[object] = [TimerRequest(2, "a", 2.5), TimerRequest(1, "b", 2.5), TimerRequest(1, "a", 3), "a"]
    assert request not in others
    file_request = timer.FileTimerRequest(1, "a", 2.5, 9)
    assert file_request == timer.FileTimerRequest(1, "a", 2.5, 9)
    assert file_request not in [timer.FileTimerRequest(1, "a", 2.5, 15), timer.FileTimerRequest(2, "a", 2.5, 9), 1]
    assert file_request.worker_pid == file_request.worker_id == 1
    with pytest.raises(TypeError):
        hash(request)


def test_the_module_has_the_client(client: Recorder) -> None:
    assert api._timer_client is client
