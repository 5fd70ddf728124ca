"""The same package in a process that never loads torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conformance.modules import MIRRORED
from tests.conformance.samples import SAMPLES

ROOT = Path(__file__).parents[2]

PRELUDE = """
import importlib.abc, json, pickle, signal, sys, types
sys.path.insert(0, sys.argv[1])
folder = sys.argv[2]

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, NoTorch())
"""


def run(code: str, folder: Path, *options: str) -> Any:
    """Run code in a process in which importing torch is an error; return what it prints, which is JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    ended = subprocess.run(
        [sys.executable, *options, "-c", PRELUDE + code, str(ROOT), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_every_module_is_imported(tmp_path: Path) -> None:
    code = f"""
import importlib
for path in {MIRRORED!r}:
    importlib.import_module(f"ferroelastic.{{path}}".rstrip("."))
print(json.dumps("torch" in sys.modules))
"""
    assert run(code, tmp_path) is False


def test_objects_are_plain(tmp_path: Path) -> None:
    """Made, copied and raised without torch, of the plain class."""
    code = """
from tests.conformance.implementations import OURS, Implementation
from tests.conformance.samples import SAMPLES
import copy
impl, wrong = Implementation(OURS), []
for name, build in SAMPLES.items():
    path, _, cls = name.partition(":")
    plain, made = getattr(impl(path), cls), build(impl)
    if type(made) is not plain:
        wrong.append(name)
    if cls not in {"SubprocessContext", "MultiprocessContext", "SubprocessHandler"}:
        if type(pickle.loads(pickle.dumps(made))) is not plain or type(copy.deepcopy(made)) is not plain:
            wrong.append(f"{name}: copies")
print(json.dumps([wrong, "torch" in sys.modules, len(SAMPLES)]))
"""
    assert run(code, tmp_path) == [[], False, len(SAMPLES)]


def test_an_agent_runs(tmp_path: Path) -> None:
    """Programs and functions, success and failure, with the store of a plug-in."""
    code = """
from tests.conformance import stubs, workers
from tests.conformance.implementations import OURS, Implementation
from tests.support.memory_store import MemoryStore
impl = Implementation(OURS)
module = impl("agent.server.local_elastic_agent")

def run(entrypoint, *args, start_method="spawn", **fields):
    handler = stubs.rendezvous(impl, MemoryStore())
    spec = stubs.spec(impl, handler, entrypoint=entrypoint, args=args, local_world_size=2, **fields)
    specs = impl.mp.DefaultLogsSpecs(folder, impl.mp.Std.ALL, impl.mp.Std.OUT)
    result = module.LocalElasticAgent(spec, specs, start_method).run()
    exits = {rank: failure.exitcode for rank, failure in result.failures.items()}
    return [result.state.value, result.return_values, exits]

if __name__ == "__main__":
    found = [
        run("/bin/sh", "-c", "exit 0"),
        run("/bin/sh", "-c", "exit $((RANK * 3))", max_restarts=0),
        run(workers.give_rank, 10),
        run(workers.fail_unless_restarted, 1, 7, start_method="fork"),
    ]
    print(json.dumps([found, "torch" in sys.modules]), file=sys.__stdout__)
"""
    # As a file: a spawned worker imports the program it comes from.
    script = tmp_path / "program.py"
    script.write_text(PRELUDE + code)
    ended = subprocess.run(
        [sys.executable, script, str(ROOT), str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [
        [
            ["SUCCEEDED", {"0": None, "1": None}, {}],
            ["FAILED", {}, {"1": 3}],
            ["SUCCEEDED", {"0": 0, "1": 10}, {}],
            ["SUCCEEDED", {"0": "attempt 1 of rank 0", "1": "attempt 1 of rank 1"}, {}],
        ],
        False,
    ]


def test_errors_are_recorded(tmp_path: Path) -> None:
    code = """
import os
from ferroelastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/error.json"
try:
    record(divmod)(1, 0)
except ZeroDivisionError:
    failure = ProcessFailure(0, 1, 1, f"{folder}/error.json")
error = ChildFailedError("x", {0: failure})
print(json.dumps([failure.message["message"], type(error).__mro__[1].__name__]))
"""
    text, base = run(code, tmp_path)
    assert text.startswith("ZeroDivisionError")
    assert base == "TorchCompatible"


def test_torch_that_is_loaded_later(tmp_path: Path) -> None:
    """What is made after that is of torch's class too."""
    code = """
from ferroelastic.agent.server import RunResult, WorkerState
before = RunResult(WorkerState.FAILED)
sys.meta_path.pop(0)
import torch.distributed.elastic.agent.server as torchs
after = RunResult(WorkerState.FAILED)
print(json.dumps([isinstance(one, torchs.RunResult) for one in (before, after, pickle.loads(pickle.dumps(before)))]))
"""
    assert run(code, tmp_path) == [False, True, True]


@pytest.mark.parametrize(
    "module", ["ferroelastic", "ferroelastic.run", "ferroelastic.agent.server", "ferroelastic.timer"]
)
def test_an_import_loads_no_heavy_module(module: str, tmp_path: Path) -> None:
    """Launching starts with it: nothing that is heavy and may not be needed."""
    code = f"""
import importlib
importlib.import_module({module!r})
print(json.dumps(sorted({{"torch", "numpy", "asyncio", "psutil", "multiprocessing.pool"}} & sys.modules.keys())))
"""
    assert run(code, tmp_path) == []
