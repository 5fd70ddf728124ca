"""Function workers that have returned are held until all have returned, or until the attempt ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.function_workers import METHODS, content, finished, held, is_held, started
from tests.support.waiting import eventually

from ferroelastic.utils.process_state import read_proc_state

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

if TYPE_CHECKING:
    from pathlib import Path

SOON_S = 10.0


def close_descriptors_or_follow(gate: str) -> None:
    if os.environ["RANK"] == "0":
        os.closerange(3, 1024)
    else:
        with open(gate):
            pass


def open_gate(folder: Path) -> None:
    with open(folder / "gate", "w"):
        pass


@pytest.mark.parametrize("how", ["returns", "exits"])
@pytest.mark.parametrize("method", METHODS)
def test_all_are_held_until_the_last_has_returned(tmp_path: Path, method: str, how: str) -> None:
    with held(tmp_path, method, how) as context:
        assert context.wait(0) is None
        open_gate(tmp_path)
        result = finished(context)
    assert (result.return_values, result.failures, result.stopped) == (dict.fromkeys(range(3)), {}, {})


@pytest.mark.parametrize("method", METHODS)
def test_a_failure_lets_go_of_those_that_are_held(tmp_path: Path, method: str) -> None:
    """Their handlers for SIGTERM do nothing, and the grace is long: they end because they are let go."""
    with held(tmp_path, method, "fails", shutdown_timeout=600) as context:
        open_gate(tmp_path)
        result = finished(context)
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {2: 7}
    assert {peer.exitcode for peer in result.stopped.values()} == {0}


def test_a_stop_lets_go_of_those_that_are_held(tmp_path: Path) -> None:
    with held(tmp_path, "fork", "returns", number=2) as context:
        context.begin_stop(signal.SIGTERM, 600)
        assert eventually(lambda: not is_held(context.pids()[0]), 60)
        gate = os.open(tmp_path / "gate", os.O_RDWR)  # this does not wait for rank 1, which the signal may have ended
        assert finished(context).failures == {}
        os.close(gate)


def test_one_that_is_held_ends_by_a_signal(tmp_path: Path) -> None:
    with held(tmp_path, "fork", "is killed") as context:
        os.kill(context.pids()[0], signal.SIGTERM)
        result = finished(context)
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {0: -signal.SIGTERM}


def test_one_that_ends_without_returning_lets_go_of_the_others(tmp_path: Path) -> None:
    with held(tmp_path, "fork", "leaves") as context:
        open_gate(tmp_path)
        result = finished(context)
    assert (result.return_values, result.failures) == (dict.fromkeys(range(3)), {})


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_has_closed_the_descriptors_is_not_held_and_holds_no_other(tmp_path: Path, method: str) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with started(tmp_path, method, close_descriptors_or_follow, (str(gate),), (str(gate),)) as context:
        assert eventually(lambda: read_proc_state(context.pids()[0]) in {None, "Z"}, 60)
        context.wait(0)
        with open(gate, "w"):
            pass
        assert finished(context).return_values == dict.fromkeys(range(2))


def test_the_agents_death_ends_those_that_are_held(tmp_path: Path) -> None:
    agent = f"""
import os, signal, sys
from pathlib import Path
from tests.support.function_workers import held
with held(Path({str(tmp_path)!r}), "fork", "returns") as context:
    print("held", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen(
        [sys.executable, "-c", agent],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        pids = [int(content(tmp_path / f"pid of {rank}")) for rank in range(2)]
        descriptors = [os.pidfd_open(pid) for pid in pids]
        try:
            process.stdin.close()
            assert process.wait(60) == -signal.SIGKILL
            for descriptor in descriptors:
                poller = select.poll()
                poller.register(descriptor, select.POLLIN)
                assert poller.poll(SOON_S * 1000)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
