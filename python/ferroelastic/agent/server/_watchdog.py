"""The watchdog of an agent's workers, and its part of the failure report of a worker that it has ended."""

from __future__ import annotations

import math
import os
import re
import signal
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ferroelastic._compat import newer
from ferroelastic.multiprocessing.errors._failures import NOT_AVAILABLE
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ferroelastic._rust import Expiry
    from ferroelastic.agent.server._workers import Worker
    from ferroelastic.multiprocessing import PContext, ProcessFailure

__all__ = [
    "EVIDENCE_S_ENV",
    "PipeError",
    "WorkerWatchdog",
    "as_worker_watchdog",
    "describe",
    "explain",
    "make_up_timer_file",
    "renew",
    "start_server",
    "workers_with_folders",
]

logger = get_logger(__name__)

EVIDENCE_S_ENV = "FERROELASTIC_EVIDENCE_S"
"""Environment variable: seconds, 60 at most, that may be spent on finding out what workers do before one is ended; 0 spends none."""

_EVIDENCE_S = 2.0
_INTERVAL_S = 0.1  # torch's, and without a meaning for a native server
_MOST_FRAMES = 20
_MOST_BYTES = 1 << 20

_FAULTHANDLER_THREAD = re.compile(
    r"^(?:Current thread|Thread) 0x[^\n]*most recent call first\):\n((?:  .*\n?)*)", re.MULTILINE
)
_FAULTHANDLER_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in ')
_PY_SPY_THREAD = re.compile(r"^Thread [^\n]*\n((?:    .*\n?)*)", re.MULTILINE)


class PipeError(OSError):
    """The watchdog's pipe cannot be made. Its ``filename`` tells this from a port in use; the text has it already."""

    def __str__(self) -> str:
        """Return the text alone."""
        return str(self.strerror)


@runtime_checkable
class WorkerWatchdog(Protocol):
    """A timer server with the capabilities of :class:`ferroelastic.timer.FileTimerServer` that torch's server lacks."""

    def start(self) -> None:
        """Serve the pipe; make it again if it was removed."""

    def stop(self) -> None:
        """Stop serving and remove the pipe."""

    def set_workers(self, workers: Iterable[tuple[int, str, str]], /) -> None:
        """Set the workers to inspect when a timer expires: process id, name and log folder of each."""

    def expiry(self, pid: int, /) -> Expiry | None:
        """Return the last timer whose expiry ended a process."""


def as_worker_watchdog(server: object) -> WorkerWatchdog | None:
    """Return ``server`` if it has our capabilities; ``None`` for torch's server, a subclass's own one, or no server."""
    return server if isinstance(server, WorkerWatchdog) else None


def make_up_timer_file() -> str:
    """Return a path for the watchdog's pipe that no other process uses."""
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"watchdog_timer_{os.urandom(16).hex()}")


def start_server(path: str, run_id: str, log_event: Callable[[str, Any], None]) -> Any:
    """Start a server of timers whose expiry ends workers, and not this process.

    Args:
        path: path of its pipe.
        run_id: id of the run.
        log_event: see :class:`ferroelastic.timer.FileTimerServer`.

    Raises:
        PipeError: the pipe cannot be made, or a living process serves it.
    """
    import shutil

    from ferroelastic import timer

    try:
        server = timer.FileTimerServer(
            file_path=path,
            run_id=run_id,
            max_interval=_INTERVAL_S,
            daemon=True,
            log_event=log_event,
            reap_server=False,
            evidence_s=_evidence_s(),
            py_spy=shutil.which("py-spy"),
        )
    except OSError as error:
        remedy = "set TORCHELASTIC_TIMER_FILE to another path, or do not set it"
        raise PipeError(error.errno, f"{error.strerror}; {remedy}", path) from None
    server.start()
    return server


def renew(
    server: WorkerWatchdog, path: str, other_path: str, run_id: str, log_event: Callable[[str, Any], None]
) -> WorkerWatchdog:
    """Make sure that the workers of a restart have a pipe. A missing pipe is logged and does not stop the restart.

    Args:
        server: the server of the previous attempts.
        path: path of its pipe, which is made again if it was removed.
        other_path: path of a second pipe, for the case that another file is at ``path``. The agent does not remove that file.
        run_id: id of the run.
        log_event: see :class:`ferroelastic.timer.FileTimerServer`.

    Returns:
        The server; another one if its pipe is at ``other_path``.
    """
    try:
        server.start()
    except OSError as error:
        reason = str(error.strerror or error)
    else:
        return server
    try:
        another: WorkerWatchdog = start_server(other_path, run_id, log_event)
    except OSError as error:
        logger.error(  # noqa: TRY400 - the text says all
            "%s, and %s: workers that set timers fail; remove what is at %s",
            *(reason, str(error).partition("; ")[0], path),
        )
        return server
    server.stop()
    logger.warning(
        "%s, so workers get a pipe at %s; remove what is at %s to keep that path next time",
        *(reason, other_path, path),
    )
    return another


