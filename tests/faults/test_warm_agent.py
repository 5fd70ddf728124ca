"""Agents in the test process with warm workers: nothing is left, nothing grows, and changed surroundings are noticed."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.leaks import snapshot
from tests.support.rendezvous_handlers import AloneRendezvous
from tests.support.sizes import Size, measure
from tests.support.waiting import LONG_S, eventually

from ferroelastic.agent.server import LocalElasticAgent, RestartSettings, WorkerSpec, WorkerState
from ferroelastic.multiprocessing import DefaultLogsSpecs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.environ.get("FERROELASTIC_PIDFD") == "0", reason="warm workers need pidfds")

RESTARTS = 200
WARM_UP = 20
"""Restarts after which an agent has all that it will ever need."""
GROWTH_BYTES = 256 << 10
"""Upper bound of the growth of the memory in the 180 restarts from there on."""

FAIL = "import os, sys\nsys.exit(int(os.environ['TORCHELASTIC_RESTART_COUNT'] != os.environ['TORCHELASTIC_MAX_RESTARTS']))\n"


class WarmAgent(LocalElasticAgent):
    """Waits before each restart until all children are parked, and notes which workers are warm."""

    def __init__(self, *args: Any, before_restart: Callable[[int], object] = lambda _: None) -> None:
        super().__init__(*args)
        self.warm: list[list[int]] = []
        self._before_restart = before_restart

    def _rendezvous(self, worker_group: Any) -> None:
        if self.warm:
            assert eventually(self._is_parked, LONG_S)
            self._before_restart(len(self.warm))
        super()._rendezvous(worker_group)

    def _is_parked(self) -> bool:
        pool = None if self._warm is None else self._warm._pool
        if pool is None:
            return False
        pool.resize(1)  # orders a child without a delay
        return pool.state().parked == 1

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        pids = super()._start_workers(worker_group)
        group = self._native_group()
        assert group is not None
        self.warm.append(list(group.warm))
        return pids


def spec_of(folder: Path, script: str, restarts: int) -> WorkerSpec:
    (folder / "light.py").touch()
    (folder / "worker.py").write_text(script)
    return WorkerSpec(
        role="warm",
        local_world_size=1,
        rdzv_handler=AloneRendezvous(),
        entrypoint=sys.executable,
        args=("-u", str(folder / "worker.py")),
        max_restarts=restarts,
        restart_settings=RestartSettings(restart_backoff=0),
        warm_workers=1,
        warm_imports=("light",),
    )


@pytest.fixture
def no_logging() -> Iterator[None]:
    """pytest keeps what is logged, and would grow."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("no_logging")
def test_many_warm_restarts_leave_nothing_in_the_agent(tmp_path: Path) -> None:
    sizes: list[Size] = []
    agent = WarmAgent(
        spec_of(tmp_path, FAIL, RESTARTS),
        DefaultLogsSpecs(),
        before_restart=lambda _: sizes.append(measure(os.getpid())),
    )
    assert agent.run().state == WorkerState.SUCCEEDED
    assert agent.warm == [[]] + [[0]] * RESTARTS
    before, after = sizes[WARM_UP], sizes[-1]
    assert {size[:3] for size in sizes[WARM_UP:]} == {before[:3]}
    assert after.anonymous_bytes - before.anonymous_bytes < GROWTH_BYTES


@pytest.mark.parametrize("code", [0, 3], ids=["success", "failure"])
def test_an_agent_in_a_program_leaves_no_descriptor_thread_or_process(tmp_path: Path, code: int) -> None:
    before = snapshot()
    script = f"import os, sys\nsys.exit({code} if os.environ['TORCHELASTIC_RESTART_COUNT'] == '2' else 4)\n"
    agent = WarmAgent(spec_of(tmp_path, script, 2), DefaultLogsSpecs())
    result = agent.run()
    assert result.state == (WorkerState.FAILED if code else WorkerState.SUCCEEDED)
    assert agent.warm == [[], [0], [0]]
    assert snapshot()["children"].keys() == before["children"].keys()
    assert snapshot()["threads"] == before["threads"]
    # The agent has the pidfds and the stop file of its last workers.
    added = snapshot()["descriptors"].items() - before["descriptors"].items()
    assert {target for _, target in added} <= {"anon_inode:[pidfd]", "/memfd:ferroelastic-stop (deleted)"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda: os.environ.__setitem__("FERRO_TEST_SETTING", "new"),
            "the environment variable FERRO_TEST_SETTING has changed",
        ),
        (lambda: os.environ.pop("FERRO_TEST_SETTING"), "the environment variable FERRO_TEST_SETTING has changed"),
        (lambda: os.chdir("/"), "the working directory of the agent has changed"),
        (lambda: os.umask(0o027), "the umask of the agent has changed"),
    ],
    ids=["variable", "removed variable", "folder", "umask"],
)
def test_a_change_of_the_agent_between_rounds_starts_the_workers_cold(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[], object],
    reason: str,
) -> None:
    monkeypatch.setenv("FERRO_TEST_SETTING", "old")
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o022)
    try:
        agent = WarmAgent(
            spec_of(tmp_path, FAIL, 3),
            DefaultLogsSpecs(),
            before_restart=lambda attempt: change() if attempt == 2 else None,
        )
        assert agent.run().state == WorkerState.SUCCEEDED
    finally:
        os.umask(umask)
    # Cold after the change, then warm with the new state.
    assert agent.warm == [[], [0], [], [0]]
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in messages if "warm" in text] == [f"The workers start without warm imports: {reason}"]
