"""Processes forked while the engine runs: workers of the start method ``fork``, and children that use what they must not."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import traceback
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.forking import fork
from tests.support.harness import Gate
from tests.support.rendezvous_handlers import AloneRendezvous

from ferroelastic import _rust
from ferroelastic._engine import get_engine
from ferroelastic._rust import (
    Command,
    Engine,
    FailureFacts,
    ForkedError,
    Guard,
    LogRules,
    RendezvousClient,
    StoreClient,
    StoreServer,
)
from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec, WorkerState
from ferroelastic.multiprocessing import DefaultLogsSpecs, MultiprocessContext, Std

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engine

RESTARTS = 5


def fail_until_the_last_attempt(gate: str) -> str:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    print(f"attempt {attempt}", flush=True)
    if attempt < RESTARTS:
        with open(gate) as opened:
            os.read(opened.fileno(), 1)
        os._exit(attempt + 1)
    return f"{os.environ['RANK']} of attempt {attempt}"


def fail_at_once() -> None:
    if os.environ["RANK"] == "0":
        os._exit(3)
    threading.Event().wait()  # until it is stopped


def agent_of(function: Callable[..., Any], *args: Any, log_dir: Path, max_restarts: int = 0) -> LocalElasticAgent:
    spec = WorkerSpec(
        role="fork",
        local_world_size=2,
        rdzv_handler=AloneRendezvous(),
        entrypoint=function,
        args=args,
        max_restarts=max_restarts,
    )
    return LocalElasticAgent(spec, DefaultLogsSpecs(str(log_dir / "logs"), tee=Std.OUT), start_method="fork")


def test_forked_workers_come_back_again_and_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is forked from a process in which the engine runs and copies the output of the others."""
    gate = Gate(tmp_path / "gate")
    agent = agent_of(fail_until_the_last_attempt, str(gate.path), log_dir=tmp_path, max_restarts=RESTARTS)
    original = agent._wait_for_event

    def wait_for_event(timeout_s: float) -> None:
        if agent._remaining_restarts > 0:
            gate.let_pass()  # one fails, its peer is stopped
        original(timeout_s)

    monkeypatch.setattr(agent, "_wait_for_event", wait_for_event)
    result = agent.run()
    gate.close()
    assert result.state == WorkerState.SUCCEEDED
    assert result.return_values == {rank: f"{rank} of attempt {RESTARTS}" for rank in (0, 1)}
    assert agent._remaining_restarts == 0
    shown = capfd.readouterr().out.splitlines()
    assert set(shown) <= {f"[fork{rank}]:attempt {attempt}" for attempt in range(RESTARTS + 1) for rank in (0, 1)}
    assert {line[-1] for line in shown} == {str(attempt) for attempt in range(RESTARTS + 1)}


def test_a_worker_that_fails_while_its_peers_are_started_ends_the_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = MultiprocessContext._start_processes

    def start_one_by_one(context: MultiprocessContext, processes: list[Any]) -> None:
        start(context, processes[:1])
        processes[0].join()
        start(context, processes[1:])

    def give_up(*_: object) -> None:
        raise TimeoutError("the agent does not notice")

    monkeypatch.setattr(MultiprocessContext, "_start_processes", start_one_by_one)
    agent = agent_of(fail_at_once, log_dir=tmp_path)
    former = signal.signal(signal.SIGALRM, give_up)
    exit_codes: list[int] = []
    signal.alarm(5)
    try:
        with suppress(TimeoutError):
            exit_codes += [failure.exitcode for failure in agent.run().failures.values()]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        del agent  # lest the failure of this test hold on to its descriptors
    assert exit_codes == [3]


def outcome_in_child(body: Callable[[], Any]) -> Any:
    """What ``body`` returns in a forked child, which then ends without cleaning up after its parent."""
    read_fd, write_fd = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            outcome = json.dumps(body())
        except BaseException:  # noqa: BLE001 - told to the parent
            outcome = json.dumps(traceback.format_exc())
        os.write(write_fd, outcome.encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd) as outcome_file:
        text = outcome_file.read()
    assert os.waitpid(pid, 0) == (pid, 0)
    return json.loads(text)


class Parent:
    """Engine objects in use: a worker that waits for a line, and a tail of a file."""

    def __init__(self, folder: Path) -> None:
        self.gate = folder / "gate"
        os.mkfifo(self.gate)
        self.log = folder / "log"
        self.engine: Any = get_engine()
        self.group: Any = self.engine.spawn([Command(["/bin/sh", "-c", f"read x < {self.gate}; exit 7"], {})])
        self.console_read, self.console_write = os.pipe()
        self.tail: Any = self.engine.tail([(str(self.log), "> ")], console_fd=self.console_write)

    def check_that_all_still_works(self) -> None:
        self.log.write_text("a line\n")
        assert os.read(self.console_read, 100) == b"> a line\n"
        self.tail.finish(5.0)
        os.close(self.console_read)
        os.close(self.console_write)
        self.gate.write_text("\n")
        assert self.group.wait(0, 60.0) == "event"
        assert [ended.code for ended in self.group.exits()] == [7]