def _evidence_s() -> float:
    raw = os.environ.get(EVIDENCE_S_ENV)
    if raw is None:
        return _EVIDENCE_S
    try:
        found = float(raw)
    except ValueError:
        found = math.nan
    if math.isfinite(found) and found >= 0:
        return found
    logger.warning("%s=%r is not a number of seconds; using %s", EVIDENCE_S_ENV, raw, _EVIDENCE_S)
    return _EVIDENCE_S


def workers_with_folders(context: PContext, workers: Iterable[Worker]) -> list[tuple[int, str, str]]:
    """Return pid, name and log folder of each worker; the folder is empty where the worker has none of its own.

    Args:
        context: the workers' processes.
        workers: the workers.
    """
    error_files = newer(context, "error_files", {})
    pids = context.pids()
    found = []
    for worker in workers:
        if worker.local_rank in pids:
            folder = os.path.dirname(error_files.get(worker.local_rank, ""))
            has_own = os.path.isdir(folder) and folder != os.path.dirname(os.devnull)
            found.append((pids[worker.local_rank], f"rank {worker.global_rank}", folder if has_own else ""))
    return found


def describe(expiry: Expiry, pid: int) -> str:
    """Say in one line which timer has expired.

    Args:
        expiry: what the watchdog knows.
        pid: the worker, of which the process with the timer may be a descendant.
    """
    from datetime import datetime

    whose = "" if expiry.pid == pid else f" of its child process {expiry.pid}"
    try:
        at = datetime.fromtimestamp(expiry.expiration_time)  # noqa: DTZ006 - local time, as the rest of the report
        deadline = at.isoformat(sep=" ", timespec="milliseconds")
    except (OverflowError, ValueError, OSError):  # it is what a worker has said
        deadline = str(expiry.expiration_time)
    late_ms = expiry.late_ns / 1e6
    done = {
        "signalled": f"sent {_name(expiry.signal)}",
        "gone": "it ended before it was signalled",
        "denied": f"{_name(expiry.signal)} was not allowed",
    }.get(expiry.outcome, expiry.outcome)
    return f"timer {expiry.scope!r}{whose} expired: deadline {deadline}, noticed {late_ms:.1f} ms late, {done}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def explain(failure: ProcessFailure, expiry: Expiry) -> None:
    """Put the expiry of a timer into the message of a failure, with the Python stack of that moment.

    Args:
        failure: a worker that failed, of torch's class as well.
        expiry: the timer over which it was signalled.
    """
    cause = describe(expiry, failure.pid)
    details = _details([os.fspath(path) for path in expiry.evidence])
    message = failure.message
    if isinstance(message, dict):  # it has recorded an exception before it ended
        info = message.get("extraInfo")
        info = dict(info) if isinstance(info, dict) else {}
        info["py_callstack"] = "\n".join([cause, *details, str(info.get("py_callstack") or message.get("message"))])
        failure.message = {**message, "extraInfo": info}
        return
    failure.message = "\n".join([cause, message, *details])
    if failure.error_file == NOT_AVAILABLE:
        # A new one: failures of torch's class share theirs.
        failure.error_file_data = {**failure.error_file_data, "message": failure.message}


def _details(evidence: Sequence[str]) -> list[str]:
    if not evidence:
        return []
    folder = os.path.dirname(evidence[0])
    own = [path for path in evidence if os.path.dirname(path) == folder]
    lines = []
    for path in own:
        if os.path.basename(path).startswith("stacks."):
            lines += _stack(path)
    beside = "" if len(own) == len(evidence) else "; of other ranks in the folders beside it"
    return [*lines, f"evidence  : {folder} ({', '.join(map(os.path.basename, own))}){beside}"]


def _stack(path: str) -> list[str]:
    """Lines that show where the main thread was; none if the file does not tell."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _MOST_BYTES))
            text = file.read(_MOST_BYTES).decode(errors="replace")
    except OSError:
        return []
    frames = _faulthandler_frames(text) or _py_spy_frames(text)
    if not frames:
        return []
    left_out = len(frames) - _MOST_FRAMES
    more = [f"  ... and {left_out} callers"] if left_out > 0 else []
    return ["stack (most recent call first):", *(line for frame in frames[:_MOST_FRAMES] for line in frame), *more]


def _faulthandler_frames(text: str) -> list[list[str]]:
    """The frames of the thread that wrote the dump, which is the main one unless that blocks the signal, with their source."""
    import linecache

    threads = list(_FAULTHANDLER_THREAD.finditer(text))
    chosen = [thread for thread in threads if thread[0].startswith("Current")] or threads
    if not chosen:
        return []
    frames = []
    # The last one: the file may hold dumps of earlier expiries.
    for line in chosen[-1][1].splitlines():
        place = _FAULTHANDLER_FRAME.match(line)
        source = linecache.getline(place["file"], int(place["line"])).strip() if place else ""
        frames.append([line, f"    {source}"] if source else [line])
    return frames


def _py_spy_frames(text: str) -> list[list[str]]:
    threads = list(_PY_SPY_THREAD.finditer(text))
    chosen = [thread for thread in threads if '"MainThread"' in thread[0].partition("\n")[0]] or threads
    return [[line] for line in chosen[-1][1].splitlines()] if chosen else []
