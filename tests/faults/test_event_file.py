"""Events of real jobs in a file: phases, decisions and exits."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.harness import ALONE
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.harness import Launcher

pytestmark = pytest.mark.engine

TRAINING = """
import os, sys, time
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] < os.environ.get("FAILS", "1"):
    sys.exit(3)
while os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] < os.environ.get("FAILS", "1"):
    time.sleep(0.01)
"""


def run(launch: Launcher, code: int, *options: str, env: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    options = (*options, f"--log-dir={launch.folder}/logs", "--event-log-handler=jsonl")
    job = launch(*options, *launch.python(TRAINING), launcher=ALONE, env=env)
    assert job.end() == code, job.story
    found = [*launch.folder.glob("logs/latest/events.jsonl"), *launch.folder.glob("events")]
    events: list[dict[str, Any]] = [json.loads(line) for file in found for line in file.read_text().splitlines()]
    return [{"event": event["name"], **event["metadata"]} for event in events]


def phases(events: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(event["round"], event["phase"]) for event in events if event["event"] == "ferroelastic.phase"]


def test_a_job_that_restarts_once(launch: Launcher) -> None:
    events = run(launch, 0, "--max-restarts=1")
    assert phases(events) == [
        (1, "rendezvous"),
        (1, "spawn"),
        (1, "detect"),
        (1, "stop"),
        (2, "rendezvous"),
        (2, "spawn"),
        (2, "exit_barrier"),
        (2, "total"),
    ]
    assert all(event["duration_ms"] >= 0 for event in events if event["event"] == "ferroelastic.phase")
    (decision,) = [event for event in events if event["event"] == "ferroelastic.decision"]
    assert (decision["cause"], decision["decision"], decision["agent_restarts"]) == ("failure", "restart", 1)
    assert decision["reason"].endswith("exited with code 3")
    exits = [event for event in events if event["event"] == "ferroelastic.exit"]
    seen = {(one["round"], one["global_rank"], one["exit_code"], one["signal"], one["stopped"]) for one in exits}
    assert seen == {
        (1, 1, 3, None, False),
        (1, 0, None, "SIGTERM", True),
        (2, 0, 0, None, False),
        (2, 1, 0, None, False),
    }
    assert len(exits) == 4
    assert {event["event"] for event in events} >= {
        f"torchelastic.worker.status.{state}" for state in ("RENDEZVOUS", "START", "SUCCEEDED")
    }


def test_a_job_without_a_restart_left(launch: Launcher) -> None:
    events = run(launch, 3)
    assert phases(events)[2:] == [(1, "detect"), (1, "stop"), (1, "total")]
    (decision,) = [event for event in events if event["event"] == "ferroelastic.decision"]
    assert (decision["cause"], decision["decision"]) == ("failure", "end")


def test_a_job_that_a_signal_ends(launch: Launcher) -> None:
    options = (f"--log-dir={launch.folder}/logs", "--event-log-handler=jsonl")
    job = launch(*options, "--no-python", launch.zoo, "sleep", nproc=1, launcher=ALONE)
    assert job.lines(1) == ["ready"]
    file = launch.folder / "logs/latest/events.jsonl"
    assert eventually(lambda: file.exists() and '"START"' in file.read_text())
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    events = [{"event": one["name"], **one["metadata"]} for one in map(json.loads, file.read_text().splitlines())]
    assert phases(events)[2:] == [(1, "stop"), (1, "total")]


@pytest.mark.parametrize("path", ["/dev/full", "/nonexistent/events"])
def test_a_file_that_takes_nothing_fails_no_job(launch: Launcher, path: str) -> None:
    assert run(launch, 0, "--max-restarts=1", env={"FERROELASTIC_EVENT_FILE": path}) == []
    (job,) = launch.jobs
    assert job.errors.count("WARNING: Failed to write an event") == 1
    assert f"events were not written to {path}" in job.errors


def test_the_variable_names_the_file(launch: Launcher) -> None:
    events = run(launch, 3, env={"FERROELASTIC_EVENT_FILE": str(launch.folder / "events")})
    assert events[-1]["event"] == "torchelastic.worker.status.SUCCEEDED"  # the agent's, as torch's
    assert not list(launch.folder.glob("logs/*/events.jsonl"))