# What a child may read of its parent's objects: values that never change, and its own copy of the health server's socket.
HARMLESS = {
    "Engine": {"backend"},
    "Group": {"pids", "warm"},
    "Guard": {"pid", "forked"},
    "HealthServer": {"host", "port", "close"},
    "Relay": {"is_terminal"},
    "StoreServer": {"port"},
    "Watchdog": {"path"},
}
ONE = [(0, "scope", 1.0, 0)]
USES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "Group": {
        "generation": lambda group: group.generation,
        "scan_logs": lambda group: group.scan_logs([], LogRules()),
        "log_failures": lambda group: group.log_failures(),
        "exits": lambda group: group.exits(),
        "wait": lambda group: group.wait(0, 60.0),
        "signal": lambda group: group.signal(0, 9),
        "stop": lambda group: group.stop(15, 1.0, 1.0),
        "stop_on_failure": lambda group: group.stop_on_failure(15, 1.0, 1.0),
        "end_grace": lambda group: group.end_grace(),
        "stop_report": lambda group: group.stop_report(),
    },
    "Tail": {"finish": lambda tail: tail.finish(1.0)},
    "LogRotation": {"close": lambda rotation: rotation.close(1.0)},
    "LogScan": {"finish": lambda scan: scan.finish(1.0)},
    "Relay": {
        "worker_end": lambda relay: relay.worker_end(0),
        "last": lambda relay: relay.last(0),
        "flush": lambda relay: relay.flush(1.0),
        "finish": lambda relay: relay.finish(1.0),
    },
    "Engine": {
        "relay": lambda engine: engine.relay(1, console_fd=2),
        "spawn": lambda engine: engine.spawn([]),
        "observe": lambda engine: engine.observe([os.getpid()]),
        "rotate_logs": lambda engine: engine.rotate_logs([], max_size=1, max_files=1),
        "tail": lambda engine: engine.tail([("/dev/null", "")], console_fd=1),
        "watchdog": lambda engine: engine.watchdog("/nowhere/pipe"),
        "health_server": lambda engine: engine.health_server("127.0.0.1", 0, 1.0),
        "adopt_guard": lambda engine: engine.adopt_guard(Guard("NAME", "token", ["/bin/true"], {})),
        "dismiss_guard": lambda engine: engine.dismiss_guard(1.0),
        "own_orphans": lambda engine: engine.own_orphans(),
        "take_warnings": lambda engine: engine.take_warnings(),
        "use_cgroup": lambda engine: engine.use_cgroup(None),
        "watch_lease": lambda engine: engine.watch_lease(RendezvousClient("127.0.0.1", 1, "job")),
        "warm_pool": lambda engine: engine.warm_pool(Command(["/bin/true"], {}), b"", children=1, timeout_s=1.0),
        "close": lambda engine: engine.close(),
    },
    "WarmPool": {
        "state": lambda pool: pool.state(),
        "generation": lambda pool: pool.generation,
        "wait": lambda pool: pool.wait(0, 60.0),
        "find_changed": lambda pool: pool.find_changed(),
        "resize": lambda pool: pool.resize(1),
        "release": lambda pool: pool.release(Command(["/bin/true"], {}), {}),
        "close": lambda pool: pool.close(1.0),
    },
    "StoreServer": {"close": lambda server: server.close()},
    "StoreClient": {
        "add": lambda client: client.add(b"key", 1),
        "append": lambda client: client.append(b"key", b"value"),
        "check": lambda client: client.check([b"key"]),
        "compare_set": lambda client: client.compare_set(b"key", b"", b"value"),
        "delete": lambda client: client.delete(b"key"),
        "get": lambda client: client.get([b"key"], 1.0),
        "multi_set": lambda client: client.multi_set([(b"key", b"value")]),
        "num_keys": lambda client: client.num_keys(),
        "set": lambda client: client.set(b"key", b"value"),
        "set_timeout": lambda client: client.set_timeout(1.0),
        "wait": lambda client: client.wait([b"key"], 1.0),
    },
    "RendezvousClient": {
        "address": lambda client: client.address,
        "alarm_fd": lambda client: client.alarm_fd,
        "end": lambda client: client.end("text", 1),
        "fail": lambda client: client.fail(1, "text", 1, FailureFacts()),
        "finish": lambda client: client.finish(),
        "progress": lambda client: client.progress(),
        "generation": lambda client: client.generation,
        "join": lambda client: client.join("role", 1, 1.0),
        "leave": lambda client: client.leave("text"),
        "membership": lambda client: client.membership(),
        "stop_within_s": lambda client: client.stop_within_s,
        "take_warnings": lambda client: client.take_warnings(),
        "wait": lambda client: client.wait(0, 60.0),
        "close": lambda client: client.close(),
    },
    "Guard": {"adoption by an engine of the child": lambda guard: Engine().adopt_guard(guard)},
    "Watchdog": {
        "start": lambda watchdog: watchdog.start(),
        "set_workers": lambda watchdog: watchdog.set_workers([]),
        "register": lambda watchdog: watchdog.register(ONE),
        "clear": lambda watchdog: watchdog.clear([1]),
        "timers": lambda watchdog: watchdog.timers(),
        "expiry": lambda watchdog: watchdog.expiry(1),
        "counts": lambda watchdog: watchdog.counts(),
        "last_request_age_s": lambda watchdog: watchdog.last_request_age_s(1),
        "overdue_s": lambda watchdog: watchdog.overdue_s(),
        "next_expiries": lambda watchdog: watchdog.next_expiries(),
        "drain": lambda watchdog: watchdog.drain(),
        "close": lambda watchdog: watchdog.close(),
    },
    "HealthServer": {
        "next_question": lambda server: server.next_question(),
        "answer": lambda server: server.answer(1.0),
        "answer_failed": lambda server: server.answer_failed("text"),
        "set_job": lambda server: server.set_job("id", "role"),
        "set_state": lambda server: server.set_state("running"),
        "set_workers": lambda server: server.set_workers([]),
        "note_decision": lambda server: server.note_decision("at_once", "text"),
        "note_restart": lambda server: server.note_restart("failure", "text"),
        "note_warm_refusal": lambda server: server.note_warm_refusal("text"),
        "observe_phase": lambda server: server.observe_phase("stop", 1.0),
    },
}


