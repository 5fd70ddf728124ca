"""Health checks of an agent through its life."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.health_probes import PATIENCE_S, alive, ask, error_lines, health_threads, now, port_of
from tests.support.rendezvous_handlers import GrowingRendezvous
from tests.support.waiting import eventually

from ferroelastic.agent.server import HealthCheckServer, LocalElasticAgent, WorkerSpec, WorkerState
from ferroelastic.agent.server import local_elastic_agent as module
from ferroelastic.agent.server.health_check_server import _AliveCallbackProxy
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std

pytest.importorskip("ferroelastic._rust")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class GatedRendezvous(GrowingRendezvous):
    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def next_rendezvous(self) -> Any:
        self.entered.set()
        assert self.go.wait(PATIENCE_S)
        return super().next_rendezvous()


class Running:
    """An agent that runs in a thread."""

    def __init__(self, agent: LocalElasticAgent) -> None:
        self.agent = agent
        self.outcome: Any = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert eventually(self._answers)

    def _run(self) -> None:
        try:
            self.outcome = self.agent.run()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.outcome = error

    def _answers(self) -> bool:
        server = self.agent._health_check_server
        return server is not None and server.board is not None

    @property
    def port(self) -> int:
        return port_of(self.agent._health_check_server)

    def join(self) -> Any:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        return self.outcome

    def status(self) -> Any:
        return json.loads(ask(self.port, "/status")[1])


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalElasticAgent]]:
    monkeypatch.setenv("TORCHELASTIC_HEALTH_CHECK_PORT", "0")
    agents: list[LocalElasticAgent] = []

    def build(
        script: str, cls: type[LocalElasticAgent] = LocalElasticAgent, server: Any = None, **spec: Any
    ) -> LocalElasticAgent:
        logs = DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.NONE)
        chosen = {"rdzv_handler": GrowingRendezvous(), "max_restarts": 0, "monitor_interval": 600, **spec}
        worker_spec = WorkerSpec(
            role="trainer", local_world_size=2, entrypoint="/bin/sh", args=("-c", script), **chosen
        )
        agents.append(cls(worker_spec, logs, exit_barrier_timeout=5, shutdown_timeout=5, health_check_server=server))
        return agents[-1]

    yield build
    while agents:
        agent = agents.pop()
        agent._shutdown(signal.SIGKILL, 0)
        agent._pcontext = None


def wait_for_state(running: Running, state: str) -> Any:
    found: dict[str, Any] = {}

    def is_in_state() -> bool:
        found.update(running.status())
        return bool(found["state"] == state)

    assert eventually(is_in_state, PATIENCE_S), found
    return found


class TestAgent:
    def test_from_rendezvous_through_a_restart_and_the_exit_barrier_to_the_end(
        self, make: Callable[..., LocalElasticAgent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = tmp_path / "gate"
        os.mkfifo(gate)
        barrier_entered, barrier_over = threading.Event(), threading.Event()

        def barrier(**_arguments: Any) -> None:
            barrier_entered.set()
            assert barrier_over.wait(PATIENCE_S)

        monkeypatch.setattr("ferroelastic.utils.store.barrier", barrier)
        rendezvous = GatedRendezvous()
        # In the first attempt rank 1 exits with 7 when the gate is opened, in the second all succeed.
        script = f'test "$TORCHELASTIC_RESTART_COUNT" = 1 || {{ test "$RANK" = 0 && exec sleep 1000; read l < {gate}; exit 7; }}'
        running = Running(make(script, rdzv_handler=rendezvous, max_restarts=1))

        assert rendezvous.entered.wait(PATIENCE_S)
        assert ask(running.port, "/readyz") == (503, "not ready: state rendezvous\n")
        assert alive(running.port) == "rendezvous"
        rendezvous.go.set()

        first = wait_for_state(running, "running")
        assert ask(running.port, "/readyz") == (200, "ready: 2 of 2 workers are running\n")
        assert (first["run_id"], first["role"], first["round"]) == ("run", "trainer", 1)
        assert [(worker["rank"], worker["local_rank"], worker["state"]) for worker in first["workers"]] == [
            (0, 0, "running"),
            (1, 1, "running"),
        ]
        assert all(worker["resident_bytes"] > 0 for worker in first["workers"])

        rendezvous.entered.clear()
        rendezvous.go.clear()
        gate.write_text("\n")
        assert rendezvous.entered.wait(PATIENCE_S)
        again = wait_for_state(running, "rendezvous")
        failed = first["workers"][1]["pid"]
        assert again["restarts"]["failure"] == 1
        assert again["restarts"]["last"]["cause"] == "failure"
        assert again["restarts"]["last"]["reason"] == f"rank 1 (pid {failed}) exited with code 7"
        assert [worker["state"] for worker in again["workers"]] == ["stopped", "failed"]
        assert again["workers"][1]["exit_code"] == 7
        assert alive(running.port)
        rendezvous.go.set()

        assert barrier_entered.wait(PATIENCE_S)
        last = wait_for_state(running, "exit barrier")
        assert (last["round"], [worker["state"] for worker in last["workers"]]) == (2, ["succeeded", "succeeded"])
        assert [worker["restarts"] for worker in last["workers"]] == [1, 1]
        assert alive(running.port) == "exit barrier"
        metrics = ask(running.port, "/metrics")[1]
        for phase in ("detect", "stop", "rendezvous", "spawn"):
            assert f'ferroelastic_restart_phase_seconds_count{{phase="{phase}"}} 1\n' in metrics
        port = running.port
        barrier_over.set()
        assert running.join().state == WorkerState.SUCCEEDED
        assert running.agent._health_check_server is None
        with pytest.raises(ConnectionRefusedError):
            ask(port)

    def test_a_membership_change_is_another_cause(self, make: Callable[..., LocalElasticAgent]) -> None:
        rendezvous = GrowingRendezvous()
        running = Running(make("exec sleep 1000", rdzv_handler=rendezvous, monitor_interval=0.01))
        wait_for_state(running, "running")
        rendezvous.waiting = 3
        assert eventually(lambda: running.status()["round"] == 2, PATIENCE_S)
        restarts = running.status()["restarts"]
        assert (restarts["failure"], restarts["membership"]) == (0, 1)
        assert restarts["last"]["reason"] == "3 waiting to join"
        wait_for_state(running, "running")
        os.kill(running.status()["workers"][0]["pid"], signal.SIGKILL)
        assert running.join().state == WorkerState.FAILED

    def test_a_loop_that_is_stuck_in_a_hook_is_not_alive(
        self, make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_HEALTH_TIMEOUT_S", 0)
        entered, go = threading.Event(), threading.Event()

        class Stuck(LocalElasticAgent):
            def _monitor_workers(self, worker_group: Any) -> Any:
                entered.set()
                assert go.wait(PATIENCE_S)
                return super()._monitor_workers(worker_group)

        running = Running(make("exit 0", cls=Stuck))
        assert entered.wait(PATIENCE_S)
        assert eventually(lambda: ask(running.port)[0] == 503)
        assert ask(running.port)[1].startswith("no progress for ")
        go.set()
        assert running.join().state == WorkerState.SUCCEEDED

    def test_a_stop_within_its_grace_is_progress(
        self, make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        agent = make("exit 0")
        agent._activity.busy("stopping", allowance_s=1000.0)
        assert agent._get_alive_time() >= now() - 1
        since = time.monotonic() - 1001
        agent._activity._busy = (since, 1000.0)
        assert agent._get_alive_time() <= now() - 1000, "past its grace all of it counts"
        agent._activity.busy()
        assert agent._get_alive_time() >= now() - 1
        agent._activity.idle()

    def test_workers_that_missed_a_deadline_count_as_well(self, make: Callable[..., LocalElasticAgent]) -> None:
        agent = make("exit 0")

        class Watchdog:
            def get_last_progress_time(self) -> int:
                return 77

        agent._worker_watchdog = Watchdog()
        assert agent._get_alive_time() == 77
        agent._worker_watchdog = None

    @pytest.mark.parametrize("port", ["not a port", "", "70000", "1e3"])
    def test_an_invalid_port_is_reported_once_and_the_job_runs(
        self,
        make: Callable[..., LocalElasticAgent],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        port: str,
    ) -> None:
        agent = make('test "$TORCHELASTIC_RESTART_COUNT" = 1', max_restarts=1)
        monkeypatch.setenv("TORCHELASTIC_HEALTH_CHECK_PORT", port)
        assert agent.run().state == WorkerState.SUCCEEDED
        lines = [line for line in error_lines(caplog) if "health" in line]
        assert len(lines) == 1
        assert port in lines[0]

    def test_a_port_in_use_is_reported_once_and_the_job_runs(
        self,
        make: Callable[..., LocalElasticAgent],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        agent = make('test "$TORCHELASTIC_RESTART_COUNT" = 1', max_restarts=1)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            monkeypatch.setenv("TORCHELASTIC_HEALTH_CHECK_PORT", str(taken.getsockname()[1]))
            assert agent.run().state == WorkerState.SUCCEEDED
        (line,) = [line for line in error_lines(caplog) if "health" in line]
        assert "the port is in use by" in line

    def test_a_deployments_server_that_cannot_start_does_not_end_the_job(
        self,
        make: Callable[..., LocalElasticAgent],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        class Own(HealthCheckServer):
            def start(self) -> None:
                raise PermissionError(13, "not here")

        monkeypatch.setattr(module, "create_healthcheck_server", Own)
        agent = make("exit 0")
        assert agent.run().state == WorkerState.SUCCEEDED
        assert [line for line in error_lines(caplog) if "health" in line] == [
            "Not starting healthcheck server: [Errno 13] not here"
        ]

    def test_a_deployments_own_server_is_started_and_stopped_and_not_updated(
        self, make: Callable[..., LocalElasticAgent], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []

        class Own(HealthCheckServer):
            def start(self) -> None:
                calls.append("start")

            def stop(self) -> None:
                calls.append("stop")

        monkeypatch.setattr(module, "create_healthcheck_server", Own)
        assert make("exit 0").run().state == WorkerState.SUCCEEDED
        assert calls == ["start", "stop"]

    def test_a_given_server_is_updated_and_stopped(
        self,
        make: Callable[..., LocalElasticAgent],
        serve: Callable[..., HealthCheckServer],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv("TORCHELASTIC_HEALTH_CHECK_PORT")
        proxy = _AliveCallbackProxy()
        server = serve(proxy)
        rendezvous = GatedRendezvous()
        agent = make("exit 0", server=server, rdzv_handler=rendezvous)
        proxy.set_delegate(agent._get_alive_time)
        running = Running(agent)
        assert rendezvous.entered.wait(PATIENCE_S)
        assert alive(running.port) == "rendezvous"
        rendezvous.go.set()
        assert running.join().state == WorkerState.SUCCEEDED
        assert server.board is None

    def test_an_error_ends_the_server(self, make: Callable[..., LocalElasticAgent]) -> None:
        class Broken(GrowingRendezvous):
            def next_rendezvous(self) -> Any:
                raise RuntimeError("no rendezvous today")

        agent = make("exit 0", rdzv_handler=Broken())
        with pytest.raises(RuntimeError, match="no rendezvous today"):
            agent.run()
        assert agent._health_check_server is None
        assert not health_threads()

    def test_a_shutdown_that_forgets_the_server_does_not_keep_it(self, make: Callable[..., LocalElasticAgent]) -> None:
        class Forgetful(LocalElasticAgent):
            def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
                if self._pcontext is not None:
                    self._pcontext.close(death_sig, timeout)

        agent = make("exit 0", cls=Forgetful)
        assert agent.run().state == WorkerState.SUCCEEDED
        assert agent._health_check_server is None
        assert not health_threads()


def test_metrics_are_read_by_prometheus(make: Callable[..., LocalElasticAgent]) -> None:
    parser: Any = pytest.importorskip("prometheus_client.openmetrics.parser")

    running = Running(make("exec sleep 1000"))
    wait_for_state(running, "running")
    families = {
        family.name: family
        for family in parser.text_string_to_metric_families(
            ask(running.port, "/metrics", accept="application/openmetrics-text")[1]
        )
    }
    assert {(name, family.type, family.unit) for name, family in families.items()} == {
        ("ferroelastic_uptime_seconds", "gauge", "seconds"),
        ("ferroelastic_state", "gauge", ""),
        ("ferroelastic_rounds", "counter", ""),
        ("ferroelastic_restarts", "counter", ""),
        ("ferroelastic_workers", "gauge", ""),
        ("ferroelastic_worker_exits", "counter", ""),
        ("ferroelastic_worker_resident_memory_bytes", "gauge", "bytes"),
        ("ferroelastic_worker_cpu_seconds", "counter", "seconds"),
        ("ferroelastic_health_probes", "counter", ""),
        ("ferroelastic_health_dropped_connections", "counter", ""),
        ("ferroelastic_watchdog_requests", "counter", ""),
        ("ferroelastic_watchdog_broken_requests", "counter", ""),
        ("ferroelastic_watchdog_expiries", "counter", ""),
        ("ferroelastic_warm_ready_zygotes", "gauge", ""),
        ("ferroelastic_warm_parked", "gauge", ""),
        ("ferroelastic_warm_used", "counter", ""),
        ("ferroelastic_warm_refused", "counter", ""),
        ("ferroelastic_log_matches", "counter", ""),
        ("ferroelastic_restart_decisions", "counter", ""),
        ("ferroelastic_restart_phase_seconds", "histogram", "seconds"),
    }
    assert all(family.documentation.endswith(".") for family in families.values())

    def samples(family: str, label: str) -> dict[str, float]:
        return {sample.labels[label]: sample.value for sample in families[family].samples}

    assert samples("ferroelastic_restarts", "cause") == {"failure": 0, "membership": 0}
    assert samples("ferroelastic_workers", "state")["running"] == 2
    assert samples("ferroelastic_state", "state")["running"] == 1
    assert samples("ferroelastic_worker_resident_memory_bytes", "rank").keys() == {"0", "1"}
    buckets = [
        float(sample.labels["le"])
        for sample in families["ferroelastic_restart_phase_seconds"].samples
        if sample.name.endswith("_bucket") and sample.labels["phase"] == "stop"
    ]
    assert (buckets[0], buckets[-2], buckets[-1]) == (0.0001, 600.0, float("inf"))
    os.kill(running.status()["workers"][0]["pid"], signal.SIGKILL)
    assert running.join().state == WorkerState.FAILED
