"""The loop of ``SimpleElasticAgent``, driven by a subclass as programs write it."""

from __future__ import annotations

import inspect
import json
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs
from tests.conformance.stubs import MASTER, RUN_ID, failed, in_state, succeeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.implementations import Implementation

NOTHING: dict[str, Any] = {}


@pytest.fixture
def make(impl: Implementation, store: Any) -> Callable[..., Any]:
    """Builds an agent: ``make(script, options of the agent, **fields of the specification)``."""

    def build(script: Any = (), options: dict[str, Any] = NOTHING, **fields: Any) -> Any:
        handler = fields.pop("rdzv_handler", None) or stubs.rendezvous(impl, store)
        return stubs.agent_class(impl)(stubs.spec(impl, handler, **fields), script, **options)

    return build


def failure(impl: Implementation, rank: int = 0, exitcode: int = 3) -> Any:
    return impl.errors.ProcessFailure(rank, 1000 + rank, exitcode, "/nonexistent")


@pytest.mark.needs("shutdown-timeout")
def test_a_new_agent(impl: Implementation, make: Callable[..., Any]) -> None:
    agent = make(max_restarts=5)
    assert agent.get_worker_group() is agent._worker_group
    assert agent.get_worker_group("any role") is agent._worker_group
    assert agent._remaining_restarts == 5
    assert (agent._exit_barrier_timeout, agent._shutdown_timeout, agent._total_execution_time) == (300, 30, 0)
    assert agent._store is None
    assert agent._in_exit_barrier is False
    assert isinstance(agent, impl.agent.ElasticAgent)


@pytest.mark.parametrize(("name", "arguments"), [("ElasticAgent", ()), ("SimpleElasticAgent", (None,))])
def test_abstract_classes(impl: Implementation, name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="abstract"):
        getattr(impl.agent, name)(*arguments)


def test_success(impl: Implementation, make: Callable[..., Any]) -> None:
    result = succeeded(impl, "zero", "one")
    agent = make([in_state(impl, "HEALTHY"), result], local_world_size=2)
    assert agent.run() is result
    assert agent.calls == ["start", ("shutdown", signal.SIGTERM, 30)]
    group = agent.get_worker_group()
    assert group.state == impl.agent.WorkerState.SUCCEEDED
    assert (group.group_rank, group.group_world_size, group.master_addr, group.master_port) == (0, 1, *MASTER)
    assert group.store is agent._store
    assert [worker.id for worker in group.workers] == [1000, 1001]
    assert [str(worker) for worker in group.workers] == [
        f"local_rank={rank},global_rank={rank},role_rank={rank},world_size=2,role_world_size=2" for rank in range(2)
    ]


def test_the_address_of_the_specification_wins(make: Callable[..., Any], impl: Implementation) -> None:
    agent = make([succeeded(impl, None)], master_addr="elsewhere", master_port=99)
    agent.run()
    group = agent.get_worker_group()
    assert (group.master_addr, group.master_port) == ("elsewhere", 99)


def test_failure_without_restarts(impl: Implementation, make: Callable[..., Any]) -> None:
    result = failed(impl, rank_0=failure(impl))
    agent = make([result], max_restarts=0)
    assert agent.run() is result
    assert agent.calls == ["start", "stop", ("shutdown", signal.SIGTERM, 30)]
    assert agent.get_worker_group().state == impl.agent.WorkerState.FAILED


@pytest.mark.parametrize("state", ["FAILED", "UNHEALTHY"])
def test_restart_then_success(impl: Implementation, make: Callable[..., Any], state: str) -> None:
    result = succeeded(impl, None)
    agent = make([in_state(impl, state), in_state(impl, state), result], max_restarts=3)
    assert agent.run() is result
    assert agent.calls[:-1] == ["start", "stop", "start", "stop", "start"]
    assert agent._remaining_restarts == 1
    assert agent.get_worker_group().spec.rdzv_handler.rounds == 3


@pytest.mark.parametrize("state", ["FAILED", "UNHEALTHY"])
def test_restarts_run_out(impl: Implementation, make: Callable[..., Any], state: str) -> None:
    last = in_state(impl, state)
    agent = make([in_state(impl, state), in_state(impl, state), last], max_restarts=2)
    assert agent.run() is last
    assert agent.calls[:-1] == ["start", "stop", "start", "stop", "start", "stop"]
    assert agent._remaining_restarts == 0
    assert agent.get_worker_group().state == impl.agent.WorkerState.FAILED


