"""Nodes that join, leave, are lost and return, spares, second jobs, mixed outcomes: each row of the table in docs/elastic.md."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from tests.support.harness import FERRORUN, Job, Launcher, gone_at_ns
from tests.support.ports import port_for_one
from tests.support.waiting import LONG_S, eventually, is_parked
from tests.support.warm import warm_processes

# Says where it runs, for how long, and ends as its node is told: "exit N" in the file of its name.
WORKER = """
import os, signal, sys, time
folder, node = os.environ["DIR"], sys.argv[1]
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
signal.signal(signal.SIGTERM, lambda *_: os._exit(1) if node != "deaf" else None)
os.write(1, f"{rank} of {os.environ['WORLD_SIZE']}, restart {attempt}\\n".encode())
while True:
    with open(f"{folder}/lives.{os.environ['LOCAL_RANK']}.{os.getpid()}", "w") as lives:
        lives.write(f"{rank} {time.monotonic()}")
    if os.path.exists(f"{folder}/exit.{node}"):
        os._exit(int(open(f"{folder}/exit.{node}").read()))
    time.sleep(0.01)
"""


class Nodes:
    """Agents of one endpoint, with one worker each."""

    def __init__(self, launch: Launcher) -> None:
        self.launch = launch
        self.script = launch.write("worker.py", WORKER)
        self.port = port_for_one()

    def start(self, name: str, nodes: str = "2", *options: str, conf: str = "", is_host: bool | None = None) -> Job:
        confs = [f"is_host={int(is_host)}"] if is_host is not None else []
        confs += ["last_call_timeout=1", *filter(None, [conf])]
        address = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", f"--rdzv-conf={','.join(confs)}")
        arguments = (f"--nnodes={nodes}", "--shutdown-timeout=10", *options, self.script, name)
        return self.launch(*arguments, nproc=1, launcher=(*FERRORUN, *address))

    def let_end(self, name: str, code: int) -> None:
        path = self.launch.folder / f"exit.{name}"
        path.with_suffix(".part").write_text(str(code))
        path.with_suffix(".part").rename(path)

    def let_live(self, name: str) -> None:
        (self.launch.folder / f"exit.{name}").unlink()


@pytest.fixture
def nodes(launch: Launcher) -> Nodes:
    return Nodes(launch)


def says(job: Job, text: str) -> bool:
    return eventually(lambda: text in job.errors, LONG_S)


def two(nodes: Nodes, *options: str, size: str = "2", **more: Any) -> tuple[Job, Job]:
    host, guest = (nodes.start(name, size, *options, is_host=name == "a", **more) for name in "ab")
    assert host.lines(1) == ["0 of 2, restart 0"], host.story
    assert guest.lines(1) == ["1 of 2, restart 0"], guest.story
    return host, guest


# ---- second jobs and spares


@pytest.mark.parametrize("code", [0, 7])
def test_agents_of_a_second_job_at_the_endpoint_of_one_that_runs_are_spares_and_say_so(nodes: Nodes, code: int) -> None:
    first = two(nodes, "--max-restarts=0")
    second = [nodes.start(name, "2", "--max-restarts=0") for name in "cd"]
    why = "2 of 2 nodes run, and --nnodes allows no more"
    for job in second:
        assert says(job, f"this node waits as a spare, and no worker is started: {why}"), job.story
    for name in "ab":
        nodes.let_end(name, code)
    assert [job.end() for job in first] == [code] * 2
    assert [job.end() for job in second] == [code] * len(second)
    for job in second:
        end = "no worker was started on it" if code == 0 else "the job has ended: rank"
        assert end in job.errors, job.errors
        assert job.output == b""


@pytest.mark.skipif(os.environ.get("FERROELASTIC_PIDFD") == "0", reason="warm workers need pidfds")
def test_a_spare_node_imports_while_it_waits_and_starts_warm(nodes: Nodes) -> None:
    nodes.script = nodes.launch.write("worker.py", WORKER.replace("restart {attempt}", "{'colorsys' in sys.modules}"))
    warm = ("--warm-workers", "--warm-imports=colorsys")
    host, guest = (nodes.start(name, "2", *warm, is_host=name == "a") for name in "ab")
    assert [host.lines(1), guest.lines(1)] == [["0 of 2, False"], ["1 of 2, False"]]
    spare = nodes.start("c", "2", *warm, is_host=False)
    assert eventually(lambda: [len(warm_processes(job).parked) for job in (host, spare)] == [1, 1], LONG_S)
    guest.send(signal.SIGKILL)
    assert [host.lines(1), spare.lines(1)] == [["0 of 2, True"], ["1 of 2, True"]]
    for name in "ac":
        nodes.let_end(name, 0)
    assert [host.end(), spare.end()] == [0, 0]


def test_an_agent_that_comes_at_the_end_looks_for_the_next_host_and_fails(nodes: Nodes) -> None:
    host, guest = two(nodes)
    nodes.let_end("b", 0)
    settle(guest)
    late = nodes.start("c", conf="join_timeout=2", is_host=False)
    assert says(late, "no worker is started: workers of other nodes have succeeded already"), late.story
    nodes.let_end("a", 0)
    assert [host.end(), guest.end()] == [0, 0]
    assert late.end() == 1, late.story
    assert "ended before this node joined (the job has succeeded)" in late.errors, late.story
    assert "no new host appeared within 2 s" in late.errors
    assert late.output == b""


def test_an_agent_that_comes_after_the_end_hosts_the_next_job_if_it_can(nodes: Nodes) -> None:
    host, guest = two(nodes)
    nodes.let_end("b", 0)
    settle(guest)
    guest.send(signal.SIGSTOP)
    nodes.let_end("a", 0)
    assert eventually(lambda: not nodes_workers(host), LONG_S)
    late, other = nodes.start("c"), nodes.start("d")
    assert host.end() == 0
    assert sorted(late.lines(1) + other.lines(1)) == ["0 of 2, restart 0", "1 of 2, restart 0"]
    for name in "cd":
        nodes.let_end(name, 0)
    assert [late.end(), other.end()] == [0, 0]
    guest.send(signal.SIGCONT)
    assert guest.end() == 0


def settle(job: Job) -> None:
    """The workers of a node are gone, and its agent waits."""
    assert eventually(lambda: not nodes_workers(job) and is_parked(job.agent.pid), LONG_S), job.story


def nodes_workers(job: Job) -> list[int]:
    return [
        pid for pid, command in job.processes().items() if "worker.py" in command and "ferroelastic.run" not in command
    ]


@pytest.mark.parametrize("order", ["host first", "host last"])
def test_nodes_with_different_restarts_are_refused_with_both_values(nodes: Nodes, order: str) -> None:
    names = "ab" if order == "host first" else "ba"
    text = "the job has --max-restarts=1, this node was started with --max-restarts=3: give all nodes the same"
    jobs = {}
    for name in names:
        restarts = 1 if name == "a" else 3
        jobs[name] = nodes.start(name, "2", f"--max-restarts={restarts}", is_host=name == "a")
        if name == "a":
            assert eventually(lambda: is_parked(jobs["a"].agent.pid), LONG_S)
    assert jobs["b"].end() == 1
    assert text in jobs["b"].errors, jobs["b"].story
    assert says(jobs["a"], f"was turned away: {text}")
    jobs["a"].send(signal.SIGTERM)
    assert jobs["a"].end() == 128 + signal.SIGTERM


# ---- mixed outcomes


@pytest.mark.parametrize("failing", ["a", "b"])
def test_a_node_whose_workers_have_succeeded_ends_with_the_code_of_the_job(nodes: Nodes, failing: str) -> None:
    host, guest = two(nodes, "--max-restarts=0")
    succeeding = "b" if failing == "a" else "a"
    nodes.let_end(succeeding, 0)
    assert eventually(lambda: not nodes_workers(guest if failing == "a" else host), LONG_S)
    nodes.let_end(failing, 7)
    assert [host.end(), guest.end()] == [7, 7]
    quiet = guest if failing == "a" else host
    assert "exited with code 7" in quiet.errors, quiet.errors


def test_where_workers_of_two_nodes_fail_the_first_counts_on_both(nodes: Nodes) -> None:
    host, guest = two(nodes, "--max-restarts=0")
    host.send(signal.SIGSTOP)  # it hears of its own worker's end after that of the other
    nodes.let_end("b", 9)
    assert eventually(lambda: not nodes_workers(guest), LONG_S)
    nodes.let_end("a", 7)
    assert eventually(lambda: not nodes_workers(host), LONG_S)
    host.send(signal.SIGCONT)
    assert [host.end(), guest.end()] == [9, 9], host.errors


def test_the_end_of_the_host_is_that_of_all_and_has_its_code(nodes: Nodes) -> None:
    host, guest = two(nodes)
    host.send(signal.SIGTERM)
    assert [host.end(), guest.end()] == [128 + signal.SIGTERM] * 2
    assert "it hosts the rendezvous, and left: its agent was ended by SIGTERM" in guest.errors


# ---- what counts as a restart


def test_failures_count_though_another_node_is_killed_while_it_stops(nodes: Nodes) -> None:
    """Each time, the other node is lost a second after the failure."""
    host = nodes.start("a", "1:2", "--max-restarts=1", is_host=True)
    for restart in (0, 1):
        deaf = nodes.start("deaf", "1:2", "--max-restarts=1", is_host=False)
        assert deaf.lines(1) == [f"1 of 2, restart {restart}"], deaf.story
        while host.lines(1) != [f"0 of 2, restart {restart}"]:
            pass
        nodes.let_end("a", 3)
        if restart == 0:
            assert eventually(lambda: not nodes_workers(host) or "restart worker group" in host.errors, LONG_S)
            time.sleep(1.0)
        else:
            time.sleep(0.4)
        deaf.send(signal.SIGKILL)
        if restart == 0:
            nodes.let_live("a")
    assert host.end() == 3, host.story
    assert "no restart is left" not in host.errors.split("restart 1")[0]


def test_a_signal_to_a_node_does_not_undo_the_last_failure(nodes: Nodes) -> None:
    host, guest = two(nodes, "--max-restarts=0", size="1:2")
    nodes.let_end("a", 3)
    assert eventually(lambda: not nodes_workers(host), LONG_S)
    time.sleep(0.1)
    guest.send(signal.SIGTERM)
    assert host.end() == 3, host.story
    assert guest.end() in {3, 128 + signal.SIGTERM}


# ---- silence

SILENCE_S = 4


def alive(nodes: Nodes) -> dict[str, float]:
    """When each rank said last that it lives, by its process."""
    lives = {}
    for path in nodes.launch.folder.glob("lives.*"):
        rank, _, at = path.read_text().partition(" ")
        if at:
            lives[f"{rank} {path.suffix}"] = float(at)
    return lives


def test_an_agent_that_is_suspended_for_less_than_the_silence_is_not_lost(nodes: Nodes) -> None:
    host, guest = two(nodes, size="1:2", conf=f"heartbeat_timeout={SILENCE_S}")
    guest.send(signal.SIGSTOP)
    assert says(host, "its machine answers, so the agent is suspended or stuck"), host.story
    guest.send(signal.SIGCONT)
    for name in "ab":
        nodes.let_end(name, 0)
    assert [host.end(), guest.end()] == [0, 0], host.story
    assert "will restart" not in host.errors + guest.errors


def test_no_rank_runs_twice_while_an_agent_is_suspended(nodes: Nodes) -> None:
    host, guest = two(nodes, size="1:2", conf=f"heartbeat_timeout={SILENCE_S}")
    (worker,) = [guest.watch(pid) for pid in nodes_workers(guest)]
    suspended = time.monotonic_ns()
    guest.send(signal.SIGSTOP)
    # Its guard ends the worker before the others go on.
    ended = gone_at_ns([worker])[worker.pid]
    assert host.lines(1) == ["0 of 1, restart 0"], host.story
    begun = time.monotonic_ns()
    assert suspended < ended < begun
    guest.send(signal.SIGCONT)
    assert host.lines(1) == ["0 of 2, restart 0"], host.story
    assert guest.lines(1) == ["1 of 2, restart 0"], guest.story
    for name in "ab":
        nodes.let_end(name, 0)
    assert [host.end(), guest.end()] == [0, 0], guest.story
    assert "others take their ranks" in guest.errors or "declared lost" in guest.errors, guest.errors


def test_a_suspended_host_is_waited_for(nodes: Nodes) -> None:
    host, guest = two(nodes, size="1:2", conf=f"heartbeat_timeout={SILENCE_S}")
    host.send(signal.SIGSTOP)
    time.sleep(SILENCE_S / 2)
    host.send(signal.SIGCONT)
    time.sleep(0.5)
    for name in "ab":
        nodes.let_end(name, 0)
    assert [host.end(), guest.end()] == [0, 0], guest.story
    assert "will restart" not in host.errors + guest.errors


def test_the_death_of_an_agent_is_known_at_once(nodes: Nodes) -> None:
    host, guest = two(nodes, size="1:2")
    guest.send(signal.SIGKILL)
    assert host.lines(1) == ["0 of 1, restart 0"], host.story
    assert guest.end() == -signal.SIGKILL
    host.send(signal.SIGTERM)
    host.end()
