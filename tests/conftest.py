"""Every test leaves the process as it found it: no descriptor, child, thread or signal handler more."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A function worker that is spawned imports the test's module by its name, `tests.integration.test_...`.
sys.path.insert(0, str(Path(__file__).parent.parent))

# torch's stores look up the name of each address that they meet, which takes as long as the resolver wants: 5 s for a query that is
# lost. Over TCP most resolvers refuse at once. Jobs that tests start inherit it.
os.environ.setdefault("RES_OPTIONS", "use-vc timeout:1 attempts:1")

# The launcher warns of an active environment that is not its own, which is that of whoever runs the tests.
for _variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
    os.environ.pop(_variable, None)

_SETTLE_S = 5.0
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def eventually(condition: Callable[[], bool], timeout_s: float = _SETTLE_S) -> bool:
    """Whether ``condition`` becomes true in time. For facts that nothing reports."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that the listing itself used
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _children() -> dict[int, str]:
    """Processes whose parent is this one, zombies included."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        command, _, fields = stat.rpartition(")")
        if int(fields.split()[1]) == os.getpid():
            found[int(name)] = f"{command}) {fields.split()[0]}"
    return found


def _threads() -> dict[int, str]:
    """Python's threads, and the native ones of this package."""
    found = {thread.native_id or 0: thread.name for thread in threading.enumerate()}
    for task in os.listdir("/proc/self/task"):
        try:
            name = Path(f"/proc/self/task/{task}/comm").read_text(encoding="utf-8").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith("ferro"):
            found[int(task)] = name
    return found


def _snapshot() -> dict[str, dict[int, str]]:
    return {"descriptors": _descriptors(), "children": _children(), "threads": _threads()}


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
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    before = _snapshot()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert signal.set_wakeup_fd(-1) == -1

    def leaked() -> dict[str, dict[int, str]]:
        now = _snapshot()
        # A number that was reused for something else counts as well.
        leaks = {kind: dict(now[kind].items() - before[kind].items()) for kind in before}
        leaks["children"] = {pid: what for pid, what in leaks["children"].items() if pid not in before["children"]}
        return {kind: found for kind, found in leaks.items() if found}

    if leaked():
        gc.collect()  # takes long with torch loaded, so not for every test
    assert eventually(lambda: not leaked()), f"left behind: {leaked()}"