def test_an_exit_code_that_forbids_a_restart(impl: Implementation, make: Callable[..., Any]) -> None:
    agent = make([failed(impl, rank_0=failure(impl, exitcode=97)), succeeded(impl, None)], max_restarts=1)
    agent.run()
    assert agent.calls.count("start") == impl.expect("no-restart-code", torch=2, ours=1)


def test_failures_right_after_the_start_are_delayed(impl: Implementation, make: Callable[..., Any]) -> None:
    agent = make([failed(impl, rank_0=failure(impl))] * 2 + [succeeded(impl, None)], max_restarts=2)
    start = time.monotonic()
    agent.run()
    assert (time.monotonic() - start > 0.19) is impl.expect("restart-backoff", torch=False, ours=True)


def test_the_group_is_stopped_while_it_restarts(impl: Implementation, make: Callable[..., Any]) -> None:
    seen = []
    agent = make([in_state(impl, "FAILED"), succeeded(impl, None)])
    original = agent._initialize_workers

    def initialize_workers(group: Any) -> None:
        seen.append(group.state)
        original(group)

    agent._initialize_workers = initialize_workers
    agent.run()
    assert seen == [impl.agent.WorkerState.INIT, impl.agent.WorkerState.STOPPED]


def test_membership_changes_use_up_no_restarts(impl: Implementation, make: Callable[..., Any]) -> None:
    def somebody_waits(agent: Any) -> Any:
        agent.get_worker_group().spec.rdzv_handler.waiting = 1
        return in_state(impl, "HEALTHY")

    agent = make([somebody_waits, in_state(impl, "HEALTHY"), somebody_waits, succeeded(impl, None)], max_restarts=0)
    agent.run()
    assert agent.calls[:-1] == ["start", "stop", "start", "stop", "start"]
    assert agent._remaining_restarts == 0
    assert agent.get_worker_group().spec.rdzv_handler.rounds == 3


@pytest.mark.parametrize("state", ["UNKNOWN", "INIT", "STOPPED"])
def test_states_that_cannot_be(impl: Implementation, make: Callable[..., Any], state: str) -> None:
    agent = make([in_state(impl, state)])
    with pytest.raises(Exception, match=rf"^\[trainer\] Worker group in {state} state$"):
        agent.run()
    assert agent.calls == ["start", ("shutdown", signal.SIGTERM, 30)]


def test_workers_that_were_not_started(make: Callable[..., Any]) -> None:
    agent = make()
    agent._initialize_workers = lambda _group: None
    with pytest.raises(AssertionError):
        agent.run()


@pytest.mark.needs("shutdown-timeout")
@pytest.mark.parametrize("hook", ["_monitor_workers", "_initialize_workers", "_rendezvous", "_assign_worker_ranks"])
def test_an_exception_in_a_hook(make: Callable[..., Any], hook: str) -> None:
    error = RuntimeError("broken")

    def raise_error(*_arguments: Any) -> Any:
        raise error

    agent = make(options={"shutdown_timeout": 7})
    setattr(agent, hook, raise_error)
    with pytest.raises(RuntimeError) as raised:
        agent.run()
    assert raised.value is error
    assert agent.calls[-1] == ("shutdown", signal.SIGTERM, 7)
    assert agent.calls.count(agent.calls[-1]) == 1


@pytest.mark.needs("restart-flag")
def test_an_exception_in_a_restart(impl: Implementation, make: Callable[..., Any]) -> None:
    error = RuntimeError("cannot be stopped")

    def raise_error(_group: Any) -> Any:
        raise error

    agent = make([in_state(impl, "FAILED")])
    agent._stop_workers = raise_error
    with pytest.raises(RuntimeError, match="cannot be stopped"):
        agent.run()
    assert agent._remaining_restarts == 2


@pytest.mark.needs("shutdown-timeout")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["monitoring", "meeting"])
def test_a_signal(impl: Implementation, make: Callable[..., Any], number: signal.Signals, where: str) -> None:
    error = impl.mp.SignalException("told to end", number)
    agent = make([error], options={"shutdown_timeout": 12})
    if where == "meeting":
        agent.get_worker_group().spec.rdzv_handler.errors.append(error)
    with pytest.raises(impl.mp.SignalException) as raised:
        agent.run()
    assert raised.value is error
    assert [call for call in agent.calls if call != "start"] == [("shutdown", number, 12)]


