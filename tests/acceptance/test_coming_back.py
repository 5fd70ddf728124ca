"""Restarts of a job whose workers talk to each other come back: all of them, on every rendezvous."""

from __future__ import annotations

import pytest
from tests.support.harness import FERRORUN, Launcher
from tests.support.ports import free_port

pytest.importorskip("torch")

RESTARTS = 20

# A round of talk in which everybody has a say; then the last rank dies, in all attempts but the last one. The others leave without
# ceremony: where Python ends while a thread of gloo's lets go of its last tensor, torch 2.13 aborts.
WORKER_FAILS_EVERY_ATTEMPT = """
import os, signal, sys
import torch
import torch.distributed as dist

attempt, rank, size = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK", "WORLD_SIZE"))
dist.init_process_group("gloo")
total = torch.tensor([float(rank + 1)])
dist.all_reduce(total)
assert total.item() == size * (size + 1) / 2
if rank == 0:
    print("attempt", attempt, flush=True)
if attempt < int(sys.argv[1]):
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL) if attempt % 2 else os._exit(1)
    dist.barrier()  # in which the others find out
os._exit(0)
"""

# The same with one death in all, on whatever node: the number of restarts is each agent's own.
WORKER_FAILS_ONCE = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
marker = Path(os.environ["DIR"]) / "died"
is_first = not marker.exists()
dist.init_process_group("gloo")
total = torch.tensor([float(rank + 1)])
dist.all_reduce(total)
if is_first:
    dist.barrier()  # all have looked
    if rank == size - 1:
        marker.touch()
        os._exit(1)
    dist.barrier()
print(f"rank {rank} of {size} says {total.item()}", flush=True)
os._exit(0)
"""


def attempts(count: int) -> list[str]:
    return [f"attempt {number}" for number in range(count + 1)]


def test_every_one_of_many_restarts_comes_back(launch: Launcher) -> None:
    job = launch(f"--max-restarts={RESTARTS}", launch.write("worker.py", WORKER_FAILS_EVERY_ATTEMPT), str(RESTARTS))
    assert job.end(timeout_s=170) == 0, job.story
    assert job.output.decode().splitlines() == attempts(RESTARTS)


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_restarts_come_back_at_a_port_that_was_given(launch: Launcher, backend: str) -> None:
    port = free_port()
    flags = {
        "static": ("--nnodes=1", "--master-addr=127.0.0.1", f"--master-port={port}"),
        "c10d": ("--nnodes=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=given"),
    }
    script = launch.write("worker.py", WORKER_FAILS_EVERY_ATTEMPT)
    job = launch("--max-restarts=3", script, "3", launcher=(*FERRORUN, *flags[backend]))
    assert job.end() == 0, job.story
    assert job.output.decode().splitlines() == attempts(3)


def test_two_agents_come_back_together(launch: Launcher) -> None:
    flags = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=two")
    script = launch.write("worker.py", WORKER_FAILS_ONCE)
    agents = [launch("--max-restarts=3", script, nproc=1, launcher=(*FERRORUN, *flags)) for _ in range(2)]
    assert [agent.end() for agent in agents] == [0, 0], [agent.story for agent in agents]
    said = sorted(line for agent in agents for line in agent.output.decode().splitlines())
    assert said == [f"rank {rank} of 2 says 3.0" for rank in range(2)]
    assert (launch.folder / "died").exists()
