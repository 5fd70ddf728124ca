"""Workers that run what is callable without being a function, and what becomes of their errors."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.rendezvous_handlers import AloneRendezvous

import ferroelastic
from ferroelastic.agent.server import LocalElasticAgent, RunResult, WorkerSpec
from ferroelastic.launcher.api import LaunchConfig, launch_agent
from ferroelastic.multiprocessing import DefaultLogsSpecs
from ferroelastic.multiprocessing.errors import ChildFailedError

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

METHODS = ["fork", "spawn", "forkserver"]
FOLDER = str(Path(ferroelastic.__file__).parents[1])
TIMEOUT_S = 120


def add(*numbers: int, to: int = 0) -> int:
    return sum(numbers) + to + int(os.environ["RANK"])


class Trainer:
    """Has a state; it is false as a truth value, and its attributes have the names of a function's."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.__wrapped__ = None

    def __len__(self) -> int:
        return 0

    def __call__(self, *numbers: int) -> int:
        return self.value + add(*numbers)

    def train(self, *numbers: int) -> int:
        return self(*numbers)


class FailingTrainer(Trainer):
    def __call__(self, *numbers: int) -> int:
        raise ValueError(f"the trainer got {numbers}")


def run(tmp_path: Path, entrypoint: Any, *args: Any, method: str) -> RunResult:
    spec = WorkerSpec(
        "trainer", 2, AloneRendezvous(), entrypoint=entrypoint, args=args, max_restarts=0, monitor_interval=600
    )
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(str(tmp_path)), start_method=method, exit_barrier_timeout=60)
    return agent.run()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("entrypoint", "first"),
    [
        (partial(add, 1, to=10), 18),
        (partial(partial(add, 1), 2), 10),
        (Trainer(100), 107),
        (Trainer(100).train, 107),
        (partial(Trainer(100), 1), 108),
    ],
    ids=["partial", "partial of a partial", "instance", "method", "partial of an instance"],
)
def test_it_runs_with_its_arguments(tmp_path: Path, entrypoint: Any, first: int, method: str) -> None:
    assert run(tmp_path, entrypoint, 7, method=method).return_values == {0: first, 1: first + 1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entrypoint", [FailingTrainer(1), partial(FailingTrainer(1), 3)], ids=["instance", "partial"])
def test_its_error_is_reported_by_its_name(tmp_path: Path, entrypoint: Any, method: str) -> None:
    config = LaunchConfig(
        1,
        1,
        1,
        run_id="the-job",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method=method,
        logs_specs=DefaultLogsSpecs(str(tmp_path)),
    )
    with pytest.raises(
        ChildFailedError, match=r"\nFailingTrainer FAILED\n(.*\n)*.*ValueError: the trainer got"
    ) as raised:
        launch_agent(config, entrypoint, [7])
    assert "in __call__" in str(raised.value)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("what", ["lambda: None", "partial(lambda: None)", "local()", "Local()"])
def test_a_function_without_a_name_in_a_module_is_refused(tmp_path: Path, what: str, method: str) -> None:
    def local() -> None: ...

    class Local:
        def __call__(self) -> None: ...

    entrypoint = {
        "lambda: None": lambda: None,
        "partial(lambda: None)": partial(lambda: None),
        "local()": local,
        "Local()": Local(),
    }[what]
    with pytest.raises(
        Exception,
        match=r"it is not defined at the top level of a module, and workers with start_method=.* must import it; move it to",
    ):
        run(tmp_path, entrypoint, method=method)


class OwnPickle:
    """Like what cloudpickle makes of a function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __reduce__(self) -> Any:
        return Trainer, (5,)

    def __call__(self) -> None: ...


OwnPickle.__qualname__ = "f.<locals>.OwnPickle"  # no name by which it could be imported


def test_an_object_that_pickles_itself_is_not_refused(tmp_path: Path) -> None:
    assert run(tmp_path, OwnPickle(None), 7, method="spawn").return_values == {0: 12, 1: 13}


SESSION = """
import os
from ferroelastic.launcher.api import LaunchConfig, launch_agent
def train(number):
    return number
config = LaunchConfig(1, 1, 1, run_id="job", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method={method!r})
print(launch_agent(config, train, [7]))
"""


def in_a_session(tmp_path: Path, method: str) -> subprocess.CompletedProcess[str]:
    """Run lines as a notebook does: the main module has no file."""
    return subprocess.run(
        [sys.executable, "-c", SESSION.format(method=method)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": FOLDER, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_function_of_a_notebook_is_refused_with_the_remedy(tmp_path: Path, method: str) -> None:
    done = in_a_session(tmp_path, method)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "'train': it is defined in an interactive session" in last
    assert repr(method) in last
    assert "move it to the top level of a module" in last
    assert "'fork'" in last


def test_a_function_of_a_notebook_works_with_fork(tmp_path: Path) -> None:
    assert in_a_session(tmp_path, "fork").stdout == "{0: 7}\n"


MODULE = """
import linecache, warnings
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

def warn_and_go_on(filename, module_globals, lazycache=linecache.lazycache):
    warnings.warn("module globals have no loader", DeprecationWarning)
    return lazycache(filename, module_globals)

def fail(text):
    linecache.lazycache = warn_and_go_on  # as CPython 3.15 does in a process of multiprocessing
    raise ValueError(text)

if __name__ == "__main__":
    context = start_processes("fn", fail, {{0: ("boom",)}}, {{0: {{}}}}, DefaultLogsSpecs("logs", redirects=Std.ERR), start_method={method!r})
    print(context.wait().failures[0].message["extraInfo"]["py_callstack"])
"""


@pytest.mark.parametrize("method", METHODS)
def test_the_report_of_a_worker_where_warnings_are_errors(tmp_path: Path, method: str) -> None:
    (tmp_path / "main.py").write_text(MODULE.format(method=method))
    done = subprocess.run(
        [sys.executable, "-W", "error", "main.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": FOLDER},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "in fail\n" in done.stdout
    assert done.stdout.rstrip().endswith("ValueError: boom")
    (log,) = tmp_path.glob("logs/*/attempt_0/0/stderr.log")
    assert log.read_text().rstrip().endswith("ValueError: boom")