@pytest.mark.needs("shutdown-timeout")
def test_a_second_signal_while_shutting_down(impl: Implementation, make: Callable[..., Any]) -> None:
    first = impl.mp.SignalException("first", signal.SIGTERM)
    second = impl.mp.SignalException("second", signal.SIGINT)
    agent = make([first], options={"shutdown_timeout": 12})
    calls: list[Any] = []

    def interrupted(death_sig: Any = signal.SIGTERM, timeout: int = 30) -> None:
        calls.append((death_sig, timeout))
        if len(calls) == 1:
            raise second

    agent._shutdown = interrupted
    with pytest.raises(impl.mp.SignalException) as raised:
        agent.run()
    assert calls == [(signal.SIGTERM, 12), (signal.SIGTERM, 12)]
    assert str(raised.value) == impl.expect("second-signal", torch="second", ours="first")


def test_a_node_that_is_not_needed(impl: Implementation, make: Callable[..., Any], metric_log: Any) -> None:
    agent = make()
    agent.get_worker_group().spec.rdzv_handler.errors.append(impl.rendezvous.RendezvousGracefulExitError("not needed"))
    result = agent.run()
    returned = None if result is None else (result.state.value, result.return_values, result.failures)
    assert returned == impl.expect("graceful-exit-result", torch=None, ours=("SUCCEEDED", {}, {}))
    assert agent.calls == [("shutdown", signal.SIGTERM, 30)]
    assert not any(name.startswith("workers.") for name in metric_log.names())


@pytest.mark.parametrize("name", ["RendezvousClosedError", "RendezvousTimeoutError", "RendezvousConnectionError"])
def test_a_rendezvous_that_fails(impl: Implementation, make: Callable[..., Any], name: str) -> None:
    error = getattr(impl.rendezvous, name)("no")
    agent = make()
    agent.get_worker_group().spec.rdzv_handler.errors.append(error)
    with pytest.raises(impl.rendezvous.RendezvousError) as raised:
        agent.run()
    assert raised.value is error


@pytest.mark.needs("exit-barrier-flag")
def test_other_agents_that_do_not_come_to_the_exit(impl: Implementation, store: Any, make: Callable[..., Any]) -> None:
    agent = make(
        [succeeded(impl, None)],
        options={"exit_barrier_timeout": 0.01},
        rdzv_handler=stubs.rendezvous(impl, store, 0, 2),
    )
    store.set("torchelastic/role_info/1", impl.agent._RoleInstanceInfo("trainer", 1, 1).serialize())
    assert not agent.run().is_failed()
    assert agent._in_exit_barrier is False
    assert store.add("torchelastic/agent/terminal_state/num_members", 0) == 1


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_error_in_the_exit_barrier(impl: Implementation, make: Callable[..., Any], kind: type[Exception]) -> None:
    agent = make([succeeded(impl, 5)])

    def lose_the_store(agent: Any) -> Any:
        agent._store = BrokenStore(kind)
        return succeeded(impl, 5)

    agent.script = iter([lose_the_store])
    assert agent.run().return_values == {0: 5}


@pytest.mark.needs("exit-barrier-flag")
def test_a_signal_in_the_exit_barrier(impl: Implementation, make: Callable[..., Any]) -> None:
    def lose_the_store(agent: Any) -> Any:
        agent._store = BrokenStore(lambda text: impl.mp.SignalException(text, signal.SIGTERM))
        return succeeded(impl, 5)

    agent = make([lose_the_store])
    with pytest.raises(impl.mp.SignalException):
        agent.run()
    assert agent._in_exit_barrier is False


class BrokenStore:
    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        raise self.kind(f"no {name}")


@pytest.mark.parametrize(
    ("restarts", "limit", "outcome", "counted", "flakiness"),
    [
        (0, 3, "SUCCEEDED", "run_success_no_retries", 0),
        (1, 3, "SUCCEEDED", "run_success_with_retries", 25),
        (3, 3, "SUCCEEDED", "run_success_with_retries", 75),
        (0, 0, "SUCCEEDED", "run_success_no_retries", 0),
        (0, 0, "FAILED", "run_failed_no_retries", 100),
        (2, 2, "FAILED", "run_failed_with_retries", 100),
    ],
)
def test_metrics(
    impl: Implementation,
    make: Callable[..., Any],
    metric_log: Any,
    restarts: int,
    limit: int,
    outcome: str,
    counted: str,
    flakiness: int,
) -> None:
    last = succeeded(impl, None) if outcome == "SUCCEEDED" else failed(impl, rank_0=failure(impl))
    make([*[in_state(impl, "FAILED")] * restarts, last], max_restarts=limit).run()
    outcomes = [
        "run_success_with_retries",
        "run_success_no_retries",
        "run_failed_with_retries",
        "run_failed_no_retries",
    ]
    assert metric_log.values("workers.trainer.") == {
        "run_total": 1,
        **{name: int(name == counted) for name in outcomes},
        "flakiness": flakiness,
        "remaining_restarts": limit - restarts,
        **({"failed": 1} if restarts else {}),
        outcome.lower(): 1,
    }
    assert {point.group_name for point in metric_log.data} == {"torchelastic"}


