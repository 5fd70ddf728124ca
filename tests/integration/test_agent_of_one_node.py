"""The agent of one host, with a rendezvous that needs nobody else."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.support.function_workers import is_held
from tests.support.rendezvous_handlers import GrowingRendezvous
from tests.support.waiting import eventually

from ferroelastic import _signals
from ferroelastic.agent.server import LocalElasticAgent, RunResult, WorkerSpec, WorkerState
from ferroelastic.agent.server import local_elastic_agent as module
from ferroelastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException, Std
from ferroelastic.utils.process_state import read_proc_state

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.waiting import WhenWaiting

SOON_S = 10.0


def give_rank(factor: int) -> int:
    return int(os.environ["RANK"]) * factor


def fail_unless_restarted() -> int:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def return_at_once_or_fail_beside_one_that_is_held(folder: str) -> str:
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    if rank == "0":
        Path(folder, f"pid {attempt}").write_text(str(os.getpid()))
    elif attempt == "0":
        assert eventually(lambda: Path(folder, "pid 0").exists() and is_held(int(content(folder, "pid 0"))), SOON_S)
        os._exit(7)
    return f"rank {rank}, attempt {attempt}"


def content(folder: str, name: str) -> str:
    return Path(folder, name).read_text() or "0"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LocalElasticAgent]]:
    agents: list[LocalElasticAgent] = []

    def build(entrypoint: Any, *args: Any, nproc: int = 2, agent: dict[str, Any] | None = None, **spec: Any) -> Any:
        options = {"start_method": "fork", "exit_barrier_timeout": 5, **(agent or {})}
        logs = DefaultLogsSpecs(
            str(tmp_path / "logs"), redirects=options.pop("redirects", Std.NONE), tee=options.pop("tee", Std.NONE)
        )
        chosen = {"max_restarts": 0, "monitor_interval": 600, "role": "trainer", **spec}
        worker_spec = WorkerSpec(
            local_world_size=nproc, rdzv_handler=GrowingRendezvous(), entrypoint=entrypoint, args=args, **chosen
        )
        agents.append(LocalElasticAgent(worker_spec, logs, **options))
        return agents[-1]

    yield build
    for one in agents:
        one._shutdown(signal.SIGKILL, 0)
        one._pcontext = None


def shell(make: Callable[..., LocalElasticAgent], script: str, **options: Any) -> LocalElasticAgent:
    return make("/bin/sh", "-c", script, **options)


def pids(agent: LocalElasticAgent) -> list[int]:
    assert agent._pcontext is not None
    return list(agent._pcontext.pids().values())


def handler(agent: LocalElasticAgent) -> Any:
    return agent._rdzv_handler


def test_functions_return_their_values_by_global_rank(make: Callable[..., LocalElasticAgent]) -> None:
    result = make(give_rank, 10, nproc=3).run()
    assert result.state == WorkerState.SUCCEEDED
    assert result.return_values == {0: 0, 1: 10, 2: 20}


def test_an_exit_is_noticed_long_before_the_monitor_interval(make: Callable[..., LocalElasticAgent]) -> None:
    start = time.monotonic()
    assert not shell(make, "exit 0", monitor_interval=600).run().is_failed()
    assert shell(make, "exit 3", monitor_interval=600).run().is_failed()
    assert time.monotonic() - start < SOON_S


def test_a_signal_to_worker_and_agent_restarts_nothing(
    make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The end of the worker is seen first. The agent waits for its own signal before it restarts the workers."""
    signals = SimpleNamespace(monotonic_ns=time.monotonic_ns, sleep=lambda _: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(_signals, "time", signals)
    agent = shell(make, f"echo >> {tmp_path}/started; kill -TERM $$$$", nproc=1, max_restarts=3)
    with pytest.raises(SignalException):
        agent.run()
    assert (tmp_path / "started").read_text() == "\n"


def test_only_the_worker_that_failed_is_a_failure(make: Callable[..., LocalElasticAgent]) -> None:
    agent = shell(make, 'if [ "$RANK" = 1 ]; then exit 42; fi; exec sleep 1000', nproc=3)
    result = agent.run()
    assert result.state == WorkerState.FAILED
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {1: 42}
    assert all(read_proc_state(pid) is None for pid in pids(agent))


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_a_failed_worker_is_restarted_with_its_group(make: Callable[..., LocalElasticAgent], start_method: str) -> None:
    agent = make(fail_unless_restarted, max_restarts=2, agent={"start_method": start_method})
    result = agent.run()
    assert result.return_values == {0: 1, 1: 1}
    assert agent._remaining_restarts == 1
    assert handler(agent).rounds == 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_restart_lets_go_of_functions_that_have_returned_and_runs_them_again(
    make: Callable[..., LocalElasticAgent], tmp_path: Path, method: str
) -> None:
    agent = make(
        return_at_once_or_fail_beside_one_that_is_held, str(tmp_path), max_restarts=1, agent={"start_method": method}
    )
    assert agent.run().return_values == {0: "rank 0, attempt 1", 1: "rank 1, attempt 1"}
    assert agent._remaining_restarts == 0


def test_restarts_run_out_and_every_attempt_keeps_its_logs(
    make: Callable[..., LocalElasticAgent], tmp_path: Path
) -> None:
    agent = shell(
        make, "echo $TORCHELASTIC_RESTART_COUNT; exit 9", max_restarts=2, nproc=1, agent={"redirects": Std.OUT}
    )
    result = agent.run()
    assert result.failures[0].exitcode == 9
    outputs = {path.parts[-3]: path.read_text() for path in tmp_path.glob("logs/*/*/0/stdout.log")}
    assert outputs == {"attempt_0": "0\n", "attempt_1": "1\n", "attempt_2": "2\n"}


def test_a_membership_change_restarts_without_using_an_attempt_or_deleting_logs(
    make: Callable[..., LocalElasticAgent], tmp_path: Path
) -> None:
    agent = shell(
        make,
        f"if mkdir {tmp_path}/first 2>/dev/null; then exec sleep 1000; else exit 0; fi",
        nproc=1,
        monitor_interval=0.01,
        agent={"redirects": Std.OUT},
    )
    original = agent._monitor_workers

    def monitor(group: Any) -> RunResult:
        handler(agent).waiting = int(handler(agent).rounds == 1 and (tmp_path / "first").exists())
        return original(group)

    agent._monitor_workers = monitor  # type: ignore[method-assign,assignment]  # what subclasses do
    assert agent.run().state == WorkerState.SUCCEEDED
    assert handler(agent).rounds == 2
    assert sorted(path.parts[-3] for path in tmp_path.glob("logs/*/*/0/stdout.log")) == ["attempt_0", "attempt_0.1"]


def test_the_environment_of_workers(
    make: Callable[..., LocalElasticAgent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    code = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    agent = make("python3", "-c", code, f"{tmp_path}/${{local_rank}}.json", max_restarts=5)
    agent.run()
    env = json.loads((tmp_path / "1.json").read_text())
    expected = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "0",
        "ROLE_RANK": "1",
        "ROLE_NAME": "trainer",
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4242",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "5",
        "TORCHELASTIC_RUN_ID": "run",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "OMP_NUM_THREADS": "3",
    }
    assert {name: env.get(name) for name in expected} == expected
    assert env["TORCHELASTIC_ERROR_FILE"].endswith("/attempt_0/1/error.json")
    assert "CUDA_VISIBLE_DEVICES" not in env


@pytest.mark.parametrize(
    ("visible", "virtual", "expected"),
    [
        (None, False, {"LOCAL_RANK": "1"}),
        ("4,5", False, {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,5"}),
        (None, True, {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "1"}),
        ("4, GPU-5", True, {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "GPU-5"}),
    ],
)
def test_devices_of_workers(
    make: Callable[..., LocalElasticAgent],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    virtual: bool,
    expected: dict[str, str],
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    agent = make("true", virtual_local_rank=virtual)
    env: dict[str, str] = {}
    agent._set_local_rank_env(env, 1, agent._worker_group.spec)
    assert env == expected
    if virtual and visible:
        with pytest.raises(ValueError, match="local_rank 2 exceeds available GPUs"):
            agent._set_local_rank_env({}, 2, agent._worker_group.spec)


def test_prefixes_of_teed_lines(make: Callable[..., LocalElasticAgent], capfd: pytest.CaptureFixture[str]) -> None:
    template = "[${role_name} ${rank}/${local_rank} ${unknown}]"
    shell(make, "echo hi", nproc=1, agent={"tee": Std.OUT, "log_line_prefix_template": template}).run()
    assert capfd.readouterr().out == "[trainer 0/0 ${unknown}]hi\n"


def test_a_signal_ends_the_run_and_the_workers(
    make: Callable[..., LocalElasticAgent], when_waiting: WhenWaiting
) -> None:
    agent = shell(make, "exec sleep 1000")
    when_waiting(os.kill, os.getpid(), signal.SIGTERM)
    start = time.monotonic()
    with pytest.raises(SignalException) as raised:
        agent.run()
    assert time.monotonic() - start < SOON_S
    assert raised.value.sigval == signal.SIGTERM
    assert all(read_proc_state(pid) is None for pid in pids(agent))


def test_the_shutdown_timeout_is_the_grace_after_a_failure(
    make: Callable[..., LocalElasticAgent], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    script = f"""
        if [ $RANK = 0 ]; then trap '' TERM; : > {tmp_path}/fifo; exec sleep 1000; fi
        read x < {tmp_path}/fifo; exit 7
    """
    agent = shell(make, script, agent={"shutdown_timeout": 1})
    start = time.monotonic()
    result = agent.run()
    assert 1 <= time.monotonic() - start < SOON_S
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {1: 7}


@pytest.mark.parametrize("explicit", [None, 17])
def test_stopping_and_shutting_down_hand_the_timeout_on(
    make: Callable[..., LocalElasticAgent], explicit: int | None
) -> None:
    agent = make("true", agent={"shutdown_timeout": 150})
    agent._pcontext = mock.MagicMock(spec=PContext)
    if explicit is None:
        agent._stop_workers(agent._worker_group)
        agent._pcontext.close.assert_called_once_with(signal.SIGTERM, 150)
    else:
        agent._shutdown(signal.SIGINT, explicit)
        agent._pcontext.close.assert_called_once_with(signal.SIGINT, explicit)


def test_pids_that_do_not_match_are_an_unknown_state(make: Callable[..., LocalElasticAgent]) -> None:
    agent = make("true")
    agent._pcontext = mock.MagicMock(spec=PContext)
    agent._pcontext.pids.return_value = {0: 1, 1: 2}
    assert agent._monitor_workers(agent._worker_group).state == WorkerState.UNKNOWN


def test_without_native_workers_it_waits_as_the_base_class(
    make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    make("true")._wait_for_event(12.5)
    assert slept == [12.5]


# ---- a worker that is stuck in the kernel


def test_a_stuck_worker_is_a_failure_that_ends_the_job(
    make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_proc_state", lambda _pid: "D")
    monkeypatch.setattr(module, "_read_wait_channel", lambda _pid: "nfs_wait")
    agent = shell(
        make, "exec sleep 1000", max_restarts=3, monitor_interval=0.01, agent={"uninterruptible_state_timeout": 0.05}
    )
    result = agent.run()
    assert result.state == WorkerState.UNHEALTHY
    assert result.is_failed()
    assert agent._remaining_restarts == 0
    assert sorted(result.failures) == [0, 1]
    failure = result.failures[1]
    assert failure.exitcode != 0
    assert f"Worker pid={failure.pid} stuck in uninterruptible sleep (D-state)" in str(failure.message)
    assert "nfs_wait" in str(failure.message)


def test_dwell_counts_from_the_first_look_and_is_forgotten(
    make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make("true")
    states = iter(["D", "D", "S", None, "D"])
    moments = iter([100.0, 107.5, 300.0])
    monkeypatch.setattr(module, "read_proc_state", lambda _pid: next(states))
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    assert [agent._update_uninterruptible_dwell(1, "r", 10) for _ in range(5)] == [0.0, 7.5, None, None, 0.0]


def test_a_pid_that_is_gone_is_forgotten(make: Callable[..., LocalElasticAgent]) -> None:
    agent = make("true")
    assert agent._check_uninterruptible_state_timeout(agent._worker_group, 1) is None
    agent._uninterruptible_state_first_seen[12345] = 0.0
    agent._pcontext = mock.MagicMock(spec=PContext)
    agent._pcontext.pids.return_value = {}
    assert agent._check_uninterruptible_state_timeout(agent._worker_group, 1) is None
    assert agent._uninterruptible_state_first_seen == {}


@pytest.mark.parametrize(
    ("explicit", "variable", "expected"),
    [(None, None, 0), (None, "2.5", 2.5), (None, "x", 0), (None, "-1", 0), (3, "2.5", 3), (0, "2.5", 0), (-2, None, 0)],
)
def test_where_the_limit_comes_from(
    monkeypatch: pytest.MonkeyPatch, explicit: float | None, variable: str | None, expected: float
) -> None:
    monkeypatch.delenv("TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT", raising=False)
    if variable is not None:
        monkeypatch.setenv("TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT", variable)
    assert module._resolve_uninterruptible_state_timeout(explicit) == expected


# ---- health and watchdog


class FakeHealthServer:
    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


def test_the_health_server_lives_from_start_to_end_through_restarts(
    make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_HEALTH_CHECK_PORT", "1234")
    servers: list[FakeHealthServer] = []

    def create(**arguments: Any) -> FakeHealthServer:
        servers.append(FakeHealthServer(**arguments))
        return servers[-1]

    monkeypatch.setattr(module, "create_healthcheck_server", create)
    agent = make(fail_unless_restarted, max_restarts=1)
    original = agent._rendezvous
    seen: list[list[str]] = []
    agent._rendezvous = lambda group: (seen.append(list(servers[0].calls)), original(group))  # type: ignore[method-assign,assignment,func-returns-value]
    agent.run()
    assert len(servers) == 1
    assert servers[0].arguments == {"alive_callback": agent._get_alive_time, "port": 1234, "timeout": 60}
    assert seen == [["start"], ["start"]]
    assert servers[0].calls == ["start", "stop"]


@pytest.mark.parametrize("port", [None, "not a port"])
def test_no_health_server_without_a_port(
    make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch, port: str | None
) -> None:
    monkeypatch.delenv("TORCHELASTIC_HEALTH_CHECK_PORT", raising=False)
    if port is not None:
        monkeypatch.setenv("TORCHELASTIC_HEALTH_CHECK_PORT", port)
    agent = make("true")
    agent._setup_healthcheck()
    assert agent._health_check_server is None


def test_a_given_health_server_is_stopped_once(make: Callable[..., LocalElasticAgent]) -> None:
    server = FakeHealthServer()
    agent = make("true", agent={"health_check_server": server})
    agent.run()
    assert server.calls == ["stop"]


@pytest.mark.parametrize("path", [None, "/tmp/chosen"])
def test_the_watchdog_is_started_announced_to_the_workers_and_stopped(
    make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ENABLE_FILE_TIMER", "1")
    monkeypatch.delenv("TORCHELASTIC_TIMER_FILE", raising=False)
    if path is not None:
        monkeypatch.setenv("TORCHELASTIC_TIMER_FILE", path)
    server = mock.Mock()
    factory = mock.Mock(return_value=server)
    monkeypatch.setattr("ferroelastic.timer.FileTimerServer", factory)
    monkeypatch.setattr("shutil.which", {"py-spy": "/opt/bin/py-spy"}.get)
    monkeypatch.setenv("FERROELASTIC_EVIDENCE_S", "1.5")
    agent = make("true")
    envs: dict[int, dict[str, str]] = {0: {"TORCHELASTIC_RUN_ID": "r"}, 1: {}}
    agent._setup_local_watchdog(envs)
    chosen = factory.call_args.kwargs["file_path"]
    assert factory.call_args.kwargs["run_id"] == "r"
    assert factory.call_args.kwargs["reap_server"] is False
    assert factory.call_args.kwargs["evidence_s"] == 1.5
    assert factory.call_args.kwargs["py_spy"] == "/opt/bin/py-spy"
    assert path in {None, chosen}
    assert {env["TORCHELASTIC_TIMER_FILE"] for env in envs.values()} == {chosen}
    server.start.assert_called_once_with()
    agent._shutdown()
    server.stop.assert_called_once_with()
    assert agent._worker_watchdog is None


def test_no_watchdog_unless_asked_for(make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ENABLE_FILE_TIMER", raising=False)
    monkeypatch.delenv("TORCHELASTIC_TIMER_FILE", raising=False)
    agent = make("true")
    envs: dict[int, dict[str, str]] = {0: {}}
    agent._setup_local_watchdog(envs)
    assert agent._worker_watchdog is None
    assert envs == {0: {}}


def test_actions_of_the_watchdog_are_events(
    make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(module, "record", lambda event, destination: recorded.append((event, destination)))
    agent = make("true", event_log_handler="console")
    request = mock.Mock(worker_pid=12, scope_id="step", expiration_time=3.5, signal=9)
    agent._log_watchdog_event("kill worker process", request)
    agent._log_watchdog_event("server started", None)
    (event, destination), (started, _) = recorded
    assert destination == "console"
    assert event.name == "kill worker process"
    assert event.metadata["run_id"] == "run"
    assert json.loads(event.metadata["metadata"]) == {
        "watchdog_event": "kill worker process",
        "worker_pid": "12",
        "scope_id": "step",
        "expiration_time": "3.5",
        "signal": "9",
    }
    assert json.loads(started.metadata["metadata"]) == {"watchdog_event": "server started"}
