"""The commands of the recipes run one job on two nodes, with the variables that each engine gives to a node."""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from tests.docs.pages import captioned
from tests.support.ports import port_for_one
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from tests.support.harness import Job, Launcher

# A worker that ends when the test says so.
_WORKER = """
import os, pathlib, time
folder, rank = pathlib.Path(os.environ["DIR"]), os.environ["RANK"]
(folder / f"started.{rank}.{os.getpid()}").touch()
while not (folder / "end").exists():
    time.sleep(0.01)
os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']}\\n".encode())
"""
_ENGINES = ["train.yaml", "jobset.yaml", "trainjob.yaml", "train.sky.yaml", "train.dstack.yml"]


class Nodes:
    """Two nodes of an engine."""

    def __init__(self, launch: Launcher, engine: str) -> None:
        self.launch = launch
        self.engine = engine
        self.port = port_for_one()
        self.script = launch.write("train.py", _WORKER)
        programs = launch.folder / "bin"
        programs.mkdir()
        ferrorun = programs / "ferrorun"
        ferrorun.write_text(f'#!/bin/sh\nexec {sys.executable} -m ferroelastic.run "$@"\n')
        ferrorun.chmod(0o755)
        self.path = f"{programs}:{os.environ['PATH']}"

    def start(self, rank: int) -> Job:
        command, variables = self._of_node(rank)
        return self.launch.start(*command, env={"PATH": self.path, **variables})

    def starts(self) -> set[str]:
        return {path.name for path in self.launch.folder.glob("started.*")}

    def let_end(self) -> None:
        (self.launch.folder / "end").touch()

    def _of_node(self, rank: int) -> tuple[list[str], dict[str, str]]:
        """The command of a node, with a local address, and the variables that the engine sets on it."""
        objects = {one.get("kind"): one for one in yaml.safe_load_all(captioned(self.engine).text)}
        number = str(rank)
        if self.engine in {"train.yaml", "jobset.yaml"}:
            job: Any = objects.get("Job") or objects["JobSet"]["spec"]["replicatedJobs"][0]["template"]
            (container,) = job["spec"]["template"]["spec"]["containers"]
            *shell, text = container["command"]
            return [*shell, self._local(text)], {"JOB_COMPLETION_INDEX": number}
        if self.engine == "trainjob.yaml":
            command = [
                self.script if one == "train.py" else one for one in objects["TrainJob"]["spec"]["trainer"]["command"]
            ]
            address = {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": str(self.port)}
            return command, {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": number, **address}
        (task,) = objects.values()
        if self.engine == "train.sky.yaml":
            size = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_TASK_ID": "sky-1_train"}
            return ["bash", "-c", self._local(task["run"])], {
                **size,
                "SKYPILOT_NODE_RANK": number,
                "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
            }
        size = {"DSTACK_NODES_NUM": "2", "DSTACK_GPUS_PER_NODE": "1", "DSTACK_RUN_NAME": "train"}
        return ["sh", "-c", self._local(task["commands"][-1])], {
            **size,
            "DSTACK_NODE_RANK": number,
            "DSTACK_MASTER_NODE_IP": "127.0.0.1",
        }

    def _local(self, text: str) -> str:
        text = re.sub(r"--nnodes=4\b", "--nnodes=2", text)
        text = re.sub(r"--nproc-per-node=8\b", "--nproc-per-node=1", text)
        text = re.sub(r"(--rdzv-endpoint=)train[a-z0-9-]*\.train:29400", rf"\1localhost:{self.port}", text)
        return text.replace(":29400", f":{self.port}").replace("train.py", self.script)


@pytest.mark.parametrize("engine", _ENGINES)
def test_two_nodes_run_one_job(launch: Launcher, engine: str) -> None:
    nodes = Nodes(launch, engine)
    jobs = [nodes.start(rank) for rank in (1, 0)]
    nodes.let_end()
    for job in jobs:
        assert job.end() == 0, job.story
    lines = b"".join(job.output for job in jobs).decode().splitlines()
    assert sorted(lines) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.parametrize("engine", ["train.yaml", "trainjob.yaml"])
def test_the_replacement_of_an_evicted_pod_takes_part(launch: Launcher, engine: str) -> None:
    nodes = Nodes(launch, engine)
    host, evicted = nodes.start(0), nodes.start(1)
    assert eventually(lambda: len(nodes.starts()) == 2, LONG_S), host.story
    evicted.send(signal.SIGTERM)
    assert evicted.end() == 128 + signal.SIGTERM, evicted.story
    replacement = nodes.start(1)
    assert eventually(lambda: len(nodes.starts()) == 4, LONG_S), host.story
    nodes.let_end()
    for job in (host, replacement):
        assert job.end() == 0, job.story


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_agents_that_start_again_in_place_join_the_replacement_of_pod_0(
    launch: Launcher, number: signal.Signals, code: int
) -> None:
    (rules,) = yaml.safe_load(captioned("in-place.yaml").text)["containers"]
    (rule,) = rules["restartPolicyRules"]
    assert code in rule["exitCodes"]["values"]
    nodes = Nodes(launch, "train.yaml")
    host, other = nodes.start(0), nodes.start(1)
    assert eventually(lambda: len(nodes.starts()) == 2, LONG_S), host.story
    host.send(number)
    host.end()
    assert other.end() == code, other.story
    again = [nodes.start(rank) for rank in (1, 0)]
    assert eventually(lambda: len(nodes.starts()) == 4, LONG_S), again[0].story
    nodes.let_end()
    for job in again:
        assert job.end() == 0, job.story