def test_the_order_of_metrics(impl: Implementation, make: Callable[..., Any], metric_log: Any) -> None:
    make([in_state(impl, "HEALTHY"), in_state(impl, "FAILED"), succeeded(impl, None)]).run()
    start = [
        "SimpleElasticAgent._assign_worker_ranks.success",
        "SimpleElasticAgent._assign_worker_ranks.duration.ms",
        "SimpleElasticAgent._rendezvous.success",
        "SimpleElasticAgent._rendezvous.duration.ms",
        "SimpleElasticAgent._initialize_workers.success",
        "SimpleElasticAgent._initialize_workers.duration.ms",
    ]
    look = "workers.trainer.remaining_restarts"
    names = metric_log.names()
    assert any(name.startswith("phase.") for name in names) == impl.expect("more-events", torch=False, ours=True)
    assert [name for name in names if not name.startswith("phase.")] == [
        *start,
        *(look, "workers.trainer.healthy"),
        *(look, "workers.trainer.failed"),
        *start,
        "SimpleElasticAgent._restart_workers.success",
        "SimpleElasticAgent._restart_workers.duration.ms",
        *(look, "workers.trainer.succeeded"),
        "workers.trainer.flakiness",
        "workers.trainer.run_total",
        "workers.trainer.run_success_with_retries",
        "workers.trainer.run_success_no_retries",
        "workers.trainer.run_failed_with_retries",
        "workers.trainer.run_failed_no_retries",
        "SimpleElasticAgent.run.success",
        "SimpleElasticAgent.run.duration.ms",
    ]


def test_a_stuck_worker_counts_as_a_failed_run(impl: Implementation, make: Callable[..., Any], metric_log: Any) -> None:
    make([in_state(impl, "UNHEALTHY")], max_restarts=0).run()
    counted = metric_log.values("workers.trainer.")
    assert counted["run_failed_no_retries"] == impl.expect("stuck-is-failed", torch=0, ours=1)
    assert counted["flakiness"] == impl.expect("stuck-is-failed", torch=0, ours=100)


@pytest.mark.needs("exit-codes-of-events")
def test_events_of_a_failed_run(impl: Implementation, make: Callable[..., Any], event_log: Any, tmp_path: Any) -> None:
    error_file = tmp_path / "error.json"
    error = {"message": {"message": "boom", "extraInfo": {"py_callstack": "trace", "timestamp": "17"}}}
    error_file.write_text(json.dumps(error))
    result = failed(impl, rank_1=impl.errors.ProcessFailure(1, 4711, 9, str(error_file)))
    agent = make([result], local_world_size=2, max_restarts=0, event_log_handler=event_log.name)
    agent.run()
    status = "torchelastic.worker.status."
    names = [event["name"] for event in event_log.events]
    assert all(name.startswith(status) for name in names) == impl.expect("more-events", torch=True, ours=False)
    assert [name for name in names if name.startswith(status)] == [
        f"{status}{state}" for state in ("RENDEZVOUS", "ASSIGN_WORKER_RANKS", "START", "START", "TERMINATED", "FAILED")
    ]
    meeting = event_log.events[0]
    assert (meeting["source"], meeting["timestamp"], meeting["metadata"]["global_rank"]) == ("AGENT", 0, None)
    assert meeting["metadata"]["duration_ms"] >= 0
    (last,) = event_log.named(f"{status}FAILED")
    assert last == {
        "name": f"{status}FAILED",
        "source": "WORKER",
        "timestamp": 0,
        "metadata": {
            "run_id": RUN_ID,
            "global_rank": 1,
            "group_rank": 0,
            "worker_id": "1001",
            "role": "trainer",
            "hostname": impl.agent._get_fq_hostname(),
            "state": "FAILED",
            "total_run_time": 0,
            "rdzv_backend": "stub",
            "raw_error": json.dumps(error),
            "metadata": {
                "group_world_size": 1,
                "entry_point": "entrypoint",
                "local_rank": [1],
                "role_rank": [1],
                "role_world_size": [2],
                "exit_code": [9],
                "worker_pid": [4711],
            },
            "agent_restarts": 0,
            "duration_ms": None,
        },
    }
    (stopped,) = event_log.named(f"{status}TERMINATED")
    assert stopped["metadata"]["raw_error"] is None
    assert stopped["metadata"]["metadata"]["exit_code"] == [None]


