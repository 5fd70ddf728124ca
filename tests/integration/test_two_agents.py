"""Two agents of one job, in threads of this process: what their health servers tell of each other."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.waiting import eventually

from ferroelastic.agent.server import LocalElasticAgent, RestartSettings, WorkerSpec, WorkerState, _restarts
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std
from ferroelastic.rendezvous import RendezvousParameters
from ferroelastic.rendezvous._native import NativeRendezvous
from ferroelastic.utils.process_state import read_proc_state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE_S = 60.0
MOST_RANKS = 4

# Ends when it is told to, with the exit code that it is told. At SIGTERM it writes its stop notice, if it is to; it does not mind SIGTERM if
# it is to be stubborn.
WORKER = """
[ -e "$1/stubborn.$RANK" ] && { trap '' TERM; : > "$1/is-stubborn.$RANK"; }
[ -e "$1/reads-notice" ] && { trap 'cat "$FERROELASTIC_STOP_FILE" > "$1/notice.$RANK"; exit' TERM; : > "$1/ready.$RANK"; }
read code < "$1/gate.$RANK"; exit "$code"
"""


class Node:
    """An agent that runs in a thread, with two workers that end when they are told to, with the exit code that they are told."""

    def __init__(
        self, folder: Path, endpoint: str, *, is_host: bool, nodes: tuple[int, int], max_restarts: int, **more: Any
    ) -> None:
        parameters = RendezvousParameters(
            "c10d", endpoint, "the-job", *nodes, is_host=is_host, last_call_timeout=1, heartbeat_timeout=60
        )
        self.handler = NativeRendezvous(parameters)
        spec = WorkerSpec(
            role="trainer",
            local_world_size=2,
            rdzv_handler=self.handler,
            entrypoint="/bin/sh",
            args=("-c", WORKER, "worker", str(folder)),
            max_restarts=max_restarts,
            monitor_interval=600,
            **more,
        )
        logs = DefaultLogsSpecs(str(folder / f"logs.{is_host}"), redirects=Std.NONE)
        self.agent = LocalElasticAgent(spec, logs, exit_barrier_timeout=PATIENCE_S, shutdown_timeout=int(PATIENCE_S))
        self.outcome: Any = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self.agent.run()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.outcome = error
        finally:
            self.handler.shutdown()

    def _ask(self, path: str) -> str:
        server = self.agent._health_check_server
        assert server is not None
        assert server.board is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{server.board.port}{path}", timeout=PATIENCE_S) as answer:
            text: str = answer.read().decode()
            return text

    def runs_round(self, number: int) -> dict[str, Any]:
        """Wait until the workers of a round run; the status."""
        found: dict[str, Any] = {}

        def is_running() -> bool:
            server = self.agent._health_check_server
            if server is None or server.board is None:
                return False
            found.update(json.loads(self._ask("/status")))
            return bool(found["round"] == number and found["state"] == "running")

        assert eventually(is_running, PATIENCE_S), (found, self.outcome)
        return found

    def restarts(self) -> dict[str, int]:
        """By cause, from the metrics."""
        found = re.findall(r'^ferroelastic_restarts_total\{cause="(\w+)"\} (\d+)$', self._ask("/metrics"), re.MULTILINE)
        return {cause: int(count) for cause, count in found}

    def decisions(self) -> dict[str, int]:
        """By reason, from the metrics."""
        text = self._ask("/metrics")
        found = re.findall(r'^ferroelastic_restart_decisions_total\{reason="(\w+)"\} ([1-9]\d*)$', text, re.MULTILINE)
        return {reason: int(count) for reason, count in found}

    def ends(self) -> Any:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        return self.outcome


class Job:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[Node] = []
        self.gates: list[int] = []
        for rank in range(MOST_RANKS):
            os.mkfifo(folder / f"gate.{rank}")
            # For reading too: so it opens without a worker.
            self.gates.append(os.open(folder / f"gate.{rank}", os.O_RDWR | os.O_CLOEXEC))

    def node(self, nodes: tuple[int, int] = (2, 2), max_restarts: int = 3, **more: Any) -> Node:
        """Start the next agent; the first one hosts. Further arguments are those of the specification."""
        endpoint = f"localhost:{self.nodes[0].handler._port}" if self.nodes else "localhost:0"
        is_host = not self.nodes
        self.nodes.append(Node(self.folder, endpoint, is_host=is_host, nodes=nodes, max_restarts=max_restarts, **more))
        return self.nodes[-1]

    def let_end(self, rank: int, code: int) -> None:
        os.write(self.gates[rank], b"%d\n" % code)

    def clean_up(self) -> None:
        for node in self.nodes:
            node.handler.shutdown()
            node.agent._shutdown(signal.SIGKILL, 0)
        for node in self.nodes:
            node.thread.join(PATIENCE_S)
            node.agent._pcontext = None
        self.nodes.clear()
        for gate in self.gates:
            os.close(gate)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.setenv("TORCHELASTIC_HEALTH_CHECK_PORT", "0")
    made = Job(tmp_path)
    yield made
    made.clean_up()


def test_a_failure_is_reported_by_both(job: Job) -> None:
    host, guest = job.node(), job.node()
    host.runs_round(1)
    failing = guest.runs_round(1)["workers"][0]
    assert (failing["rank"], failing["local_rank"]) == (2, 0)
    job.let_end(2, code=7)
    reason = f"rank 2 (pid {failing['pid']}) exited with code 7"
    for node, told in ((guest, reason), (host, f"{reason} on 127.0.0.1")):
        restarts = node.runs_round(2)["restarts"]
        assert (restarts["failure"], restarts["membership"]) == (1, 0)
        assert (restarts["last"]["cause"], restarts["last"]["reason"]) == ("failure", told)
        assert node.restarts() == {"failure": 1, "membership": 0}
        assert node.agent._remaining_restarts == 2
    for rank in range(4):
        job.let_end(rank, code=0)
    assert [node.ends().state for node in (host, guest)] == [WorkerState.SUCCEEDED] * 2


def test_a_failure_is_reported_before_the_peers_of_the_worker_have_gone(job: Job) -> None:
    (job.folder / "stubborn.3").touch()
    host, guest = job.node(), job.node()
    workers = [worker["pid"] for worker in host.runs_round(1)["workers"]]
    stubborn = guest.runs_round(1)["workers"][1]["pid"]
    assert eventually((job.folder / "is-stubborn.3").exists, PATIENCE_S)
    job.let_end(2, code=7)
    assert eventually(lambda: all(read_proc_state(pid) in {None, "Z"} for pid in workers), PATIENCE_S)
    assert read_proc_state(stubborn) not in {None, "Z"}
    (job.folder / "stubborn.3").unlink()
    job.let_end(3, code=0)
    for node in (host, guest):
        assert node.runs_round(2)["restarts"]["failure"] == 1
    for rank in range(4):
        job.let_end(rank, code=0)
    assert [node.ends().state for node in (host, guest)] == [WorkerState.SUCCEEDED] * 2


def test_a_node_that_comes_and_one_that_goes_are_no_failures(job: Job) -> None:
    """Nor do they use up a restart: there is none."""
    host = job.node((1, 2), max_restarts=0)
    assert [worker["rank"] for worker in host.runs_round(1)["workers"]] == [0, 1]

    guest = job.node((1, 2), max_restarts=0)
    restarts = host.runs_round(2)["restarts"]
    assert (restarts["failure"], restarts["membership"]) == (0, 1)
    assert restarts["last"]["cause"] == "membership"
    assert re.fullmatch(r"127\.0\.0\.1 \(agent \d+\) joins", restarts["last"]["reason"])
    assert host.restarts() == {"failure": 0, "membership": 1}
    # To the newcomer it is the first round.
    assert guest.runs_round(1)["restarts"] == {"failure": 0, "membership": 0, "last": None, "last_decision": None}
    assert guest.restarts() == {"failure": 0, "membership": 0}

    guest.handler.leave("its machine is needed")
    restarts = host.runs_round(3)["restarts"]
    assert (restarts["failure"], restarts["membership"]) == (0, 2)
    assert re.fullmatch(r"127\.0\.0\.1 \(agent \d+\) left: its machine is needed", restarts["last"]["reason"])
    assert host.restarts() == {"failure": 0, "membership": 2}

    for rank in range(2):
        job.let_end(rank, code=0)
    assert host.ends().state == WorkerState.SUCCEEDED


def test_workers_are_told_that_a_node_that_joins_is_the_reason_of_their_stop(job: Job) -> None:
    (job.folder / "reads-notice").touch()
    host = job.node((1, 2), max_restarts=0)
    host.runs_round(1)
    assert eventually(lambda: all((job.folder / f"ready.{rank}").exists() for rank in (0, 1)), PATIENCE_S)
    guest = job.node((1, 2), max_restarts=0)
    host.runs_round(2)
    guest.runs_round(1)
    notices = [json.loads((job.folder / f"notice.{rank}").read_text()) for rank in (0, 1)]
    assert [(notice["reason"], notice["signal"]) for notice in notices] == [("membership", signal.SIGTERM)] * 2
    for rank in range(4):
        job.let_end(rank, code=0)
    assert [node.ends().state for node in (host, guest)] == [WorkerState.SUCCEEDED] * 2


def test_both_kinds_are_counted_side_by_side(job: Job) -> None:
    host = job.node((1, 2), max_restarts=1)
    host.runs_round(1)
    guest = job.node((1, 2), max_restarts=1)
    host.runs_round(2)
    failing = guest.runs_round(1)["workers"][1]
    job.let_end(failing["rank"], code=3)
    restarts = host.runs_round(3)["restarts"]
    assert (restarts["failure"], restarts["membership"]) == (1, 1)
    assert restarts["last"]["cause"] == "failure"
    assert host.restarts() == {"failure": 1, "membership": 1}
    guest.runs_round(2)
    assert guest.restarts() == {"failure": 1, "membership": 0}
    # The second failure is one too many for both.
    job.let_end(0, code=4)
    assert host.ends().state == WorkerState.FAILED
    assert "exited with code 4 on 127.0.0.1, and no restart is left" in str(guest.ends())


def test_a_node_that_has_succeeded_waits_for_the_others_only_until_its_timeout(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    # The record of the exception would keep the rendezvous alive.
    caplog.set_level(logging.CRITICAL, "ferroelastic.agent.server.api")
    host, guest = job.node(), job.node()
    for node in (host, guest):
        node.runs_round(1)
    guest.agent._exit_barrier_timeout = 0.2
    ranks = [[worker.global_rank for worker in node.agent.get_worker_group().workers] for node in (host, guest)]
    for rank in ranks[1]:
        job.let_end(rank, 0)
    assert guest.ends().state == WorkerState.SUCCEEDED
    assert host.thread.is_alive()
    for rank in ranks[0]:
        job.let_end(rank, 0)
    assert host.ends().state == WorkerState.SUCCEEDED


def test_all_nodes_have_the_same_decisions(job: Job) -> None:
    host, guest = job.node(), job.node()
    for round_, code in ((1, 7), (2, 8)):
        for node in (host, guest):
            node.runs_round(round_)
        job.let_end(2, code=code)
    for node in (host, guest):
        status = node.runs_round(3)["restarts"]
        assert node.decisions() == {"at_once": 1, "backoff": 1}
        text = (
            r"restart 2 of 3 follows after 0\.2\d s: 2 failures in a row within 10 s of the start \(--restart-backoff\)"
        )
        assert re.fullmatch(text, status["last_decision"]["text"])
        assert (node.agent._remaining_restarts, node.agent._restart_count()) == (1, 2)
    job.let_end(3, code=97)
    ended = [node.ends() for node in (host, guest)]
    assert [node.agent.restart_decision for node in (host, guest)] == ["exit code 97 forbids a restart"] * 2
    assert ended[0].exit_code == guest.agent.job_exit_code == 97


def test_a_node_with_another_policy_is_refused_with_both_values(job: Job) -> None:
    host = job.node(restart_settings=RestartSettings(fatal_exit_codes="3"))
    assert eventually(lambda: host.handler._client is not None and bool(host.handler._client.address), PATIENCE_S)
    error = job.node(restart_settings=RestartSettings(fatal_exit_codes="4")).ends()
    assert "the job has --fatal-exit-codes=3, this node was started with --fatal-exit-codes=4" in str(error)


def test_progress_of_one_node_counts_for_the_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's workers fail, and a file of the other node changes. At the end no file changes."""
    limit, rounds = 3, 7
    monkeypatch.setattr(_restarts, "_PROGRESS_INTERVAL_S", 0.02)
    files = [job.folder / name for name in ("host", "guest")]
    nodes = []
    for file in files:
        settings = RestartSettings(restarts_without_progress=limit, progress_file=str(file), restart_backoff=0.0)
        nodes.append(job.node(max_restarts=2 * rounds, restart_settings=settings))
    for round_ in range(1, rounds + limit):
        for node in nodes:
            node.runs_round(round_)
        if round_ < rounds:
            files[1].write_text(str(round_))
            assert eventually(lambda: nodes[1].agent._restarts._has_found_progress, PATIENCE_S)
        job.let_end(0, code=7)
    for node in nodes:
        node.ends()
        assert node.agent.restart_decision == f"{limit} restarts made no progress (--restarts-without-progress)"


def test_a_worker_that_runs_on_after_another_one_has_succeeded(job: Job) -> None:
    host = job.node((1, 1), max_restarts=1, restart_settings=RestartSettings(early_exit_timeout=0.3))
    host.runs_round(1)
    job.let_end(0, code=0)
    assert host.runs_round(2)["restarts"]["failure"] == 1
    assert host.decisions() == {"at_once": 1}
    for rank in range(2):
        job.let_end(rank, code=0)
    assert host.ends().state == WorkerState.SUCCEEDED


def test_nodes_that_run_on_after_another_one_has_succeeded(job: Job) -> None:
    settings = RestartSettings(early_exit_timeout=0.3, fatal_causes="early_exit")
    host, guest = job.node(restart_settings=settings), job.node(restart_settings=settings)
    for node in (host, guest):
        node.runs_round(1)
    for rank in (2, 3):
        job.let_end(rank, code=0)
    for node in (host, guest):
        node.ends()
        assert node.agent.restart_decision == "the cause early_exit is final (--fatal-causes)"
