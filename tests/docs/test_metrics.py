"""The page of health checks lists the metrics that the server has, and no others."""

from __future__ import annotations

import re
from contextlib import closing

from tests.docs.pages import ROOT
from tests.support.health_probes import ask

from ferroelastic._engine import get_engine


def listed() -> list[str]:
    page = (ROOT / "docs" / "health.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(ferroelastic_\w+)", page, re.MULTILINE)


def registered() -> list[str]:
    with closing(get_engine().health_server("127.0.0.1", 0, 60.0)) as server:
        _, text = ask(server.port, "/metrics")
    # A metric without samples has this line too.
    return re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)


def test_the_metrics_of_the_server_are_listed() -> None:
    assert sorted(listed()) == sorted(registered())
