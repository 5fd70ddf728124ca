"""Jobs of two nodes, started by the two launchers as commands: what one node shows when something happens on another."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import FERRORUN, Job, Launcher, launch, zoo
from tests.support.ports import port_for_one
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.implementations import Implementation

__all__ = ["launch", "zoo"]

SILENCE_S = 3

# A file for each worker that runs. It ends as the file of its node says.
WORKER = """
import os, signal, sys, time
folder, node = os.environ["DIR"], sys.argv[1]
signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
os.rename(open(f"{folder}/.{os.getpid()}", "w").name, f"{folder}/{node}.rank{os.environ['RANK']}.{os.getpid()}")
while not os.path.exists(f"{folder}/exit.{node}"):
    time.sleep(0.01)
os._exit(int(open(f"{folder}/exit.{node}").read()))
"""


class Nodes:
    """Agents of one endpoint with one worker each, under one of the two launchers."""

    def __init__(self, impl: Implementation, launch: Launcher) -> None:
        self.launch = launch
        self.launcher = (sys.executable, "-m", "torch.distributed.run") if impl.is_torch else FERRORUN
        self.silence = (
            f"keep_alive_interval=1,keep_alive_max_attempt={SILENCE_S}"
            if impl.is_torch
            else f"heartbeat_timeout={SILENCE_S}"
        )
        self.script = launch.write("worker.py", WORKER)
        self.port = port_for_one()

    def start(self, name: str, *options: str, nodes: str = "2", env: dict[str, str] | None = None) -> Job:
        address = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", "--local-addr=127.0.0.1")
        conf = f"--rdzv-conf=is_host={int(name == 'a')},last_call_timeout=1,join_timeout=60,{self.silence}"
        restarts = () if any(option.startswith("--max-restarts") for option in options) else ("--max-restarts=0",)
        arguments = (f"--nnodes={nodes}", *restarts, *options, self.script, name)
        return self.launch(*arguments, nproc=1, launcher=(*self.launcher, *address, conf), env=env)

    def workers(self, pattern: str) -> list[Path]:
        return sorted(self.launch.folder.glob(pattern))

    def begin(self, name: str, job: Job) -> None:
        assert eventually(lambda: bool(self.workers(f"{name}.rank*")), LONG_S), job.story

    def let_end(self, name: str, code: int) -> None:
        part = self.launch.folder / f".exit.{name}"
        part.write_text(str(code))
        part.rename(self.launch.folder / f"exit.{name}")


@pytest.fixture
def nodes(impl: Implementation, launch: Launcher) -> Nodes:
    return Nodes(impl, launch)


def two(nodes: Nodes, size: str = "2") -> tuple[Job, Job]:
    jobs = (nodes.start("a", nodes=size), nodes.start("b", nodes=size))
    for name, job in zip("ab", jobs, strict=True):
        nodes.begin(name, job)
    return jobs


def test_a_node_whose_workers_succeeded_while_the_job_fails(impl: Implementation, nodes: Nodes) -> None:
    host, guest = two(nodes)
    nodes.let_end("b", 0)
    assert eventually(lambda: not worker_pids(guest), LONG_S), guest.story
    nodes.let_end("a", 7)
    assert host.end() == impl.expect("exit-code", torch=1, ours=7), host.story
    assert guest.end() == impl.expect("failure-everywhere", torch=0, ours=7), guest.story


def test_agents_of_a_second_job_at_the_same_endpoint(impl: Implementation, nodes: Nodes) -> None:
    first = two(nodes)
    second = nodes.start("c", env={"LOGLEVEL": "INFO"})
    is_told = "no worker is started"
    meets = "Rendezvous'ing worker group" if impl.is_torch else is_told
    assert eventually(lambda: meets in second.errors, LONG_S), second.story
    for name in "ab":
        nodes.let_end(name, 0)
    assert [job.end() for job in first] == [0, 0]
    code = second.end()
    assert (code, is_told in second.errors) == impl.expect("spares-say-so", torch=(1, False), ours=(0, True))
    assert nodes.workers("c.rank*") == []


def test_nodes_with_different_settings(impl: Implementation, nodes: Nodes) -> None:
    host = nodes.start("a", "--max-restarts=0")
    other = nodes.start("b", "--max-restarts=3")
    if impl.is_torch:
        for name in "ab":
            nodes.let_end(name, 0)
    else:
        assert other.end() == 1
        host.send(signal.SIGTERM)
    ends = (host.end(), other.end())
    assert ends == impl.expect("equal-settings", torch=(0, 0), ours=(128 + signal.SIGTERM, 1)), other.story


def test_a_node_whose_agent_is_suspended(impl: Implementation, nodes: Nodes) -> None:
    host, guest = two(nodes, "1:2")
    (its_worker,) = worker_pids(guest)
    worker = guest.watch(its_worker)
    guest.send(signal.SIGSTOP)
    if impl.is_torch:
        time.sleep(2 * SILENCE_S)
    else:
        assert eventually(lambda: len(nodes.workers("a.rank*")) > 1, LONG_S), host.story
    starts, runs_on = len(nodes.workers("a.rank*")), not worker.is_gone()
    assert (starts, runs_on) == impl.expect("silent-node", torch=(1, True), ours=(2, False))
    nodes.let_end("a", 0)
    nodes.let_end("b", 0)
    guest.send(signal.SIGCONT)
    assert host.end() == 0
    guest.end()


def worker_pids(job: Job) -> list[int]:
    return [pid for pid, command in job.processes().items() if "worker.py" in command and "--nnodes" not in command]
