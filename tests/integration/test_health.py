"""Health checks over HTTP: of a server on its own, and of an agent through its life."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import _descriptors, eventually
from tests.integration.test_local_agent import AloneRendezvous

from ferroelastic.agent.server import (
    HealthCheckServer,
    LocalElasticAgent,
    WorkerSpec,
    WorkerState,
    create_healthcheck_server,
)
from ferroelastic.agent.server import local_elastic_agent as module
from ferroelastic.agent.server.local_elastic_agent import _AliveCallbackProxy
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std

pytest.importorskip("ferroelastic._rust")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE_S = 20.0


def ask(port: int, path: str = "/livez", host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def alive(port: int, path: str = "/livez", host: str = "127.0.0.1") -> str:
    """Ask until the answer is 200, and return the agent's state. A busy machine may take longer than the callback has."""
    found: list[Any] = []

    def is_alive() -> bool:
        found[:] = ask(port, path, host)
        return bool(found[0] == 200)

    assert eventually(is_alive, PATIENCE_S), found
    match = re.fullmatch(r"alive: last progress \d s ago, timeout 60 s; state (.*)\n", found[1])
    assert match is not None, found
    return match[1]


def port_of(server: HealthCheckServer | None) -> int:
    assert server is not None
    assert server.board is not None
    return server.board.port


def now() -> int:
    return int(time.time())


@pytest.fixture
def serve() -> Iterator[Callable[..., HealthCheckServer]]:
    servers: list[HealthCheckServer] = []

    def start(alive_callback: Callable[[], Any] = now, port: int = 0, timeout: int = 60) -> HealthCheckServer:
        servers.append(create_healthcheck_server(alive_callback, port, timeout))
        servers[-1].start()
        return servers[-1]

    yield start
    while servers:
        servers.pop().stop()


def health_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ferro-health"]


