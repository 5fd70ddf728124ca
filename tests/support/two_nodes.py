"""Real trainings on two nodes of two workers each, disturbed again and again, under any launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.ports import free_port
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.harness import Job, Launcher

WORKER = str(Path(__file__).with_name("training_worker.py"))
WORKERS = 2
LINK = "link0"
HOST = "10.83.0.1"
_LOOK_S = 1.0
_MOST_IN_VAIN = 3
"""Restarts after one disturbance: if none of so many comes back, none will."""

Commands = tuple[tuple[str, ...], tuple[str, ...]]
"""What starts the agent that hosts the rendezvous, and what starts the other one."""


@dataclass(frozen=True)
class Disturbance:
    """What happens to a training."""

    way: str
    """``step``: the others are inside of a collective operation. ``idle``: only an agent can tell them."""
    what: str
    """The rank that is killed, negative from the end; ``agent``: one is killed, and later another one comes in its place, in turn;
    ``link``: it goes down and comes up, in turn."""

    def __str__(self) -> str:
        return f"{self.what} {self.way}"

    @property
    def victim(self) -> str:
        return self.what if self.what not in {"agent", "link"} else "none"


WORKER_KILLED = [Disturbance(way, rank) for rank in ("-1", "0") for way in ("step", "idle")]
AGENT_KILLED = [Disturbance(way, "agent") for way in ("step", "idle")]
LINK_DOWN = [Disturbance(way, "link") for way in ("step", "idle")]


@dataclass(frozen=True)
class Outcome:
    """What became of a training."""

    restarts: int
    came_back: int
    """Restarts whose workers met at their first attempt, and trained."""
    seconds: list[float]
    """From each disturbance that was overcome to the first step after it."""
    is_stuck: bool
    codes: list[int]
    """Exit codes of the agents at the end."""
    results: list[dict[str, Any]]
    """What rank 0 said at the end of the training."""


def on_loopback(launcher: Sequence[str], nodes: str, conf: str = "last_call_timeout=1") -> Commands:
    """Both nodes on this machine."""
    address = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=job", f"--nnodes={nodes}")
    host, other = (
        (*launcher, *address, "--local-addr=127.0.0.1", f"--rdzv-conf={conf},is_host={is_host}") for is_host in (1, 0)
    )
    return host, other


def on_network(launcher: Sequence[str], namespaces: tuple[str, str], nodes: str, conf: str) -> Commands:
    """Each node in a network namespace of its own."""
    address = ("--rdzv-backend=c10d", f"--rdzv-endpoint={HOST}:29400", "--rdzv-id=job", f"--nnodes={nodes}")
    host, other = (
        (
            *("ip", "netns", "exec", namespace, *launcher, *address),
            *(f"--local-addr=10.83.0.{number}", f"--rdzv-conf={conf},is_host={int(number == 1)}"),
        )
        for number, namespace in enumerate(namespaces, start=1)
    )
    return host, other


def results(*agents: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for agent in agents for line in agent.output.decode().splitlines() if line.startswith("{")]


def loss_of_undisturbed_training(folder: Path, disturbances: int) -> float:
    """The loss of a training of one process, with as many steps as one that is disturbed so often."""
    for number in range(disturbances):
        (folder / f"death.{number}").touch()
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    env = {**os.environ, **port, "DIR": str(folder), "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, WORKER, "step", "0", str(disturbances)], env=env, check=True, stdout=subprocess.PIPE
    )
    loss: float = json.loads(done.stdout)["loss"]
    return loss


class Training:
    """A training on two nodes that is disturbed ``number`` times in the same way."""

    def __init__(
        self, launcher: Launcher, commands: Commands, disturbance: Disturbance, number: int, timeout_s: float
    ) -> None:
        assert disturbance.victim != "none" or number % 2 == 0, "a node that is lost comes back"
        self._launcher = launcher
        self._commands = commands
        self._disturbance = disturbance
        self._number = number
        self._timeout_s = timeout_s
        self._began_ns = time.monotonic_ns()
        self.agents = [self._start(0), self._start(1)]
        """Those that are there; a killed one is replaced."""

    def run(self, namespaces: tuple[str, str] | None = None) -> Outcome:
        """See the training through to its end, or until nothing has happened for as long as patience lasts, or restarts are in vain."""
        if self._disturbance.victim != "none":
            is_through = self._eventually(lambda: self._count("trained") > self._number)
        else:
            is_through = self._disturb(namespaces)
        is_stuck = not (is_through and self._eventually(lambda: all(agent.agent.is_gone() for agent in self.agents)))
        begun, trained = self._times("begun"), self._times("trained")
        came_back = max(0, len(trained) - 1)
        return Outcome(
            restarts=max(len(begun) - 1, came_back + int(not is_through)),
            came_back=came_back,
            seconds=[
                (min(times) - death) / 1e9
                for number in range(self._number)
                for death in self._times(f"death.{number}")
                if (times := [at for at in trained if at > death])
            ],
            is_stuck=is_stuck,
            codes=[] if is_stuck else [agent.end() for agent in self.agents],
            results=[] if is_stuck else results(*self.agents),
        )

    def _disturb(self, namespaces: tuple[str, str] | None) -> bool:
        for number in range(self._number):
            is_lost = number % 2 == 1
            if not self._eventually(partial(self._is_reached, number, WORKERS if is_lost else 2 * WORKERS)):
                return False
            self._path(f"death.{number}").write_text(f"{time.monotonic_ns()}\n")
            if namespaces is not None:
                ip("-n", namespaces[1], "link", "set", LINK, "up" if is_lost else "down")
            elif is_lost:
                self.agents[1] = self._start(1)
            else:
                self.agents[1].send(signal.SIGKILL)
        return self._eventually(lambda: self._count("trained") > self._number)

    def _start(self, node: int) -> Job:
        flags = (f"--nproc-per-node={WORKERS}", "--max-restarts=1000", "--event-log-handler=null")
        arguments = (WORKER, self._disturbance.way, self._disturbance.victim, str(self._number))
        env = {"GLOO_SOCKET_IFNAME": LINK} if self._commands[node][0] == "ip" else {}
        # As a variable, because torchrun ignores it. Each restart follows soon after the last one.
        env["PET_RESTART_BACKOFF"] = "0"
        return self._launcher.start(*self._commands[node], *flags, *arguments, env=env)

    def _eventually(self, condition: Callable[[], bool]) -> bool:
        """Whether something comes true, for as long as there are attempts that are not all in vain."""
        while not eventually(condition, _LOOK_S):
            begun, trained = self._times("begun"), self._times("trained")
            latest = max([self._began_ns, *begun, *trained])
            in_vain = len(begun) - len([at for at in begun if at <= max(trained, default=0)])
            if latest < time.monotonic_ns() - self._timeout_s * 1e9 or in_vain > _MOST_IN_VAIN:
                return False
        return True

    def _is_reached(self, number: int, ranks: int) -> bool:
        """Whether all ranks wait for what is to happen."""
        return all(self._path(f"reached.{number}.{rank}").exists() for rank in range(ranks))

    def _path(self, name: str) -> Path:
        return self._launcher.folder / name

    def _times(self, name: str) -> list[int]:
        return [int(line) for line in self._path(name).read_text().split()] if self._path(name).exists() else []

    def _count(self, name: str) -> int:
        return len(self._times(name))


class NoNetworkError(Exception):
    """No network namespace can be made here."""


@contextmanager
def network() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a link between them.

    Raises:
        NoNetworkError: without root or iproute2, or where the kernel refuses.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise NoNetworkError("takes root and iproute2")
    mark = uuid.uuid4().hex[:6]
    names = (f"ferro-{mark}-a", f"ferro-{mark}-b")
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        raise NoNetworkError(f"no network namespace to be had: {error.stderr.decode().strip()}") from error
    try:
        ip("link", "add", f"fa{mark}", "type", "veth", "peer", "name", f"fb{mark}")
        for name, end, address in zip(names, ("fa", "fb"), (HOST, "10.83.0.2"), strict=True):
            ip("link", "set", f"{end}{mark}", "netns", name)
            ip("-n", name, "link", "set", f"{end}{mark}", "name", LINK)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            ip("-n", name, "link", "set", LINK, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def ip(*arguments: str) -> None:
    """Run ``ip`` of iproute2."""
    subprocess.run(["ip", *arguments], check=True, stderr=subprocess.PIPE)
