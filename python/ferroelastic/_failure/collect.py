"""Collects the facts about a failed worker: from its exit, its output, its error file and the kernel."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ferroelastic._failure import oom, sender
from ferroelastic._failure.advice import HELPERS_KILLED, SHM_FULL
from ferroelastic._failure.core import find_core, signal_origin
from ferroelastic._failure.exception import find_exception, find_fatal_dump, without_rank
from ferroelastic._failure.kmsg import KernelLog, oom_victims, xid_line
from ferroelastic._failure.model import ExceptionReport, FirstFailure, Kind, Sender, WatchdogReport
from ferroelastic._failure.text import clean, head_and_tail, last_lines, shortened
from ferroelastic.multiprocessing.errors._failures import NO_MESSAGE, NOT_AVAILABLE, exit_of

if TYPE_CHECKING:
    from ferroelastic.multiprocessing.errors._failures import ProcessFailure

__all__ = ["Facts", "Observation", "collect", "exception_of", "iso_time"]

_MAX_STDERR_LINES = 20
_MAX_RECORDED = 16_000
_FULL_BYTES = 1 << 20
NO_COUNTERS = "the counters of the kernel's OOM killer cannot be read"
"""Reason of a failure by SIGKILL if the sender may be the OOM killer, whose counters cannot be read."""


class Observation:
    """The state of the kernel's counters and log at the start of the workers, to compare with that at a failure.

    Args:
        root: root of the file system, for tests.
    """

    def __init__(self, root: str = "/") -> None:
        self._root = root
        self._cgroup: oom.MemoryCgroup | None = None
        self._before = oom.OomCounts()
        self._kernel_log: KernelLog | None = None
        self._lines: list[str] = []

    def begin(self, pid: int | None, earlier: tuple[oom.MemoryCgroup | None, oom.OomCounts] | None = None) -> None:
        """Start an observation, and end the former one.

        Args:
            pid: process id of a worker, whose cgroup is observed.
            earlier: a cgroup and its counters before the start of the worker. They are used if it is the cgroup of the worker.
        """
        found = None if pid is None else oom.find_cgroup(pid, self._root)
        # In v1 the path of a worker that has ended already is the root.
        is_known = found is not None and found.folder != found.top
        self._cgroup = found if is_known else oom.find_cgroup("self", self._root)
        is_same = earlier is not None and earlier[0] == self._cgroup
        self._before = earlier[1] if earlier is not None and is_same else oom.count(self._cgroup, self._root)
        self._lines = []
        if self._kernel_log is None:
            self._kernel_log = KernelLog(os.path.join(self._root, "dev/kmsg"))
        else:
            self._kernel_log.lines()

    def kernel_lines(self) -> list[str]:
        """Return the lines of the kernel log since the start."""
        if self._kernel_log is not None:
            self._lines += self._kernel_log.lines()
        return self._lines

    def has_counters(self) -> bool:
        """Return whether the kernel's counters can be read."""
        return self._before.cgroup is not None or self._before.host is not None

    def kills(self) -> oom.OomKill | None:
        """Return the kills by the OOM killer since the start."""
        return oom.kills_between(self._before, oom.count(self._cgroup, self._root), self._cgroup, self._root)

    def close(self) -> None:
        """Close the kernel log. Idempotent."""
        if self._kernel_log is not None:
            self._kernel_log.close()
            self._kernel_log = None


@dataclass(frozen=True)
class Facts:
    """The facts about a failed worker that the agent knows.

    Attributes:
        rank: its global rank.
        node_rank: rank of the node.
        host: name of the host.
        round: number of the round.
        time_ns: time of the failure in nanoseconds since the epoch.
        stderr: last part of the worker's standard error.
        watchdog: the timer for whose expiry the watchdog ended the worker; ``None`` without one.
        reason: why the agent ended the worker, or why the worker counts as failed.
        kind: kind of the failure; ``None`` derives it from the exit.
    """

    rank: int
    node_rank: int | None
    host: str
    round: int | None
    time_ns: int
    stderr: bytes = b""
    watchdog: WatchdogReport | None = None
    reason: str | None = None
    kind: Kind | None = None


