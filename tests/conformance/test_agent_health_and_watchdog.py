"""The health server and the watchdog of a ``LocalElasticAgent``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.conformance import workers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conformance.implementations import Implementation


# ---- health


class HealthServer:
    def __init__(self, calls: list[str], **arguments: Any) -> None:
        self.arguments = arguments
        self.start = lambda: calls.append("start")
        self.stop = lambda: calls.append("stop")


def test_the_health_server(
    impl: Implementation, make_local_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = impl("agent.server.local_elastic_agent")
    monkeypatch.setenv(module.TORCHELASTIC_HEALTH_CHECK_PORT, "1234")
    calls: list[str] = []
    servers: list[HealthServer] = []

    def create(**arguments: Any) -> HealthServer:
        servers.append(HealthServer(calls, **arguments))
        return servers[-1]

    monkeypatch.setattr(module, "create_healthcheck_server", create)
    agent = make_local_agent(workers.fail_unless_restarted, 0, 9, max_restarts=1)
    original = agent._rendezvous

    def rendezvous(group: Any) -> None:
        calls.append("meet")
        original(group)

    agent._rendezvous = rendezvous
    agent.run()
    assert calls == impl.expect(
        "health-server-lives-on",
        torch=["meet", "start", "stop", "meet", "start", "stop"],
        ours=["start", "meet", "meet", "stop"],
    )
    arguments = servers[0].arguments
    assert (arguments["port"], arguments["timeout"]) == (1234, 60)
    assert abs(arguments["alive_callback"]() - time.time()) < 60


@pytest.mark.parametrize("port", [None, "not a port"])
def test_no_health_server_without_a_port(
    impl: Implementation, make_local_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, port: str | None
) -> None:
    module = impl("agent.server.local_elastic_agent")
    if port is not None:
        monkeypatch.setenv(module.TORCHELASTIC_HEALTH_CHECK_PORT, port)
    agent = make_local_agent("/bin/true")
    agent._setup_healthcheck()
    assert agent._health_check_server is None


@pytest.mark.needs("shared-health-server")
def test_a_given_health_server_is_stopped(make_local_agent: Callable[..., Any]) -> None:
    calls: list[str] = []
    agent = make_local_agent("/bin/true", agent={"health_check_server": HealthServer(calls)})
    agent.run()
    assert calls == ["stop"]
    assert agent._health_check_server is None


@pytest.mark.needs("shared-health-server")
def test_alive_time(
    impl: Implementation, make_local_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.9)
    module = impl("agent.server.local_elastic_agent")
    agent = make_local_agent("/bin/true")
    proxy = module._AliveCallbackProxy()
    assert proxy() == module.LocalElasticAgent._get_current_time_secs() == 1000
    proxy.set_delegate(agent._get_alive_time)
    assert proxy() == 1000
    agent._worker_watchdog = mock.Mock(**{"get_last_progress_time.return_value": 77})
    assert proxy() == 77
    agent._in_exit_barrier = True
    assert proxy() == 1000


@pytest.mark.needs("shared-health-server")
def test_a_loop_that_is_stuck_is_not_alive(
    impl: Implementation, make_local_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_local_agent("/bin/true")
    original, monotonic, ages = agent._monitor_workers, time.monotonic, []

    def monitor(group: Any) -> Any:
        with monkeypatch.context() as later:
            later.setattr("time.monotonic", lambda: monotonic() + 100)
            ages.append(time.time() - agent._get_alive_time())
        return original(group)

    agent._monitor_workers = monitor
    agent.run()
    assert (ages[0] > 99) == impl.expect("loop-is-progress", torch=False, ours=True)


# ---- the watchdog


@pytest.mark.parametrize("chosen", [True, False])
def test_the_watchdog(
    impl: Implementation,
    make_local_agent: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: bool,
) -> None:
    module = impl("agent.server.local_elastic_agent")
    monkeypatch.setenv(module.TORCHELASTIC_ENABLE_FILE_TIMER, "1")
    if chosen:
        monkeypatch.setenv(module.TORCHELASTIC_TIMER_FILE, str(tmp_path / "pipe"))
    server = mock.Mock()
    factory = mock.Mock(return_value=server)
    monkeypatch.setattr(impl("timer"), "FileTimerServer", factory)
    agent = make_local_agent("/bin/true")
    envs: dict[int, dict[str, str]] = {0: {"TORCHELASTIC_RUN_ID": "r"}, 1: {}}
    agent._setup_local_watchdog(envs=envs)
    arguments = dict(factory.call_args.kwargs)
    path = arguments.pop("file_path")
    assert path == str(tmp_path / "pipe") if chosen else "watchdog_timer_" in path
    common = {"run_id": "r", "max_interval": 0.1, "daemon": True, "log_event": agent._log_watchdog_event}
    assert arguments.items() >= common.items()
    assert arguments.get("reap_server", True) is impl.expect("agent-outlives-expiry", torch=True, ours=False)
    assert {env["TORCHELASTIC_TIMER_FILE"] for env in envs.values()} == {path}
    server.start.assert_called_once_with()
    assert agent._worker_watchdog is server
    agent._shutdown()
    server.stop.assert_called_once_with()
    assert agent._worker_watchdog is None


def test_a_watchdog_and_a_restart(
    impl: Implementation, make_local_agent: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = impl("agent.server.local_elastic_agent")
    monkeypatch.setenv(module.TORCHELASTIC_ENABLE_FILE_TIMER, "1")
    servers: list[mock.Mock] = []

    def factory(**_: Any) -> mock.Mock:
        servers.append(mock.Mock(**{"expiry.return_value": None}))
        return servers[-1]

    monkeypatch.setattr(impl("timer"), "FileTimerServer", factory)
    assert not make_local_agent(workers.fail_unless_restarted, 0, 9, max_restarts=1).run().is_failed()
    assert len(servers) == impl.expect("one-watchdog", torch=2, ours=1)
    for server in servers:
        server.start.assert_called_with()
        server.stop.assert_called_once_with()


def test_workers_get_the_pipe_also_without_a_watchdog(
    impl: Implementation, make_local_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = impl("agent.server.local_elastic_agent")
    monkeypatch.setenv(module.TORCHELASTIC_TIMER_FILE, "/tmp/pipe")
    agent = make_local_agent("/bin/true")
    envs: dict[int, dict[str, str]] = {0: {}}
    agent._setup_local_watchdog(envs)
    assert agent._worker_watchdog is None
    assert envs == {0: {"TORCHELASTIC_TIMER_FILE": "/tmp/pipe"}}


@pytest.mark.needs("event-log-handler")
def test_actions_of_the_watchdog_are_events(make_local_agent: Callable[..., Any], event_log: Any) -> None:
    agent = make_local_agent("/bin/true", event_log_handler=event_log.name)
    request = mock.Mock(worker_pid=12, scope_id="step", expiration_time=3.5, signal=9)
    agent._log_watchdog_event("kill worker process", request)
    agent._log_watchdog_event("server started", None)
    killed, started = event_log.events
    assert (killed["name"], killed["source"]) == ("kill worker process", "AGENT")
    assert killed["metadata"] == {
        "run_id": "the-run",
        "global_rank": None,
        "group_rank": None,
        "worker_id": None,
        "role": "trainer",
        "hostname": agent._get_fq_hostname(),
        "state": "RUNNING",
        "total_run_time": 0,
        "rdzv_backend": "stub",
        "raw_error": None,
        "metadata": {
            "watchdog_event": "kill worker process",
            "worker_pid": "12",
            "scope_id": "step",
            "expiration_time": "3.5",
            "signal": "9",
        },
        "agent_restarts": 0,
    }
    assert started["metadata"]["metadata"] == {"watchdog_event": "server started"}
