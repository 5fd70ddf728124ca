"""The figures of an agent, as Prometheus and its tools read them."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.health_probes import ask
from tests.support.ports import port_for_one
from tests.support.waiting import LONG_S, eventually

from ferroelastic._engine import get_engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")


@pytest.fixture
def port() -> Iterator[int]:
    """Port of a health server with a round of workers, and a restart."""
    server = get_engine().health_server("127.0.0.1", 0, 60)
    server.set_state("running")
    server.set_workers([(0, 0, 1)])
    server.observe_phase("stop", 0.01)
    yield server.port
    server.close()


def test_the_format_is_the_requested_one(port: int) -> None:
    for accept, kind, last in [
        ("*/*", "text/plain; version=0.0.4; charset=utf-8", ""),
        ("application/openmetrics-text;q=0.6,text/plain;q=0.5", "application/openmetrics-text; version=1.0.0", "# EOF"),
    ]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request) as response:
            assert response.headers["Content-Type"].startswith(kind)
            assert response.read().decode().endswith(f"{last}\n")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize("accept", ["*/*"])
def test_promtool_has_nothing_to_say(port: int, accept: str) -> None:
    assert PROMTOOL is not None
    metrics = ask(port, "/metrics", accept=accept)[1]
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=metrics, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@contextmanager
def scraping(port: int, folder: Path) -> Iterator[int]:
    """A Prometheus that scrapes a port of this machine; its own port."""
    assert PROMETHEUS is not None
    config = folder / "prometheus.yml"
    config.write_text(
        f"global: {{scrape_interval: 100ms, scrape_timeout: 100ms}}\n"
        f"scrape_configs: [{{job_name: agent, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
    )
    own = port_for_one()
    options = (f"--config.file={config}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{own}")
    with subprocess.Popen([PROMETHEUS, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield own
        finally:
            process.kill()


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")
def test_prometheus_scrapes_it(port: int, tmp_path: Path) -> None:
    found: list[Any] = []

    def has_scraped(own: int, query: str) -> bool:
        with suppress(OSError, urllib.request.HTTPError):  # it is not up yet
            url = f"http://127.0.0.1:{own}/api/v1/query?query={query}"
            with urllib.request.urlopen(url) as response:
                found[:] = json.load(response)["data"]["result"]
        return bool(found)

    with scraping(port, tmp_path) as own:
        for query, value in {
            "up": "1",
            "ferroelastic_rounds_total": "1",
            "ferroelastic_restart_phase_seconds_sum": "",
        }.items():
            found.clear()
            assert eventually(lambda query=query: has_scraped(own, query), LONG_S), query  # type: ignore[misc]
            assert value in found[0]["value"][1]
