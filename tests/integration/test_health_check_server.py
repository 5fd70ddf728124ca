"""Health checks over HTTP, of a server on its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.forking import fork
from tests.support.health_probes import PATIENCE_S, alive, ask, error_lines, health_threads, now, port_of
from tests.support.leaks import descriptors
from tests.support.waiting import eventually

from ferroelastic.agent.server import HealthCheckServer

pytest.importorskip("ferroelastic._rust")

if TYPE_CHECKING:
    from collections.abc import Callable


def listeners(port: int) -> list[str]:
    """Sockets of this process that listen on a port of IPv4."""
    with open("/proc/self/net/tcp") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    inodes = {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    sockets = {f"socket:[{inode}]" for inode in inodes}
    return [link for link in descriptors().values() if link in sockets]


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
            (lambda: float("nan"), 503, "alive_callback failed: it returned nan, which is not a time"),
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

    def test_a_callback_that_hangs_is_reported_at_once_and_called_once(
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
        assert "did not return within 1 s; its thread is left running" in caplog.text
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
        assert "the port is in use by this process or a process of another user" in line
        assert alive(port)

    @pytest.mark.parametrize(
        ("port", "host", "text"),
        [
            (70000, "", "failed to listen on 127.0.0.1:70000: the port must be from 0 to 65535"),
            (-1, "", "failed to listen on 127.0.0.1:-1: the port must be from 0 to 65535"),
            (0, "192.0.2.1", "failed to listen on 192.0.2.1:0: cannot assign requested address"),
            (0, "2001:db8::1", "failed to listen on [2001:db8::1]:0: "),
            (0, "no.such.host.invalid", "failed to listen on no.such.host.invalid:0: "),
        ],
    )
    def test_an_unusable_port_is_reported_once(
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
        assert line.startswith(f"health checks are disabled: {text}")


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


def test_a_stuck_interpreter_is_reported_at_once() -> None:
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
    pid = fork()
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
