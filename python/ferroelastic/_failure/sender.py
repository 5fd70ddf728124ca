"""The sender of the signal that ended a worker, if the kernel has recorded it.

Linux does not report the sender of a signal to the parent of the process. Sources are: the agent's own record, the counters and the log of
the OOM killer, the core file, and the trace of the kernel if an administrator has enabled the event ``signal_generate``.
"""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING

from ferroelastic._failure.model import Sender

if TYPE_CHECKING:
    from ferroelastic._failure.oom import OomKill

__all__ = ["from_core", "from_oom", "from_trace", "name_of"]

_INIT_PID_NAMESPACE = "pid:[4026531836]"  # a constant of the kernel
_TRACE = "sys/kernel/tracing"
_MAX_TRACE_BYTES = 2 << 20
_EVENT = re.compile(rb"^ *(.{1,16})-(\d+) .*: signal_generate: sig=(\d+) .* pid=(\d+) ", re.MULTILINE)


def from_oom(
    kill: OomKill | None, victims: set[int], pid: int, worker_peak_bytes: int | None, root: str = "/"
) -> Sender | None:
    """Return the OOM killer as the sender of SIGKILL; ``None`` if it has not killed this worker.

    Args:
        kill: kills that the counters show.
        victims: killed processes that the kernel log names.
        pid: process id of the worker.
        worker_peak_bytes: peak resident memory of the worker.
        root: root of the file system, for tests.
    """
    if kill is None:
        return None
    # Only the outermost namespace has the pids of the kernel log.
    if victims and pid not in victims and _pid_namespace(root) == _INIT_PID_NAMESPACE:
        return None
    if not kill.is_of_workers and pid not in victims:
        return None
    peak = kill.peak_bytes if kill.scope == "cgroup" else worker_peak_bytes
    return Sender("oom_killer", scope=kill.scope, limit_bytes=kill.limit_bytes, peak_bytes=peak)


def _pid_namespace(root: str) -> str:
    try:
        return os.readlink(os.path.join(root, "proc/self/ns/pid"))
    except OSError:
        return ""


def from_core(origin: tuple[int, int] | None, worker_pid: int) -> Sender | None:
    """Return the sender that a core file records; ``None`` if the worker raised the signal itself.

    Args:
        origin: pid and uid of the sender.
        worker_pid: process id of the worker.
    """
    if origin is None or origin[0] == worker_pid or origin[0] <= 0:
        return None
    pid, uid = origin
    return Sender("process", pid=pid, name=_name_of(pid) or f"a process of uid {uid}")


def _name_of(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip() or None
    except OSError:  # it has ended
        return None


def from_trace(pid: int, number: int, root: str = "/") -> Sender | None:
    """Return the sender that the kernel's trace names; ``None`` if the event is not enabled or the trace cannot be read.

    Args:
        pid: process id of the worker.
        number: number of the signal.
        root: root of the file system, for tests.
    """
    folder = os.path.join(root, _TRACE)
    try:
        with open(f"{folder}/events/signal/signal_generate/enable") as enabled:
            if enabled.read(1) != "1":
                return None
        with open(f"{folder}/trace", "rb") as trace:
            text = trace.read(_MAX_TRACE_BYTES)
    except OSError:
        return None
    found = None
    for name, sender, sent, target in _EVENT.findall(text):
        if int(target) == pid and int(sent) == number:
            found = Sender("process", pid=int(sender), name=name.decode(errors="replace").strip())
    return found


def name_of(number: int) -> str:
    """Return the name of a signal: ``SIGKILL``, or ``signal 35`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
