"""Leftover processes of a run of ``ferrorun``: helpers that left their worker's session, and the guard process that ends them.

All processes of a run inherit an environment variable that marks the run. Runs can be nested: ``ferrorun`` in a worker of another run
appends its own token to the value.

A program that embeds the agent (:func:`ferroelastic.install`) has other child processes than workers, and they would inherit the mark. So
its guard knows only the sessions of the workers, and helpers that left them are never ended.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ferroelastic._engine import get_engine, report
from ferroelastic._install import is_installed
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ferroelastic import _rust

__all__ = ["Run", "begin", "current"]

logger = get_logger(__name__)

MARK = "FERROELASTIC_RUN"
_CGROUP_ENV = "FERROELASTIC_CGROUP"
_DISMISS_TIMEOUT_S = 1.0
_REMEDY = "--keep-detached keeps them running"

# Loads only the native module: neither the package nor a site folder is imported.
_GUARD_PROGRAM = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
path, name, token, keep_detached, cgroup = sys.argv[1:]
spec = spec_from_file_location("_rust", path, loader=ExtensionFileLoader("_rust", path))
native = module_from_spec(spec)
spec.loader.exec_module(native)
native.stand_guard(name, token, keep_detached=keep_detached == "1", cgroup=cgroup or None)
"""


class Run:
    """One run of ``ferrorun`` on this host.

    Args:
        keep_detached: never end helpers that left their worker's session.
        end_detached: end them after a success as well.
        is_embedded: whether this process is a program with other child processes than workers.

    Attributes:
        agents: number of agents in this run, for an embedded one.
        pid: id of the process that has made this object.
        zygote_sessions: process ids of the zygotes. Each is also the id of the zygote's session.
    """

    def __init__(self, *, keep_detached: bool, end_detached: bool, is_embedded: bool = False) -> None:
        self.token = os.urandom(16).hex()
        self.pid = os.getpid()
        self.keep_detached = keep_detached
        self.agents = 0
        self.is_embedded = is_embedded
        self.end_detached = end_detached
        self.zygote_sessions: list[int] = []
        self._has_guard = False
        self._cgroup: str | None = None
        self._outer_mark: str | None = None

    def start_guard(self) -> None:
        """Start the guard process, which ends the leftover helpers if this process is killed. The kernel ends the workers."""
        from ferroelastic import _rust

        environment = dict(os.environ)
        self._outer_mark = outer = environment.pop(MARK, None)
        if self.is_embedded:
            get_engine()  # its thread lets the guard be executed: a forked one would share the memory of the program
        else:
            os.environ[MARK] = f"{outer}:{self.token}" if outer else self.token
            self._cgroup = _make_cgroup(self.token)
        argv = [sys.executable, "-I", "-S", "-c", _GUARD_PROGRAM, _rust.__file__ or "", MARK, self.token]
        argv += [str(int(self.keep_detached)), self._cgroup or ""]
        try:
            guard = _rust.Guard(
                MARK, self.token, argv, environment, keep_detached=self.keep_detached, cgroup=self._cgroup
            )
            get_engine().adopt_guard(guard)
        except OSError as error:
            logger.warning(
                "Failed to start the guard process (%s): if this process is killed, helper processes of its workers may survive",
                error,
            )
        else:
            self._has_guard = True
        if not self.is_embedded:
            get_engine().own_orphans()
        if self._cgroup is not None and not get_engine().use_cgroup(self._cgroup):
            self._remove_cgroup(self._cgroup)

    def finish(self) -> None:
        """End the guard before a regular exit of this process. Never raises, and waits at most a second."""
        global _current  # noqa: PLW0603 - see begin
        _current = None
        if not self.is_embedded:
            _set_mark(self._outer_mark)
        report()
        if self._has_guard:
            self._has_guard = False
            self._dismiss_guard()
        if self._cgroup is not None:
            self._remove_cgroup(self._cgroup)

    def _remove_cgroup(self, folder: str) -> None:
        from ferroelastic import _rust

        self._cgroup = None
        try:
            get_engine().use_cgroup(None)
            _rust.remove_cgroup(folder)
        except (OSError, RuntimeError) as error:
            logger.info("Failed to remove the cgroup of this run: %s", error)

    def _dismiss_guard(self) -> None:
        try:
            if not get_engine().dismiss_guard(_DISMISS_TIMEOUT_S):
                logger.warning("The guard process did not end within %g s and is left running", _DISMISS_TIMEOUT_S)
        except (OSError, RuntimeError) as error:
            logger.warning("Failed to end the guard process: %s", error)

    def find_detached(self, sessions: Sequence[int], *, are_native: bool) -> list[tuple[int, str]]:
        """Return process id and command line of helpers that left their worker's process group.

        Args:
            sessions: process ids of the workers. All of them have ended.
            are_native: whether the engine started the workers, in the cgroup if there is one. Otherwise ``multiprocessing`` did.
        """
        from ferroelastic import _rust

        cgroup = self._cgroup if are_native else None
        excluded = (os.getsid(0), *self.zygote_sessions)
        return _rust.find_detached(MARK, self.token, sessions=sessions, cgroup=cgroup, not_in_sessions=excluded)

    def hold_detached(self, sessions: Sequence[int], *, are_native: bool) -> _rust.Group | None:
        """Open pidfds of the helpers to end and return them as a group; ``None`` if there are none.

        Args:
            sessions: as for :meth:`find_detached`.
            are_native: as for :meth:`find_detached`.
        """
        found = self.find_detached(sessions, are_native=are_native)
        while found:
            pids = [pid for pid, _ in found]
            try:
                group = get_engine().observe(pids)
            except OSError:  # a helper has ended in the meantime
                found = self.find_detached(sessions, are_native=are_native)
                continue
            # Checked again after the pidfds were opened: in between, the kernel may have reused a pid.
            confirmed = {pid for pid, _ in self.find_detached(sessions, are_native=are_native)}
            if all(pid in confirmed for pid in pids):
                logger.warning(
                    "Ending helper processes that left their worker's process group: %s; %s", describe(found), _REMEDY
                )
                return group
            found = [(pid, command) for pid, command in found if pid in confirmed]
        return None


