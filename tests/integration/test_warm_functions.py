"""Warm workers that run a function, with the start methods ``forkserver`` and ``spawn``."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from tests.support.rendezvous_handlers import GrowingRendezvous
from tests.support.waiting import LONG_S, eventually

from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec, WorkerState
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.skipif(os.environ.get("FERROELASTIC_PIDFD") == "0", reason="warm workers need pidfds")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODULE = "json.tool"

FORK_SERVER = f"""
import sys

from ferroelastic.launcher.api import LaunchConfig, elastic_launch

def imported():
    return {MODULE!r} in sys.modules

if __name__ == "__main__":
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="warm", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        start_method="forkserver", warm_workers=2, warm_imports=tuple(sys.argv[1:]),
    )
    print(elastic_launch(config, imported)())
"""


def imported() -> bool:
    return MODULE in sys.modules


def attempt_and_imported(folder: str) -> tuple[int, bool]:
    """Fail in the first attempt, once the test lets go."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 0:
        assert eventually(Path(folder, "go").exists, LONG_S)
        sys.exit(5)
    return attempt, imported()


def end(how: str) -> None:
    sys.stdout.write("on standard output\n")
    if how == "exception":
        raise ValueError("expected in this test")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    sys.exit(7)


def observables() -> dict[str, Any]:
    process = multiprocessing.current_process()
    parent = multiprocessing.parent_process()
    assert parent is not None
    return {
        "argv": sys.argv,
        "path": sys.path,
        "flags": sys.flags[:],
        "main": (sys.modules["__main__"].__name__, getattr(sys.modules["__main__"], "__file__", None)),
        "process": (type(process), process.name.partition("-")[0], process.daemon, bytes(process.authkey)),
        "parent": (parent.pid, os.getppid(), parent.is_alive()),
        "session": (os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()),
        "method": multiprocessing.get_start_method(),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "limit": resource.getrlimit(resource.RLIMIT_NOFILE),
        "streams": [
            (stream.fileno(), stream.encoding, stream.errors) for stream in (sys.stdin, sys.stdout, sys.stderr)
        ],
        "null": os.readlink(f"/proc/self/fd/{sys.stdin.fileno()}"),
        "tracker": os.readlink(f"/proc/self/fd/{resource_tracker.getfd()}"),
        "folder": os.getcwd(),
        "variables": {
            name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "MASTER"))
        },
    }


def run_child() -> Any:
    """A worker's own process of ``multiprocessing``, with a shared lock, which the resource tracker tracks."""
    context = multiprocessing.get_context("spawn")
    with context.Lock(), context.Pool(1) as pool:
        return pool.apply(abs, (-3,))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LocalElasticAgent]]:
    agents: list[LocalElasticAgent] = []

    def build(entrypoint: Any, *args: Any, method: str, redirects: Std = Std.NONE, **spec: Any) -> LocalElasticAgent:
        chosen = {"max_restarts": 0, "role": "trainer", "local_world_size": 2, "warm_imports": (MODULE,), **spec}
        worker_spec = WorkerSpec(rdzv_handler=GrowingRendezvous(), entrypoint=entrypoint, args=args, **chosen)
        logs = DefaultLogsSpecs(str(tmp_path / "logs"), redirects=redirects)
        agents.append(LocalElasticAgent(worker_spec, logs, start_method=method, exit_barrier_timeout=5))
        return agents[-1]

    yield build
    for one in agents:
        one._shutdown(signal.SIGKILL, 0)
        one._pcontext = one._warm = None


def warm_ranks(agent: LocalElasticAgent) -> list[int]:
    assert agent._pcontext is not None
    assert agent._pcontext.native_group is not None
    return agent._pcontext.native_group.warm


def test_the_first_start_has_the_imports_with_preload(make: Callable[..., LocalElasticAgent]) -> None:
    """The third parked process ends with the agent."""
    agent = make(imported, method="spawn", preload=True, warm_workers=3)
    assert agent.run().return_values == {0: True, 1: True}
    assert warm_ranks(agent) == [0, 1]


def test_a_fork_server_has_the_imports_that_do_not_fail(tmp_path: Path) -> None:
    """In a process of its own, because a process has one fork server."""
    script = tmp_path / "job.py"
    script.write_text(FORK_SERVER)
    done = subprocess.run(
        [sys.executable, script, MODULE, "no_such_module"], capture_output=True, text=True, timeout=LONG_S, check=True
    )
    assert done.stdout == "{0: True, 1: True}\n"
    lines = [line for line in done.stderr.splitlines() if "without" in line]
    error = "ModuleNotFoundError: No module named 'no_such_module'"
    assert lines == [f"ferroelastic: the workers start without no_such_module: {error}"]


def test_a_fork_server_that_runs_already_gives_one_line(tmp_path: Path) -> None:
    """CPython 3.14 and later start it for each process of ``multiprocessing``, unless the program chooses another start method."""
    script = tmp_path / "job.py"
    main = "if __name__ == '__main__':\n    from multiprocessing import forkserver\n    forkserver.ensure_running()\n"
    script.write_text(f"{main}{FORK_SERVER}    print(elastic_launch(config, imported)())\n")
    done = subprocess.run(
        [sys.executable, str(script), MODULE], capture_output=True, text=True, timeout=LONG_S, check=True
    )
    assert done.stdout == "{0: False, 1: False}\n" * 2
    reason = "the fork server of this process was started before; start the agent before other processes"
    assert [line.partition("imports: ")[2] for line in done.stderr.splitlines() if "warm imports" in line] == [
        reason,
        reason,
    ]


