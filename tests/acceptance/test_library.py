"""As a library, in programs that were written for torch: each here is one, with this package's agent put in."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.ports import free_port

if TYPE_CHECKING:
    from tests.support.harness import Launcher

pytest.importorskip("torch")
pytestmark = pytest.mark.engine

# Everything but the agent is torch's: handler, specification, log specification.
TORCH_OBJECTS = """
import os, signal, sys
import torch.distributed.elastic.rendezvous.registry
from torch.distributed.elastic.agent.server import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters

from ferroelastic.agent.server import LocalElasticAgent   # the line that was changed

def work(factor):
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    print("attempt", attempt, flush=True)
    if attempt == 0 and os.environ["RANK"] == "0":
        with open(os.environ["DIR"] + "/meeting", "w"):  # a FIFO
            signal.pause()
    if attempt == 0:
        with open(os.environ["DIR"] + "/meeting"):
            os._exit(3)
    return int(os.environ["RANK"]) * factor

def main(backend, endpoint):
    parameters = RendezvousParameters(backend, endpoint, "the-run", 1, 1, rank=0)
    handler = torch.distributed.elastic.rendezvous.registry.get_rendezvous_handler(parameters)
    spec = WorkerSpec(
        role="trainer", local_world_size=2, entrypoint=work, args=(10,), rdzv_handler=handler, max_restarts=1,
        monitor_interval=0.1,
    )
    logs = DefaultLogsSpecs(log_dir=os.environ["DIR"] + "/logs", redirects=Std.NONE, tee={0: Std.OUT, 1: Std.NONE})
    result = LocalElasticAgent(spec=spec, logs_specs=logs, start_method="spawn").run()
    handler.shutdown()
    assert isinstance(result, RunResult), type(result).__mro__
    assert not result.is_failed()
    print("result", result.state.value, result.return_values, flush=True)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""

# The launcher's function, in a program that catches torch's exception.
LAUNCHER = """
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ferroelastic.launcher.api import LaunchConfig, elastic_launch

def train(n):
    if n == 0:
        raise ValueError("nothing to train")
    return n * n

def config():
    return LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="demo",
        max_restarts=0,
    )

if __name__ == "__main__":
    print(elastic_launch(config(), train)(7), flush=True)
    try:
        elastic_launch(config(), train)(0)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print("caught", error.name, failure.exitcode, "ValueError: nothing to train" in str(error), flush=True)
"""

# An agent that somebody has derived from torch's interface, with a hook of its own.
SUBCLASS = """
import os
import torch.distributed.elastic.rendezvous.registry
from torch.distributed.elastic.agent.server.api import ElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters

from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec

class Agent(LocalElasticAgent):
    stops = 0

    def _stop_workers(self, worker_group):
        self.stops += 1
        super()._stop_workers(worker_group)

parameters = RendezvousParameters("c10d", "localhost:0", "the-run", 1, 1)
handler = torch.distributed.elastic.rendezvous.registry.get_rendezvous_handler(parameters)
spec = WorkerSpec("trainer", 2, handler, entrypoint="/bin/sh", args=("-c", "exit $((4 + RANK))"), max_restarts=2)
agent = Agent(spec, DefaultLogsSpecs(os.environ["DIR"] + "/logs"))
assert isinstance(agent, ElasticAgent)
result = agent.run()
handler.shutdown()
print(result.state.value, sorted(set(failure.exitcode for failure in result.failures.values()) - {4, 5}), agent.stops)
"""


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_the_agent_in_place_of_torchs(launch: Launcher, backend: str) -> None:
    endpoint = "localhost:0" if backend == "c10d" else f"127.0.0.1:{free_port()}"
    os.mkfifo(launch.folder / "meeting")
    job = launch.start(sys.executable, launch.write("program.py", TORCH_OBJECTS), backend, endpoint)
    assert job.end() == 0, job.story
    lines = job.output.decode().splitlines()
    assert lines[-1] == "result SUCCEEDED {0: 0, 1: 10}"
    # Rank 0 is teed and has a prefix.
    # A rank that was stopped because the other one failed may not have come to say anything in the first attempt.
    assert [line for line in lines if line.startswith("[")][-1:] == ["[trainer0]:attempt 1"]
    assert [line for line in lines if line.startswith("attempt")][-1:] == ["attempt 1"]


def test_the_launcher_and_torchs_exception(launch: Launcher) -> None:
    job = launch.start(sys.executable, launch.write("program.py", LAUNCHER))
    assert job.end() == 0, job.story
    assert job.output.decode().splitlines() == ["{0: 49, 1: 49}", "caught train 1 True"]


def test_a_subclass_of_the_agent(launch: Launcher) -> None:
    job = launch.start(sys.executable, launch.write("program.py", SUBCLASS))
    assert job.end() == 0, job.story
    assert job.output.decode().splitlines() == ["FAILED [] 3"]
