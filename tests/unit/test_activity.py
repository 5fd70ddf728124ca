"""What an agent's loop is doing, under a clock moved by hand."""

from __future__ import annotations

from typing import Any

import pytest

from ferroelastic.agent.server import HealthCheckServer, RunResult, Worker, WorkerState
from ferroelastic.agent.server import _activity as module
from ferroelastic.agent.server._activity import Activity, cause_of
from ferroelastic.multiprocessing import ProcessFailure


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


class Board:
    """Stands for the native server."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.failure: Exception | None = None

    def __getattr__(self, method: str) -> Any:
        def tell(*arguments: Any, **options: Any) -> None:
            if self.failure is not None:
                raise self.failure
            self.told.append((method, *arguments, *options.values()))

        return tell


class Server(HealthCheckServer):
    def __init__(self) -> None:
        super().__init__(lambda: 0, 0, 60)
        self.shown = Board()

    @property
    def board(self) -> Any:
        return self.shown


class Spec:
    role = "trainer"

    class rdzv_handler:  # noqa: N801 - an attribute of a specification
        @staticmethod
        def get_run_id() -> str:
            return "the-run"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def attached() -> tuple[Activity, Board]:
    activity, server = Activity(), Server()
    spec: Any = Spec()
    activity.attach(server, spec)
    activity.attach(server, spec)
    return activity, server.shown


def test_waiting_is_progress_and_one_thing_for_long_is_not(clock: Clock) -> None:
    activity = Activity()
    clock.now += 1000
    assert activity.stalled_s() == 0
    activity.busy()
    clock.now += 7
    assert activity.stalled_s() == 7
    with activity.waiting():
        clock.now += 1000
        assert activity.stalled_s() == 0
    assert activity.stalled_s() == 0, "it turned to something else"
    clock.now += 5
    activity.idle()
    assert activity.stalled_s() == 0


def test_a_long_step_counts_from_its_beginning(clock: Clock) -> None:
    activity = Activity()
    with activity.allowing(30):
        clock.now += 30
        assert activity.stalled_s() == 0
        clock.now += 1
        assert activity.stalled_s() == 31
    assert activity.stalled_s() == 0


def test_a_wait_that_raises_is_over(clock: Clock) -> None:
    activity = Activity()
    with pytest.raises(KeyError), activity.waiting("rendezvous"):
        raise KeyError
    clock.now += 3
    assert activity.stalled_s() == 3


def test_a_server_gets_each_change_once() -> None:
    activity, board = attached()
    activity.busy("spawning")
    activity.busy("spawning")
    workers = [Worker(0, 4), Worker(1, 5)]
    workers[0].id = 11
    activity.started(workers)
    assert board.told == [
        ("set_job", "the-run", "trainer"),
        ("set_state", "starting"),
        ("set_state", "spawning"),
        ("set_workers", [(0, 4, 11)]),
        ("set_state", "running"),
    ]


def test_phases_are_those_of_a_restart(clock: Clock) -> None:
    activity, board = attached()
    with activity.phase("rendezvous"):
        clock.now += 1
    activity.detected(0.25)
    activity.restarting("failure", "rank 1")
    with activity.phase("stop"):
        clock.now += 2
        activity.measured(1.5)
    with activity.phase("rendezvous"):
        clock.now += 3
    with pytest.raises(KeyError), activity.phase("spawn"):
        raise KeyError
    activity.started([])
    with activity.phase("spawn"):
        clock.now += 4
    assert board.told[2:] == [
        ("note_restart", "failure", "rank 1"),
        ("observe_phase", "detect", 0.25),
        ("observe_phase", "stop", 1.5),
        ("observe_phase", "rendezvous", 3.0),
        ("set_workers", []),
        ("set_state", "running"),
    ]


def test_an_observer_gets_each_measurement(clock: Clock) -> None:
    activity, observer = Activity(), Board()
    observed: Any = observer
    with activity.observed_by(observed):
        with activity.phase("rendezvous"):
            clock.now += 1
        with activity.phase("spawn"):
            clock.now += 2
            activity.released()
        activity.detected(-0.25)
        with activity.phase("stop"):
            clock.now += 3
            activity.measured(1.5)
        activity.giving_up("rank 1")
        activity.took("total", 9.0)
        activity.ended(None, [])
    activity.took("total", 10.0)
    assert observer.told == [
        ("took", "rendezvous", 1.0),
        ("took", "release", 2.0),
        ("took", "detect", 0.0),
        ("took", "stop", 1.5),
        ("decided", "failure", "rank 1", False),
        ("took", "total", 9.0),
    ]


def test_a_failure_that_was_looked_at_is_no_part_of_a_membership_change() -> None:
    activity, board = attached()
    activity.detected(0.25)
    activity.restarting("membership", "1 waiting to join")
    assert board.told[2:] == [("note_restart", "membership", "1 waiting to join")]


def test_a_closed_server_gets_no_more_updates() -> None:
    activity, board = attached()
    board.failure = RuntimeError("the supervision engine is closed")
    activity.busy("stopping")
    board.failure = AssertionError("told again")
    activity.busy("running")


def test_a_foreign_server_gets_no_updates() -> None:
    activity = Activity()
    spec: Any = None
    activity.attach(object(), spec)
    activity.busy("running")


def failure(rank: int, exitcode: int) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=exitcode, error_file="")


def test_the_cause_is_the_first_failure() -> None:
    first, second = failure(1, -9), failure(0, 7)
    first.timestamp -= 5
    result = RunResult(WorkerState.FAILED, failures={4: second, 5: first})
    assert cause_of(result) == "rank 5 (pid 101) was ended by SIGKILL, and 1 more failed"
    assert cause_of(RunResult(WorkerState.FAILED, failures={4: second})) == "rank 4 (pid 100) exited with code 7"
    assert cause_of(RunResult(WorkerState.UNHEALTHY)) == "workers are UNHEALTHY"


def test_the_report_has_the_last_restarts_of_many() -> None:
    activity = Activity()
    for number in range(100):
        activity.restarting("failure", f"cause {number}")
    assert [(index, cause) for index, cause, _ in activity.restarts] == [(n, f"cause {n}") for n in range(80, 100)]
