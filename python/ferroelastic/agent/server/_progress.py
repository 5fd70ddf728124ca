"""Progress of the workers of one node: a file that changes, or heartbeats."""

from __future__ import annotations

import glob
import os
import time
from itertools import islice
from typing import TYPE_CHECKING, Any

from ferroelastic._compat import newer
from ferroelastic.agent.server._policy import TimedOut, call_with_timeout
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferroelastic import _rust

__all__ = ["Heartbeats", "ProgressFiles"]

logger = get_logger(__name__)

_MAX_FILES = 10_000
_TIMEOUT_S = 5.0
_LATER_S = 1.0


class Heartbeats:
    """The heartbeats and timers of the workers: one that comes at least 1 s after the first one of its process is progress.

    Args:
        agent: weak reference to the ``LocalElasticAgent`` of the workers.
    """

    def __init__(self, agent: Callable[[], Any]) -> None:
        self._agent = agent
        self._first: dict[int, float] = {}

    def have_come(self) -> bool:
        """Return whether a worker has sent a heartbeat or a timer request at least 1 s after its first one."""
        agent = self._agent()
        age_s = None if agent is None else newer(agent._worker_watchdog, "last_request_age_s", None)  # noqa: SLF001
        group: _rust.Group | None = None if agent is None else agent._native_group()  # noqa: SLF001 - of this agent
        if group is None or age_s is None:
            return False
        now = time.monotonic()
        ages_s = {pid: age_s(pid) for pid in group.pids}
        # The watchdog of a program may return any value.
        times = {pid: now - age_s for pid, age_s in ages_s.items() if isinstance(age_s, float)}
        self._first = {pid: self._first.get(pid, at) for pid, at in times.items()}
        return any(at - self._first[pid] >= _LATER_S for pid, at in times.items())


class ProgressFiles:
    """The files that match a pattern.

    Args:
        pattern: pattern of :func:`glob.glob`, with ``**`` for folders at any depth.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._before: dict[str, tuple[int, int]] | None = None

    def begin_round(self) -> None:
        """Note the current state of the files."""
        self._before = self._state()

    def have_changed(self) -> bool:
        """Return whether a file was created or modified since the round began. ``False`` if the file system does not answer."""
        now = self._state()
        return (
            now is not None
            and self._before is not None
            and any(self._before.get(path) != at for path, at in now.items())
        )

    def _state(self) -> dict[str, tuple[int, int]] | None:
        try:
            return call_with_timeout(self._read, "ferro-progress", _TIMEOUT_S)
        except TimedOut:
            logger.warning("the files %r (--progress-file) could not be read within %g s", self._pattern, _TIMEOUT_S)
        except OSError as error:
            logger.warning("the files %r (--progress-file) cannot be read: %s", self._pattern, error)
        return None

    def _read(self) -> dict[str, tuple[int, int]]:
        state = {}
        for path in islice(glob.iglob(self._pattern, recursive=True), _MAX_FILES):
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            state[path] = (status.st_mtime_ns, status.st_size)
        return state
