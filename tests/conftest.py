"""Every test leaves the process as it found it: no descriptor, child, thread or signal handler more."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# A function worker that is spawned imports the test's module by its name, `tests.integration.test_...`.
sys.path.insert(0, str(Path(__file__).parent.parent))

# torch's stores look up the name of each address that they meet, which takes as long as the resolver wants: 5 s for a query that is
# lost. Over TCP most resolvers refuse at once. Jobs that tests start inherit it.
os.environ.setdefault("RES_OPTIONS", "use-vc timeout:1 attempts:1")

# The launcher warns of an active environment that is not its own, which is that of whoever runs the tests.
for _variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
    os.environ.pop(_variable, None)

from tests.support.leaks import HANDLED_SIGNALS, snapshot  # noqa: E402  # found on the path that is set above
from tests.support.waiting import WhenWaiting, eventually  # noqa: E402  # as above


@pytest.fixture(scope="session", autouse=True)
def _process_wide_things() -> None:
    """Start what is made once per process, so that the first test that needs it does not seem to leak it."""
    if importlib.util.find_spec("ferroelastic._rust") is not None:
        from multiprocessing import forkserver, resource_tracker

        from ferroelastic import _wait
        from ferroelastic._engine import get_engine

        get_engine()
        _wait._get_pipe()
        resource_tracker.ensure_running()
        forkserver.ensure_running()


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    before = snapshot()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert signal.set_wakeup_fd(-1) == -1

    def leaked() -> dict[str, dict[int, str]]:
        now = snapshot()
        # A number that was reused for something else counts as well.
        leaks = {kind: dict(now[kind].items() - before[kind].items()) for kind in before}
        leaks["children"] = {pid: what for pid, what in leaks["children"].items() if pid not in before["children"]}
        return {kind: found for kind, found in leaks.items() if found}

    if leaked():
        gc.collect()  # takes long with torch loaded, so not for every test
    assert eventually(lambda: not leaked()), f"left behind: {leaked()}"


@pytest.fixture
def when_waiting() -> Iterator[WhenWaiting]:
    """Schedules calls for the moment at which the main thread waits: ``when_waiting(os.kill, os.getpid(), signal.SIGTERM)``."""
    calls = WhenWaiting()
    yield calls
    calls.close()
