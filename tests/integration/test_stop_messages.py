"""What is said of workers that had to be killed."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.support.waiting import eventually

from ferroelastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


PATIENCE_S = 60
STUBBORN = 'trap ": > $1/told" TERM; : > "$1/ready"; while :; do sleep 1000 & wait; done'


@contextmanager
def stubborn(tmp_path: Path) -> Iterator[PContext]:
    """A worker that takes note of SIGTERM and goes on."""
    logs = DefaultLogsSpecs(str(tmp_path / "logs"))
    context = start_processes("n", "/bin/sh", {0: ("-c", STUBBORN, "worker", str(tmp_path))}, {0: {}}, logs)
    try:
        assert eventually((tmp_path / "ready").exists, PATIENCE_S)
        yield context
    finally:
        context.close(signal.SIGKILL, 0)


def test_a_grace_that_has_passed_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with stubborn(tmp_path) as context:
        context.close(timeout=0)
    assert "Workers of local ranks 0 did not end within 0 s and were killed" in caplog.text


def test_a_grace_that_was_cut_short_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with stubborn(tmp_path) as context:

        def hurry() -> None:
            assert eventually((tmp_path / "told").exists, PATIENCE_S)
            context._end_grace()

        impatient = threading.Thread(target=hurry)
        impatient.start()
        context.close(timeout=1000)
        impatient.join()
    assert "their grace period of 1000 s was cut short" in caplog.text
    assert "did not end within" not in caplog.text


def test_a_stop_that_was_begun_with_less_time_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with stubborn(tmp_path) as context:
        context.begin_stop(signal.SIGTERM, 0)
        context.close(timeout=1000)
    assert "Workers of local ranks 0 did not end within 0 s and were killed" in caplog.text