@pytest.mark.needs("event-log-handler")
def test_events_of_a_run_that_succeeded(impl: Implementation, make: Callable[..., Any], event_log: Any) -> None:
    agent = make(
        [in_state(impl, "FAILED"), succeeded(impl, "a", "b")], local_world_size=2, event_log_handler=event_log.name
    )
    agent.run()
    ends = event_log.named("torchelastic.worker.status.SUCCEEDED")
    assert [event["metadata"]["global_rank"] for event in ends] == [0, 1]
    assert {event["metadata"]["agent_restarts"] for event in ends} == {1}


def test_events_of_the_agent_itself(impl: Implementation, make: Callable[..., Any]) -> None:
    agent = make()
    try:
        raise ValueError("what happened")
    except ValueError:
        event = agent.get_event_failed()
    assert (event.name, event.source.value) == ("torchelastic.worker.status.FAILED", "AGENT")
    assert "ValueError: what happened" in event.metadata["raw_error"]
    event = agent.get_event_succeeded()
    assert event.name == "torchelastic.worker.status.SUCCEEDED"
    assert (event.metadata["state"], event.metadata["worker_id"], event.metadata["global_rank"]) == (
        "SUCCEEDED",
        None,
        None,
    )
    assert json.loads(event.metadata["metadata"]) == {"group_world_size": None, "entry_point": "entrypoint"}
    assert isinstance(event, impl("events").Event)


@pytest.mark.needs("event-log-handler")
def test_durations_are_recorded_also_after_an_error(make: Callable[..., Any], event_log: Any) -> None:
    agent = make(event_log_handler=event_log.name)
    with pytest.raises(KeyError), agent.record_duration("MY_STEP"):
        raise KeyError
    (event,) = event_log.named("torchelastic.worker.status.MY_STEP")
    assert event["metadata"]["duration_ms"] >= 0


@pytest.mark.parametrize(
    ("state", "failed_ranks", "returned_ranks", "expected"),
    [
        ("FAILED", [0], [], "FAILED"),
        ("FAILED", [1], [], "TERMINATED"),
        ("UNHEALTHY", [], [], "TERMINATED"),
        ("SUCCEEDED", [], [0], "SUCCEEDED"),
        ("SUCCEEDED", [], [1], None),
    ],
)
def test_state_of_a_worker(
    impl: Implementation,
    make: Callable[..., Any],
    state: str,
    failed_ranks: list[int],
    returned_ranks: list[int],
    expected: str | None,
) -> None:
    result = in_state(impl, state)
    result.failures = {rank: failure(impl, rank) for rank in failed_ranks}
    result.return_values = dict.fromkeys(returned_ranks)
    worker = impl.agent.Worker(local_rank=0, global_rank=0)
    if expected is None:
        with pytest.raises(ValueError, match="Unknown worker: 0"):
            make()._get_worker_state(worker, result)
    else:
        assert make()._get_worker_state(worker, result) == expected


def test_the_wait_between_looks(impl: Implementation, make: Callable[..., Any], monkeypatch: Any) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    make([in_state(impl, "HEALTHY"), succeeded(impl, None)], monitor_interval=0.25).run()
    assert slept == [0.25, 0.25]


@pytest.mark.needs("shutdown-timeout")
def test_a_shutdown_without_arguments(impl: Implementation, make: Callable[..., Any]) -> None:
    """Subclasses for torch before 2.12 have no ``timeout``."""
    agent = make([succeeded(impl, 1)])
    calls = []

    def shutdown(death_sig: Any = signal.SIGTERM) -> None:
        calls.append(death_sig)

    agent._shutdown = shutdown

    def runs() -> bool:
        try:
            agent.run()
        except TypeError:
            return False
        return True

    assert runs() == impl.expect("older-shutdown", torch=False, ours=True)
    assert inspect.signature(impl.agent.SimpleElasticAgent._shutdown).parameters["timeout"].default == 30