def listeners(port: int) -> list[str]:
    """Sockets of this process that listen on a port of IPv4."""
    with open("/proc/self/net/tcp") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    inodes = {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    sockets = {f"socket:[{inode}]" for inode in inodes}
    return [link for link in _descriptors().values() if link in sockets]


class TestServer:
    def test_progress_is_life(self, serve: Callable[..., HealthCheckServer]) -> None:
        port = port_of(serve())
        assert {alive(port, path) for path in ("/", "/healthz", "/livez")} == {"unknown"}
        assert ask(port, "/readyz") == (503, "not ready: state unknown\n")

    @pytest.mark.parametrize(
        ("value", "code", "text"),
        [
            (lambda: time.time() - 65, 503, r"no progress for 6\d s, timeout 60 s; "),
            (lambda: int(time.time() - 45), 200, r"alive: last progress [45]\d s ago, timeout 60 s; "),
            (lambda: time.time() + 1000, 200, "alive: last progress 0 s ago, timeout 60 s; "),
            (lambda: None, 503, r"alive_callback failed: TypeError: float\(\) argument must be"),
            (lambda: float("nan"), 503, "alive_callback failed: it returned nan, which is no time"),
            (lambda: 1 // 0, 503, "alive_callback failed: ZeroDivisionError: "),
            (lambda: sys.exit("over"), 503, "alive_callback failed: SystemExit: over"),
        ],
    )
    def test_the_callback_decides(
        self, serve: Callable[..., HealthCheckServer], value: Callable[[], Any], code: int, text: str
    ) -> None:
        port = port_of(serve(value))
        found: list[Any] = []

        def is_told() -> bool:
            found[:] = ask(port)
            return found[0] == code and re.match(text, found[1]) is not None

        assert eventually(is_told, PATIENCE_S), found

    def test_a_callback_that_hangs_is_told_at_once_and_called_once(
        self, serve: Callable[..., HealthCheckServer]
    ) -> None:
        calls: list[int] = []
        returned = threading.Event()

        def hang() -> int:
            calls.append(1)
            returned.wait(PATIENCE_S)
            return now()

        port = port_of(serve(hang))
        for _ in range(5):
            code, text = ask(port)
            assert code == 503
            assert text.startswith("alive_callback has not returned for ")
        assert ask(port, "/readyz")[0] == 503, "the rest goes on"
        assert len(calls) == 1
        returned.set()
        assert alive(port)

    def test_stopping_does_not_wait_for_a_callback_that_hangs(
        self, serve: Callable[..., HealthCheckServer], caplog: pytest.LogCaptureFixture
    ) -> None:
        called, returned = threading.Event(), threading.Event()

        def hang() -> int:
            called.set()
            returned.wait(PATIENCE_S)
            return now()

        server = serve(hang)
        assert ask(port_of(server))[0] == 503
        assert called.wait(PATIENCE_S)
        (thread,) = health_threads()
        server.stop()
        assert "does not return: its thread is left behind" in caplog.text
        returned.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()

    def test_starting_and_stopping_again_and_again(self, serve: Callable[..., HealthCheckServer]) -> None:
        server = serve()
        port = port_of(server)
        server._port = port
        for _ in range(5):
            server.start()
            assert port_of(server) == port
            assert alive(port)
            assert len(health_threads()) == 1
            server.stop()
            server.stop()
            assert server.board is None
            assert not health_threads()
            with pytest.raises(ConnectionRefusedError):
                ask(port)
            server.start()

    def test_the_callback_may_stop_the_server(self, serve: Callable[..., HealthCheckServer]) -> None:
        servers: list[HealthCheckServer] = []

        def stop() -> int:
            servers[0].stop()
            return now()

        servers.append(serve(stop))
        with pytest.raises(ConnectionError):
            ask(port_of(servers[0]))
        assert eventually(lambda: not health_threads())

    def test_a_server_that_was_not_started_can_be_stopped(self) -> None:
        HealthCheckServer(now, 0, 60).stop()

    @pytest.mark.parametrize("host", ["localhost", "::1", "0.0.0.0", "::"])
    def test_the_host_can_be_chosen(
        self, serve: Callable[..., HealthCheckServer], monkeypatch: pytest.MonkeyPatch, host: str
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_HEALTH_CHECK_HOST", host)
        port = port_of(serve())
        assert alive(port, host="::1" if host == "::1" else "127.0.0.1")

    def test_it_listens_on_loopback_alone(self, serve: Callable[..., HealthCheckServer]) -> None:
        server = serve()
        assert server.board is not None
        assert server.board.host == "127.0.0.1"

    def test_two_servers(self, serve: Callable[..., HealthCheckServer]) -> None:
        first, second = serve(), serve(lambda: 0)
        assert alive(port_of(first))
        assert ask(port_of(second))[0] == 503


def error_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


class TestPorts:
    def test_a_port_in_use_names_its_process(
        self, serve: Callable[..., HealthCheckServer], caplog: pytest.LogCaptureFixture
    ) -> None:
        script = (
            "import socket, sys; s = socket.create_server(('127.0.0.1', 0));"
            " print(s.getsockname()[1], flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as owner:
            assert owner.stdout is not None
            port = int(owner.stdout.readline())
            server = serve(port=port)
            assert server.board is None
            server.stop()
            owner.communicate()
        (line,) = error_lines(caplog)
        assert f"failed to listen on 127.0.0.1:{port}: the port is in use by pid {owner.pid} (python" in line
        assert line.endswith("; choose another one")

    def test_a_port_in_use_by_this_process(
        self, serve: Callable[..., HealthCheckServer], caplog: pytest.LogCaptureFixture
    ) -> None:
        port = port_of(serve())
        serve(port=port)
        (line,) = error_lines(caplog)
        assert "the port is in use by this process or one of another user" in line
        assert alive(port)

    @pytest.mark.parametrize(
        ("port", "host", "text"),
        [
            (70000, "", "failed to listen on 127.0.0.1:70000: a port is a number from 0 to 65535"),
            (-1, "", "failed to listen on 127.0.0.1:-1: a port is a number from 0 to 65535"),
            (0, "192.0.2.1", "failed to listen on 192.0.2.1:0: cannot assign requested address"),
            (0, "2001:db8::1", "failed to listen on [2001:db8::1]:0: "),
            (0, "no.such.host.invalid", "failed to listen on no.such.host.invalid:0: "),
        ],
    )
    def test_what_cannot_be_listened_on_is_said_once(
        self,
        serve: Callable[..., HealthCheckServer],
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        port: int,
        host: str,
        text: str,
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_HEALTH_CHECK_HOST", host)
        assert serve(port=port).board is None
        (line,) = error_lines(caplog)
        assert line.startswith(f"no health checks will be answered: {text}")


# Holds the interpreter's lock from before the line "held" until a line comes in.
HOLDS_THE_LOCK = """
import ctypes, sys, time
from ferroelastic.agent.server import create_healthcheck_server
server = create_healthcheck_server(lambda: int(time.time()), 0, 60)
server.start()
print(server.board.port, flush=True)
ctypes.PyDLL(None).system(b"echo held; read line")
print("released", flush=True)
sys.stdin.readline()
server.stop()
"""


def test_a_stuck_interpreter_is_told_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        port = int(child.stdout.readline())
        assert child.stdout.readline() == "held\n"
        for _ in range(3):
            code, text = ask(port)
            assert code == 503
            assert text.startswith("the interpreter is stuck: no Python thread could run for ")
        assert ask(port, "/status")[0] == 200, "the rest goes on"
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline() == "released\n"
        assert alive(port)
        child.communicate("end\n")
    assert child.returncode == 0


def test_a_server_that_is_not_stopped_ends_with_the_interpreter() -> None:
    script = (
        "import time\n"
        "from ferroelastic.agent.server import create_healthcheck_server\n"
        "server = create_healthcheck_server(lambda: int(time.time()), 0, 60)\n"
        "server.start()\n"
        "print(server.board.port)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_child_does_not_keep_the_port(serve: Callable[..., HealthCheckServer]) -> None:
    server = serve()
    port = port_of(server)
    board = server.board
    assert board is not None
    assert len(listeners(port)) == 1
    read_fd, write_fd = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            forked = "none"
            try:
                board.set_state("running")
            except RuntimeError as error:
                forked = type(error).__name__
            found = f"{listeners(port)} {server.board} {health_threads()} {forked}"
            server.stop()
            server.start()  # on a free port of its own
            found += f" {server.board is not None and server.board.port != port}"
            server.stop()
            os.write(write_fd, found.encode())
        finally:
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd) as result:
        assert result.read() == "[] None [] ForkedError True"
    os.waitpid(pid, 0)
    assert alive(port), "the parent's server goes on"


# ---- an agent


class GatedRendezvous(AloneRendezvous):
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
        chosen = {"rdzv_handler": AloneRendezvous(), "max_restarts": 0, "monitor_interval": 600, **spec}
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
        assert (first["run_id"], first["role"], first["round"]) == ("the-run", "trainer", 1)
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
        rendezvous = AloneRendezvous()
        running = Running(make("exec sleep 1000", rdzv_handler=rendezvous, monitor_interval=0.01))
        wait_for_state(running, "running")
        rendezvous.waiting = 3
        assert eventually(lambda: running.status()["round"] == 2, PATIENCE_S)
        restarts = running.status()["restarts"]
        assert (restarts["failure"], restarts["membership"]) == (0, 1)
        assert restarts["last"]["reason"] == "3 waiting to join"
        wait_for_state(running, "running")
        for pid in [worker["pid"] for worker in running.status()["workers"]]:
            os.kill(pid, signal.SIGKILL)
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
    def test_a_port_that_is_none_is_said_once_and_the_job_runs(
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

    def test_a_port_in_use_is_said_once_and_the_job_runs(
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

    def test_a_deployments_own_server_is_started_and_stopped_and_not_told(
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

    def test_a_server_that_was_given_is_told_and_stopped(
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
        class Broken(AloneRendezvous):
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
        family.name: family for family in parser.text_string_to_metric_families(ask(running.port, "/metrics")[1])
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
    for worker in running.status()["workers"]:
        os.kill(worker["pid"], signal.SIGKILL)
    assert running.join().state == WorkerState.FAILED