def collect(failure: ProcessFailure, facts: Facts, observation: Observation, root: str = "/") -> FirstFailure:
    """Return the failure of a worker with the facts that explain it.

    Args:
        failure: the failure.
        facts: the facts that the agent knows.
        observation: the observation that began with the start of the workers.
        root: root of the file system, for tests.
    """
    number = -failure.exitcode if failure.exitcode < 0 else None
    output = clean(facts.stderr)
    by_signal: Kind = "exit" if number is None else "signal"
    ended = exit_of(failure)
    has_core = number is not None and ended is not None and ended.core_dumped
    core = find_core(failure.pid, facts.time_ns / 1e9, os.getcwd(), root) if has_core else None
    reason = facts.reason
    if number == signal.SIGBUS and _is_full(os.path.join(root, "dev/shm")):
        reason = reason or SHM_FULL
    if number == signal.SIGKILL and facts.kind is None and facts.watchdog is None and not observation.has_counters():
        reason = reason or NO_COUNTERS
    if number != signal.SIGKILL:
        reason = reason or _killed_helpers(observation)
    return FirstFailure(
        time_ns=facts.time_ns,
        time=iso_time(facts.time_ns),
        rank=facts.rank,
        local_rank=failure.local_rank,
        node_rank=facts.node_rank,
        host=facts.host,
        pid=failure.pid,
        round=facts.round,
        kind=facts.kind or ("watchdog" if facts.watchdog else by_signal),
        # 1 is the code of the job after an early exit.
        exit_code=None if number is not None else 0 if facts.kind == "early_exit" else failure.exitcode,
        signal=None if number is None else sender.name_of(number),
        sender=None
        if number is None
        else _sender(failure, number, facts, observation, core.path if core else None, root),
        watchdog=facts.watchdog,
        exception=exception_of(failure, output),
        fatal_dump=find_fatal_dump(output) if number is not None else None,
        core=core.text if core else None,
        xid=xid_line(observation.kernel_lines(), failure.pid),
        error_file_problem=_problem(failure),
        stderr=last_lines(without_rank(output), _MAX_STDERR_LINES),
        reason=reason,
    )


def _sender(
    failure: ProcessFailure, number: int, facts: Facts, observation: Observation, core: str | None, root: str
) -> Sender:
    if facts.watchdog is not None or facts.kind in ("log_pattern", "early_exit"):
        return Sender("agent")
    found: Sender | None = None
    if number == signal.SIGKILL:
        ended = exit_of(failure)
        peak = None if ended is None else ended.max_rss_bytes
        victims = oom_victims(observation.kernel_lines())
        found = sender.from_oom(observation.kills(), victims, failure.pid, peak, root)
    if found is None and core is not None:
        found = sender.from_core(signal_origin(core), failure.pid)
    return found or sender.from_trace(failure.pid, number, root) or Sender("unknown")


def _killed_helpers(observation: Observation) -> str | None:
    """Return a line about the processes of the workers' cgroup that the OOM killer has ended; ``None`` if it has ended none."""
    kill = observation.kills()
    if kill is None or not kill.is_of_workers:
        return None
    processes = "1 process" if kill.number == 1 else f"{kill.number} processes"
    limit = "" if kill.limit_bytes is None else f" (limit of the {kill.scope}: {kill.limit_bytes >> 20} MiB)"
    return f"{HELPERS_KILLED} {processes} of the workers' cgroup{limit}"


def exception_of(failure: ProcessFailure, output: str) -> ExceptionReport | None:
    """Return the exception that ended a worker: from its error file, else from its output.

    Args:
        failure: the failure, with the content of the error file.
        output: last part of the worker's standard error, clean.
    """
    message = failure.error_file_data.get("message")
    if failure.error_file != NOT_AVAILABLE and message and message != NO_MESSAGE:
        # A program may write a text instead of torch's object.
        content = message if isinstance(message, dict) else {"message": message}
        info = content.get("extraInfo")
        info = info if isinstance(info, dict) else {}
        name, colon, text = clean(str(content.get("message", ""))).partition(": ")
        if not colon and " " in name:
            name, text = "", name
        return ExceptionReport(
            type=shortened(name, 200),
            message=shortened(text, _MAX_RECORDED // 8),
            traceback=head_and_tail(clean(str(info.get("py_callstack") or "")).rstrip("\n"), _MAX_RECORDED),
            source="error_file",
        )
    # After a signal only an interrupt has a traceback: a handler of Python has not run for others.
    if failure.exitcode < 0 and failure.exitcode != -signal.SIGINT:
        return None
    return find_exception(output, failure.exitcode if failure.exitcode >= 0 else None)


def _problem(failure: ProcessFailure) -> str | None:
    problem: str = getattr(failure, "error_file_problem", "")  # torch's class lacks it
    return clean(problem) or None


def _is_full(folder: str) -> bool:
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    return status.f_bavail * status.f_frsize < min(_FULL_BYTES, status.f_blocks * status.f_frsize // 100)


def iso_time(time_ns: int) -> str:
    """Return a time as ISO 8601 text with microseconds and the zone of this host."""
    try:
        local = time.localtime(time_ns // 1_000_000_000)
        zone = time.strftime("%z", local)
        text = time.strftime("%Y-%m-%dT%H:%M:%S", local)
    except (OverflowError, ValueError, OSError):  # an error file may hold any number
        return str(time_ns)
    return f"{text}.{time_ns % 1_000_000_000 // 1000:06d}{zone[:3]}:{zone[3:]}"