@pytest.mark.parametrize("name", USES)
def test_each_method_is_in_the_table(name: str) -> None:
    public = {member for member in dir(getattr(_rust, name)) if not member.startswith("_")}
    assert public - HARMLESS.get(name, set()) == {use for use in USES[name] if use.isidentifier()}


def test_a_forked_child_cannot_use_objects_of_its_parent(tmp_path: Path) -> None:
    parent = Parent(tmp_path)
    with ExitStack() as stack:
        server = stack.enter_context(closing(StoreServer("127.0.0.1", run_id="job")))
        watchdog = stack.enter_context(closing(parent.engine.watchdog(str(tmp_path / "pipe"))))
        health = stack.enter_context(closing(parent.engine.health_server("127.0.0.1", 0, 60.0)))
        rendezvous = stack.enter_context(closing(RendezvousClient("127.0.0.1", server.port, "job")))
        pools = {}
        if parent.engine.backend == "pidfd":  # a pool needs pidfds
            pool = parent.engine.warm_pool(Command(["/bin/sleep", "60"], {}), b"", children=1, timeout_s=60.0)
            stack.callback(pool.close, 60.0)
            pools["WarmPool"] = pool
        guard = Guard("FERRO_TEST_GUARD", "token", ["/bin/true"], {})
        objects = {
            "Engine": parent.engine,
            "Group": parent.group,
            "Tail": parent.tail,
            "LogRotation": parent.engine.rotate_logs([], max_size=1, max_files=1),
            "LogScan": parent.group.scan_logs([], LogRules()),
            "Relay": parent.engine.relay(1, console_fd=2),
            **pools,
            "StoreServer": server,
            "StoreClient": StoreClient("127.0.0.1", server.port, 60.0),
            "RendezvousClient": rendezvous,
            "Guard": guard,
            "Watchdog": watchdog,
            "HealthServer": health,
        }

        assert USES.keys() - objects.keys() <= {"WarmPool"} - pools.keys()

        def use_everything() -> list[str]:
            allowed = []
            for name, value in objects.items():
                for use, call in USES[name].items():
                    try:
                        call(value)
                    except ForkedError:
                        continue
                    allowed.append(f"{name}: {use}")
            return allowed

        assert outcome_in_child(use_everything) == []
        objects["StoreClient"].set(b"key", b"value")
        assert objects["StoreClient"].get([b"key"], 60.0) == [b"value"]
        assert rendezvous.membership().state == "idle"
        assert watchdog.counts().armed == 0
        objects.clear()
        del guard
    parent.check_that_all_still_works()


def test_a_forked_child_that_drops_objects_of_its_parent_takes_nothing_from_it(tmp_path: Path) -> None:
    parent = Parent(tmp_path)

    def drop() -> str:
        # The engine's poller is shared with the parent: to deregister something here would deregister it there.
        parent.group = parent.tail = parent.engine = None
        gc.collect()
        return "dropped"

    assert outcome_in_child(drop) == "dropped"
    parent.check_that_all_still_works()


def test_a_forked_child_can_have_an_engine_of_its_own(tmp_path: Path) -> None:
    parent = Parent(tmp_path)

    def supervise() -> list[Any]:
        engine = get_engine()
        assert isinstance(engine, Engine)
        assert engine is not parent.engine
        group = engine.spawn([Command(["/bin/sh", "-c", "exit 5"], {})])
        outcome = group.wait(0, 60.0)
        codes = [ended.code for ended in group.exits()]
        return [outcome, codes, engine.close()]

    assert outcome_in_child(supervise) == ["event", [5], True]
    parent.check_that_all_still_works()
