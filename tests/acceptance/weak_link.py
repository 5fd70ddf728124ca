"""A gloo training on two nodes over a weak link: ``python -m tests.acceptance.weak_link`` prints a table.

The link loses packets, is slow, or is down for a while; or the agent of the far node is suspended for as long. Counts the rounds that end,
and the ranks that run in two processes at the same time. The link is this program: it passes packets on between two TUN devices. Takes root,
iproute2 and ``/dev/net/tun``; 7 minutes.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import select
import signal
import struct
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support.harness import FERRORUN, Job, Launcher
from tests.support.two_nodes import LINK, ip, on_network
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH_S = 12.0
"""For so long the training goes on, at least, and after the disturbance."""
DEADLINE_S = 10
"""Documented: what takes no longer than this ends no round."""

WORKER = """
import os, sys, threading, time
from datetime import timedelta
import torch, torch.distributed as dist
folder, rank = os.environ["DIR"], os.environ["RANK"]
path = f"{folder}/run.{rank}.{os.getpid()}"
def live():
    begun = time.monotonic()
    while True:
        with open(path + "~", "w") as file:
            file.write(f"{begun} {time.monotonic()}")
        os.rename(path + "~", path)
        time.sleep(0.02)
threading.Thread(target=live, daemon=True).start()
dist.init_process_group("gloo", timeout=timedelta(seconds=120))
step = 0
while not os.path.exists(folder + "/stop"):
    total = torch.ones(1000)
    dist.all_reduce(total)
    assert total[0] == dist.get_world_size()
    step += 1
    with open(f"{folder}/step.{rank}", "w") as file:
        file.write(str(step))
    flag = torch.tensor([float(os.path.exists(folder + "/stop"))])
    dist.all_reduce(flag)
    if flag.item():
        break
    time.sleep(0.05)
os._exit(0)
"""


class Case(NamedTuple):
    """What is done to the link or the agent."""

    name: str
    seconds: float
    begin: Callable[[Link, Job], None]
    end: Callable[[Link, Job], None]


class Link:
    """Two network namespaces, and the packets between them."""

    def __init__(self) -> None:
        self.loss = 0.0
        """Part of the packets that is lost."""
        self.delay_s = 0.0
        self.is_up = True
        mark = uuid.uuid4().hex[:6]
        self.names = (f"ferro-{mark}-a", f"ferro-{mark}-b")
        self._ends: list[int] = []
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._pass_on)

    def __enter__(self) -> Link:  # noqa: PYI034 - Self is in typing from Python 3.11 on only
        for number, name in enumerate(self.names, start=1):
            ip("netns", "add", name)
            end, device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK), f"f{number}{name[6:12]}"
            fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI))
            self._ends.append(end)
            ip("link", "set", device, "netns", name)
            ip("-n", name, "link", "set", device, "name", LINK)
            ip("-n", name, "addr", "add", f"10.83.0.{number}/24", "dev", LINK)
            ip("-n", name, "link", "set", LINK, "up")
            ip("-n", name, "link", "set", "lo", "up")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._wake[1])
        self._thread.join()
        os.close(self._wake[0])
        for end in self._ends:
            os.close(end)
        for name in self.names:
            ip("netns", "del", name)

    def _pass_on(self) -> None:
        late: list[tuple[float, int, int, bytes]] = []
        count = 0
        while True:
            wait_s = max(0.0, late[0][0] - time.monotonic()) if late else None
            ready, _, _ = select.select([*self._ends, self._wake[0]], [], [], wait_s)
            if self._wake[0] in ready:
                return
            for end in ready:
                packet = os.read(end, 65_536)
                if self.is_up and random.random() >= self.loss:
                    count += 1
                    heapq.heappush(late, (time.monotonic() + self.delay_s, count, self._other(end), packet))
            while late and late[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(late)
                with suppress(BlockingIOError):  # a full queue loses packets, too
                    os.write(end, packet)

    def _other(self, end: int) -> int:
        return self._ends[1 - self._ends.index(end)]


_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000


def changes(before: dict[str, Any]) -> tuple[Callable[[Link, Job], None], Callable[[Link, Job], None]]:
    """What begins and ends a weakness of the link."""

    def begin(link: Link, _far: Job) -> None:
        for name, value in before.items():
            setattr(link, name, value)

    def end(link: Link, _far: Job) -> None:
        link.loss, link.delay_s, link.is_up = 0.0, 0.0, True

    return begin, end


def tell(number: signal.Signals) -> Callable[[Link, Job], None]:
    return lambda _link, far: far.send(number)


CASES = [
    *(Case(f"{loss} % of the packets lost", LENGTH_S, *changes({"loss": loss / 100})) for loss in (1, 5, 10, 30)),
    Case("packets 200 ms late", LENGTH_S, *changes({"delay_s": 0.2})),
    *(Case(f"link down for {length} s", length, *changes({"is_up": False})) for length in (2, 5, 9, 20)),
    *(
        Case(f"agent suspended for {length} s", length, tell(signal.SIGSTOP), tell(signal.SIGCONT))
        for length in (2, 5, 9, 20)
    ),
]


def overlaps(folder: Path) -> int:
    """How many ranks ran in two processes at the same time."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for path in folder.glob("run.*.*[0-9]"):
        begun, last = path.read_text().split()
        runs.setdefault(path.name.split(".")[1], []).append((float(begun), float(last)))
    count = 0
    for intervals in runs.values():
        intervals.sort()
        count += sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(intervals))
    return count


def run(case: Case) -> tuple[int, int, str]:
    """Rounds that ended, ranks that ran twice, and how the agents ended."""
    with tempfile.TemporaryDirectory() as name, Link() as link:
        launcher = Launcher(Path(name), "")
        try:
            script = launcher.write("train.py", WORKER)
            commands = on_network(FERRORUN, link.names, "1:2", "last_call_timeout=1")
            env = {"GLOO_SOCKET_IFNAME": LINK}
            flags = ("--nproc-per-node=1", "--max-restarts=0", "--shutdown-timeout=5")
            near, far = (launcher.start(*command, *flags, script, env=env) for command in commands)
            assert eventually((launcher.folder / "step.1").exists, 60), near.story + far.story
            case.begin(link, far)
            time.sleep(case.seconds)
            case.end(link, far)
            time.sleep(LENGTH_S)
            (launcher.folder / "stop").touch()
            codes = [job.end(timeout_s=90) for job in (near, far)]
            rounds = near.errors.count("will restart worker group")
            return rounds, overlaps(launcher.folder), str(codes)
        finally:
            launcher.clean_up()


def main() -> int:
    print("| disturbance | rounds that ended | ranks that ran twice | exit codes |\n| --- | --- | --- | --- |")
    bad = 0
    for case in CASES:
        rounds, twice, codes = run(case)
        is_short = not (case.seconds > DEADLINE_S and case.name.endswith(" s"))
        bad += twice + (rounds if is_short else 0)
        print(f"| {case.name} | {rounds} | {twice} | {codes} |", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main() != 0)
