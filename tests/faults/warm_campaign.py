"""A campaign of faults of warm workers: zygotes and parked workers of many short jobs are killed and suspended at random moments.

    python -m tests.faults.warm_campaign --number 200 --parallel 2    # all cases of seed 0
    python -m tests.faults.warm_campaign --seed 0 --only 17           # one of them once more

In each case nothing of the job is left, each restart happens, and the job succeeds unless a fault has hit a worker after its release.
Prints the troubles and a summary, and ends with 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.harness import Launcher
from tests.support.warm import name_of, start_warm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.harness import Job

RESTARTS = 6
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
ALL = 0.1
"""Probability of a fault to all warm processes of a job."""
SUSPENDED_S = 0.3
MAX_PAUSE_S = 0.6
"""Upper bound of the time between two faults. Shorter pauses leave no warm starts."""
WORKER = r"""
import os, sys, time
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank = os.environ["RANK"]
os.write(1, f"{attempt} {rank} {'warm' if 'light' in sys.modules else 'cold'}\n".encode())
if attempt < int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
    time.sleep(float(os.environ["PAUSES"].split(",")[attempt]) if rank == "0" else 1000)
    sys.exit(3)
"""


@dataclass
class Verdict:
    """The outcome of a case."""

    index: int
    faults: int = 0
    warm: int = 0
    cold: int = 0
    troubles: list[str] = field(default_factory=list)


class Faults:
    """The faults of one job, at random moments until the job ends."""

    def __init__(self, job: Job, dice: random.Random) -> None:
        self._job = job
        self._dice = dice
        self._resume_at: dict[int, float] = {}
        self.hit: list[int] = []

    def run(self) -> None:
        """Disturb the job until it has ended."""
        while not self._job.agent.is_gone():
            time.sleep(self._dice.uniform(0, MAX_PAUSE_S))
            warm = [pid for pid in self._job.processes() if name_of(pid) == "ferro-warm"]
            if warm:
                victims = warm if self._dice.random() < ALL else [self._dice.choice(warm)]
                number = self._dice.choice(SIGNALS)
                for pid in victims:
                    self._send(pid, number)
            self._resume(time.monotonic())
        self._resume(float("inf"))

    def _send(self, pid: int, number: signal.Signals) -> None:
        with suppress(OSError):
            fd = os.pidfd_open(pid)
            try:
                if name_of(pid) == "ferro-warm":
                    self.hit.append(pid)
                    signal.pidfd_send_signal(fd, number)
                    if number == signal.SIGSTOP:
                        self._resume_at[pid] = time.monotonic() + SUSPENDED_S
            finally:
                os.close(fd)

    def _resume(self, now: float) -> None:
        """Resume suspended processes. One that was suspended just after its release is a worker, and the job waits for it."""
        for pid in [pid for pid, at in self._resume_at.items() if at <= now]:
            del self._resume_at[pid]
            if pid in self._job.processes():
                with suppress(OSError):
                    os.kill(pid, signal.SIGCONT)


def run_case(seed: int, index: int, folder: Path) -> Verdict:
    """Run one job with faults."""
    dice = random.Random(f"{seed}.{index}")
    verdict = Verdict(index)
    folder.mkdir(parents=True)
    launch = Launcher(folder, "")
    nproc = dice.randint(1, 3)
    pauses = ",".join(f"{dice.choice([0, dice.uniform(0, 0.3)]):.3f}" for _ in range(RESTARTS))
    options = ("--preload",) if dice.random() < 0.3 else ()
    job = start_warm(launch, *options, worker=WORKER, restarts=RESTARTS, nproc=nproc, env={"PAUSES": pauses})
    faults = Faults(job, dice)
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(faults.run)
        try:
            code = job.end(timeout_s=60.0)
        except BaseException as error:  # noqa: BLE001 - pytest.fail of the harness
            verdict.troubles.append(f"does not end: {str(error)[-3000:]}")
            code = -1
            job.process.kill()
        done.result()
    verdict.faults = len(faults.hit)
    judge(verdict, job, code, faults.hit)
    left = job.clean_up()
    if left:
        verdict.troubles.append(f"left behind: {left}")
    return verdict


def judge(verdict: Verdict, job: Job, code: int, hit: list[int]) -> None:
    """Compare a job's output with its faults."""
    lines = [line.split() for line in job.output.decode().splitlines()]
    verdict.warm = sum(line[2] == "warm" for line in lines)
    verdict.cold = len(lines) - verdict.warm
    # A process that was hit at the moment of its release is a worker, and its end is a failure of the attempt.
    failed = {int(pid) for pid in re.findall(r"local_rank: \d+ \(pid: (\d+)\) of binary", job.errors)}
    casualties = failed & set(hit)
    attempts = {int(line[0]) for line in lines if line[1] == "0"}
    missing = set(range(RESTARTS + 1)) - attempts
    if len(missing) > len(casualties):
        verdict.troubles.append(f"attempts {missing} are missing")
    if code != 0 and not casualties:
        verdict.troubles.append(f"exit code {code}")
    if "Traceback" in job.errors:
        verdict.troubles.append("a traceback")
    if verdict.troubles:
        log = "\n".join(line for line in job.errors.splitlines() if not line.startswith("{"))
        verdict.troubles.append(log[-3000:])


def run_all(seed: int, indices: Iterable[int], folder: Path, parallel: int) -> list[Verdict]:
    """Run cases, some at a time."""
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda index: run_case(seed, index, folder / str(index)), indices))


def main() -> int:
    """Run the campaign of the command line."""
    parser = argparse.ArgumentParser(description="Random faults of warm workers.")
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--parallel", type=int, default=2)
    args = parser.parse_args()
    indices = range(args.number) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory(prefix="ferro-warm-") as folder:
        verdicts = run_all(args.seed, indices, Path(folder), args.parallel)
    bad = [verdict for verdict in verdicts if verdict.troubles]
    for verdict in bad:
        print(f"case {verdict.index}:", *verdict.troubles, sep="\n  ")
    faults, warm, cold = (sum(getattr(verdict, name) for verdict in verdicts) for name in ("faults", "warm", "cold"))
    print(
        f"{len(verdicts)} jobs, {faults} faults, {warm} warm and {cold} cold starts of workers: {len(bad)} with trouble"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
