"""The deadline of a stop, for training scripts. Imports little, because workers import it."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any, Literal, NamedTuple, TypeAlias

__all__ = ["STOP_FILE_ENV", "SignalTarget", "StopNotice", "StopReason", "stop_deadline"]

SignalTarget: TypeAlias = Literal["group", "leader"]
StopReason: TypeAlias = Literal["signal", "failure", "membership", "success", "shutdown"]

STOP_FILE_ENV = "FERROELASTIC_STOP_FILE"
"""Environment variable of workers: path of the file with the notices."""

_TARGET = "/memfd:ferroelastic-stop"
_MAX_BYTES = 65_536
_NAMED = frozenset(map(int, signal.Signals))


class StopNotice(NamedTuple):
    """A stop of this worker. Not in torch.

    SIGKILL follows at the deadline. A deadline of ``None`` means that no SIGKILL is planned.
    """

    reason: StopReason
    """``"signal"``: the agent got a signal that ends the job. ``"failure"``: a worker failed, on any node. ``"membership"``: a node joined,
    left or was lost. ``"success"``: the workers have succeeded, and this process was left behind. ``"shutdown"``: the program that embeds
    the agent ends the workers."""
    signal: int
    """The signal to the worker, usually ``signal.SIGTERM``."""
    deadline_s: float | None
    """Time of SIGKILL on the wall clock, in seconds since the epoch, as ``time.time()``."""
    deadline_monotonic_ns: int | None
    """Time of SIGKILL in nanoseconds of ``CLOCK_MONOTONIC``, as ``time.monotonic_ns()``."""

    def remaining_s(self) -> float:
        """Return the seconds until the deadline: 0 after it, ``inf`` without one. Steps of the wall clock do not change the result."""
        if self.deadline_monotonic_ns is None:
            return float("inf")
        return max(0, self.deadline_monotonic_ns - time.monotonic_ns()) / 1e9


def stop_deadline() -> StopNotice | None:
    """Return the notice of the current stop of this worker, or ``None`` while no stop is in progress. Not in torch.

    The agent writes the notice before it sends the signal. A signal handler and a training loop can both call this function: it takes
    some microseconds. It needs no rank and no process group. Call it again to see a deadline that has moved.

    Returns:
        The notice. ``None`` also in a process that is no worker of an agent, and if the process cannot read the file of
        ``$FERROELASTIC_STOP_FILE``: in another PID namespace, or as another user.
    """
    path = os.environ.get(STOP_FILE_ENV)
    if not path:
        return None
    try:
        lines = _read(path).split(b"\n")
    except OSError:
        return None
    # The part after the last newline is empty or unfinished.
    for line in reversed(lines[:-1]):
        notice = _parse(line)
        if notice is not None:
            return notice
    return None


def _read(path: str) -> bytes:
    # The agent may have closed the file and reused its number. O_PATH opens nothing, and thus takes no data from a pipe.
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        own = f"/proc/self/fd/{handle}"
        if not os.readlink(own).startswith(_TARGET):
            return b""
        file = os.open(own, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(file, _MAX_BYTES)
        finally:
            os.close(file)
    finally:
        os.close(handle)


def _parse(line: bytes) -> StopNotice | None:
    try:
        fields: dict[str, Any] = json.loads(line)
        number = int(fields["signal"])
        notice = StopNotice(
            fields["reason"],
            signal.Signals(number) if number in _NAMED else number,
            fields["deadline_s"],
            fields["deadline_monotonic_ns"],
        )
    except (ValueError, TypeError, KeyError):
        return None
    return notice
