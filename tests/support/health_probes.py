"""Probes of a health server, and what else its tests look at."""

from __future__ import annotations

import http.client
import logging
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.waiting import eventually

from ferroelastic.agent.server import HealthCheckServer, create_healthcheck_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE_S = 20.0


def ask(port: int, path: str = "/livez", host: str = "127.0.0.1", accept: str = "*/*") -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path, headers={"Accept": accept})
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


def error_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