def test_a_second_agent_with_the_same_imports_uses_the_fork_server(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(f"{FORK_SERVER}    print(elastic_launch(config, imported)())\n")
    done = subprocess.run(
        [sys.executable, str(script), MODULE], capture_output=True, text=True, timeout=LONG_S, check=True
    )
    assert done.stdout == "{0: True, 1: True}\n" * 2
    assert "warm imports" not in done.stderr


def test_a_fork_server_whose_imports_start_a_thread_lives_where_warnings_are_errors(tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    script = tmp_path / "job.py"
    script.write_text(FORK_SERVER)
    command = [sys.executable, "-W", "error", str(script), MODULE, "threaded"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, check=False)
    assert done.stdout == "{0: True, 1: True}\n", done.stderr


@pytest.mark.parametrize("parked", [1, 2])
def test_a_restart_has_the_imports(make: Callable[..., LocalElasticAgent], tmp_path: Path, parked: int) -> None:
    """With fewer parked processes than workers, the others start cold."""
    agent = make(attempt_and_imported, str(tmp_path), method="spawn", warm_workers=parked, max_restarts=1)

    def let_fail_when_parked() -> None:
        warm = cast("Any", agent._warm)
        assert eventually(lambda: warm._pool is not None and warm._pool.state().parked == parked, LONG_S)
        (tmp_path / "go").touch()

    thread = threading.Thread(target=let_fail_when_parked)
    thread.start()
    result = agent.run()
    thread.join()
    assert result.return_values == {0: (1, True), 1: (1, parked == 2)}
    assert warm_ranks(agent) == list(range(parked))


def test_a_failing_import_gives_one_line_and_a_cold_start(
    make: Callable[..., LocalElasticAgent], caplog: pytest.LogCaptureFixture
) -> None:
    agent = make(imported, method="spawn", preload=True, warm_workers=2, warm_imports=("no_such_module",))
    assert agent.run().return_values == {0: False, 1: False}
    error = "ModuleNotFoundError: No module named 'no_such_module'"
    assert [line for line in caplog.messages if "zygote" in line or "warm" in line] == [
        f"The zygote prepares no further workers: importing no_such_module failed: {error}"
    ]


def test_the_start_method_fork_gives_one_line(
    make: Callable[..., LocalElasticAgent], caplog: pytest.LogCaptureFixture
) -> None:
    assert make(imported, method="fork", warm_workers=2).run().state == WorkerState.SUCCEEDED
    lines = [line for line in caplog.messages if "warm imports" in line]
    assert lines == [
        "The workers start without warm imports: function workers of the start method fork cannot be warm; use forkserver or spawn"
    ]


@pytest.mark.parametrize(
    ("how", "code"), [("exception", 1), ("interrupt", -signal.SIGINT), ("signal", -signal.SIGSEGV), ("exit", 7)]
)
def test_a_warm_process_fails_as_a_cold_one(make: Callable[..., LocalElasticAgent], how: str, code: int) -> None:
    agent = make(end, how, method="spawn", preload=True, local_world_size=1, redirects=Std.ALL)
    result = agent.run()
    assert warm_ranks(agent) == [0]
    assert result.state == WorkerState.FAILED
    failure = result.failures[0]
    assert failure.exitcode == code
    assert agent._pcontext is not None
    assert Path(agent._pcontext.stdouts[0]).read_text() == "on standard output\n"
    if how == "exception":
        assert "expected in this test" in str(failure.message)
        assert "ValueError: expected in this test" in Path(agent._pcontext.stderrs[0]).read_text()


def test_a_warm_process_observes_the_same_as_a_cold_one(make: Callable[..., LocalElasticAgent]) -> None:
    seen = []
    for options in ({}, {"preload": True}):
        agent = make(observables, method="spawn", local_world_size=1, **options)
        seen.append(agent.run().return_values[0])
        assert warm_ranks(agent) == ([0] if options else [])
    cold, warm = seen
    # A library that calls setenv(3), as readline does with these, changes the environment of a cold process but not `os.environ`.
    different = cold.pop("variables").items() ^ warm.pop("variables").items()
    # Each start of the workers has a stop file of its own.
    assert {name for name, _ in different} <= {"COLUMNS", "LINES", "FERROELASTIC_STOP_FILE"}
    assert warm == cold


def test_a_warm_process_starts_processes_of_its_own(make: Callable[..., LocalElasticAgent]) -> None:
    agent = make(run_child, method="spawn", preload=True)
    assert agent.run().return_values == {0: 3, 1: 3}
    assert warm_ranks(agent) == [0, 1]


def test_a_low_limit_of_descriptors_gives_a_cold_start(
    make: Callable[..., LocalElasticAgent], caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1023, hard))
    try:
        assert make(imported, method="spawn", preload=True).run().return_values == {0: False, 1: False}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [line for line in caplog.messages if "warm imports" in line] == [
        "The workers start without warm imports: the limit of open descriptors is 1023; set it to 1024 or more"
    ]