def _set_mark(value: str | None) -> None:
    if value is None:
        os.environ.pop(MARK, None)
    else:
        os.environ[MARK] = value


def _make_cgroup(token: str) -> str | None:
    """Create a cgroup for the workers if possible, because a process cannot leave it unnoticed."""
    if os.environ.get(_CGROUP_ENV, "1") == "0":
        return None
    from ferroelastic import _rust

    try:
        return _rust.create_cgroup(f"ferrorun-{token}")
    except OSError as error:
        logger.info("No cgroup for the workers: %s", error)
        return None


def describe(found: Sequence[tuple[int, str]]) -> str:
    """Return processes as text: ``123 (python upload.py), 124 (sleep 9)``."""
    return ", ".join(f"{pid} ({command[:_MAX_COMMAND_LENGTH]})" for pid, command in found)


_MAX_COMMAND_LENGTH = 80
_current: Run | None = None
_lock = threading.Lock()


def begin(*, keep_detached: bool, end_detached: bool) -> Run:
    """Start a run with its guard process. The arguments are those of :class:`Run`."""
    global _current  # noqa: PLW0603 - a process runs one job
    _current = Run(keep_detached=keep_detached, end_detached=end_detached)
    _current.start_guard()
    return _current


@contextmanager
def guarding() -> Iterator[None]:
    """Guard the workers of an agent during a ``with`` block, if :func:`ferroelastic.install` is in effect and no guard runs.

    Agents of several threads share a guard process.
    """
    global _current  # noqa: PLW0603 - see begin
    if not is_installed() or (_current is not None and not _current.is_embedded):
        yield
        return
    with _lock:
        if _current is None or _current.pid != os.getpid():  # a forked child of an agent
            _current = Run(keep_detached=True, end_detached=False, is_embedded=True)
            _current.start_guard()
        run = _current
        run.agents += 1
    try:
        yield
    finally:
        with _lock:
            run.agents -= 1
            if run.agents == 0:
                run.finish()


def current() -> Run | None:
    """Return the run of this process, if it is ``ferrorun``."""
    return _current
