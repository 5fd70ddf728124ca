"""The watchdog of an agent's workers, and its contribution to the failure report of a worker that it ended."""

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
    "generate_timer_file",
    "renew",
    "stack_of",
    "start_server",
    "workers_with_folders",
]

logger = get_logger(__name__)

EVIDENCE_S_ENV = "FERROELASTIC_EVIDENCE_S"
"""Environment variable: seconds, 60 at most, to collect evidence of the workers before one is ended. 0 collects none."""

_EVIDENCE_S = 2.0
_INTERVAL_S = 0.1  # torch's value; the native server does not use it
_MAX_FRAMES = 20
_MAX_BYTES = 1 << 20

_FAULTHANDLER_THREAD = re.compile(
    r"^(?:Current thread|Thread) 0x[^\n]*most recent call first\):\n((?:  .*\n?)*)", re.MULTILINE
)
_FAULTHANDLER_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in ')
_PY_SPY_THREAD = re.compile(r"^Thread [^\n]*\n((?:    .*\n?)*)", re.MULTILINE)


class PipeError(OSError):
    """The watchdog's pipe cannot be created. The attribute ``filename`` distinguishes this error from a port in use."""

    def __str__(self) -> str:
        """Return the text without ``filename``, which the text already contains."""
        return str(self.strerror)


@runtime_checkable
class WorkerWatchdog(Protocol):
    """A timer server with the capabilities of :class:`ferroelastic.timer.FileTimerServer` that torch's server lacks."""

    def start(self) -> None:
        """Serve the pipe. Create it again if it was removed."""

    def stop(self) -> None:
        """Stop serving and remove the pipe."""

    def set_workers(self, workers: Iterable[tuple[int, str, str]], /) -> None:
        """Set the workers to inspect when a timer expires: process id, name and log folder of each."""

    def expiry(self, pid: int, /) -> Expiry | None:
        """Return the last timer whose expiry ended a process."""


def as_worker_watchdog(server: object) -> WorkerWatchdog | None:
    """Return ``server`` if it has these capabilities; ``None`` for torch's server, another class, or no server."""
    return server if isinstance(server, WorkerWatchdog) else None


def generate_timer_file() -> str:
    """Return a path for the watchdog's pipe that no other process uses."""
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"watchdog_timer_{os.urandom(16).hex()}")


def start_server(path: str, run_id: str, log_event: Callable[[str, Any], None]) -> Any:
    """Start a timer server. An expired timer ends its worker, but not this process.

    Args:
        path: path of its pipe.
        run_id: id of the run.
        log_event: see :class:`ferroelastic.timer.FileTimerServer`.

    Raises:
        PipeError: the pipe cannot be created, or a running process serves it.
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
    """Ensure that the workers of a restart have a pipe. A failure is logged and does not stop the restart.

    Args:
        server: the server of the previous attempts.
        path: path of its pipe, which is created again if it was removed.
        other_path: path of the new pipe if another file is at ``path``. The agent does not remove that file.
        run_id: id of the run.
        log_event: see :class:`ferroelastic.timer.FileTimerServer`.

    Returns:
        The server, or a new server with its pipe at ``other_path``.
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
        logger.error(  # noqa: TRY400 - the text has all details
            "%s, and %s: the timers of workers will fail; remove the file at %s",
            *(reason, str(error).partition("; ")[0], path),
        )
        return server
    server.stop()
    logger.warning(
        "%s: the workers use a pipe at %s instead; remove the file at %s to use that path again",
        *(reason, other_path, path),
    )
    return another


def _evidence_s() -> float:
    raw = os.environ.get(EVIDENCE_S_ENV)
    if raw is None:
        return _EVIDENCE_S
    try:
        seconds = float(raw)
    except ValueError:
        seconds = math.nan
    if math.isfinite(seconds) and seconds >= 0:
        return seconds
    logger.warning("%s=%r is not a number of seconds; using %s", EVIDENCE_S_ENV, raw, _EVIDENCE_S)
    return _EVIDENCE_S


def workers_with_folders(context: PContext, workers: Iterable[Worker]) -> list[tuple[int, str, str]]:
    """Return pid, name and log folder of each worker. The folder is empty if the worker has no own log folder.

    Args:
        context: processes of the workers.
        workers: the workers.
    """
    error_files = newer(context, "error_files", {})
    pids = context.pids()
    found = []
    for worker in workers:
        if worker.local_rank in pids:
            folder = os.path.dirname(error_files.get(worker.local_rank, ""))
            has_folder = os.path.isdir(folder) and folder != os.path.dirname(os.devnull)
            found.append((pids[worker.local_rank], f"rank {worker.global_rank}", folder if has_folder else ""))
    return found


def describe(expiry: Expiry, pid: int) -> str:
    """Describe an expired timer in one line.

    Args:
        expiry: the expired timer.
        pid: process id of the worker. The process with the timer may be a descendant.
    """
    from datetime import datetime

    owner = "" if expiry.pid == pid else f" of its child process {expiry.pid}"
    try:
        at = datetime.fromtimestamp(expiry.expiration_time)  # noqa: DTZ006 - local time, as the rest of the report
        deadline = at.isoformat(sep=" ", timespec="milliseconds")
    except (OverflowError, ValueError, OSError):  # the time comes from a worker and may be any number
        deadline = str(expiry.expiration_time)
    late_ms = expiry.late_ns / 1e6
    action = {
        "signalled": f"sent {_name(expiry.signal)}",
        "gone": "the process ended before it was signalled",
        "denied": f"sending {_name(expiry.signal)} was not permitted",
    }.get(expiry.outcome, expiry.outcome)
    return f"timer {expiry.scope!r}{owner} expired: deadline {deadline}, noticed {late_ms:.1f} ms late, {action}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def explain(failure: ProcessFailure, expiry: Expiry) -> None:
    """Add an expired timer and the Python stack at its expiry to the message of a failure.

    Args:
        failure: a failed worker, of this package's or of torch's class.
        expiry: the timer for which the worker was signalled.
    """
    cause = describe(expiry, failure.pid)
    details = _details([os.fspath(path) for path in expiry.evidence])
    message = failure.message
    if isinstance(message, dict):  # the worker has recorded an exception
        info = message.get("extraInfo")
        info = dict(info) if isinstance(info, dict) else {}
        info["py_callstack"] = "\n".join([cause, *details, str(info.get("py_callstack") or message.get("message"))])
        failure.message = {**message, "extraInfo": info}
        return
    failure.message = "\n".join([cause, message, *details])
    if failure.error_file == NOT_AVAILABLE:
        # A new dictionary, because failures of torch's class share one.
        failure.error_file_data = {**failure.error_file_data, "message": failure.message}


def stack_of(expiry: Expiry) -> str:
    """Return the Python stack of the worker at the expiry of its timer, ``""`` without one."""
    paths = [os.fspath(path) for path in expiry.evidence]
    own = [path for path in paths if os.path.dirname(path) == os.path.dirname(paths[0])]
    stacks = [_stack(path)[1:] for path in own if os.path.basename(path).startswith("stacks.")]
    return "\n".join(line for stack in stacks for line in stack)


def _details(evidence: Sequence[str]) -> list[str]:
    if not evidence:
        return []
    folder = os.path.dirname(evidence[0])
    own = [path for path in evidence if os.path.dirname(path) == folder]
    lines = []
    for path in own:
        if os.path.basename(path).startswith("stacks."):
            lines += _stack(path)
    others = "" if len(own) == len(evidence) else "; evidence of the other ranks is in the folders next to it"
    return [*lines, f"evidence  : {folder} ({', '.join(map(os.path.basename, own))}){others}"]


def _stack(path: str) -> list[str]:
    """Return the stack of the main thread as lines. Empty if the file contains none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _MAX_BYTES))
            text = file.read(_MAX_BYTES).decode(errors="replace")
    except OSError:
        return []
    frames = _faulthandler_frames(text) or _py_spy_frames(text)
    if not frames:
        return []
    omitted = len(frames) - _MAX_FRAMES
    more = [f"  ... and {omitted} callers"] if omitted > 0 else []
    return ["stack (most recent call first):", *(line for frame in frames[:_MAX_FRAMES] for line in frame), *more]


def _faulthandler_frames(text: str) -> list[list[str]]:
    """Return the frames of the thread that wrote the dump, with their source: the main thread unless it blocks the signal."""
    import linecache

    threads = list(_FAULTHANDLER_THREAD.finditer(text))
    chosen = [thread for thread in threads if thread[0].startswith("Current")] or threads
    if not chosen:
        return []
    frames = []
    # The last dump, because the file may contain dumps of earlier expiries.
    for line in chosen[-1][1].splitlines():
        match = _FAULTHANDLER_FRAME.match(line)
        source = linecache.getline(match["file"], int(match["line"])).strip() if match else ""
        frames.append([line, f"    {source}"] if source else [line])
    return frames


def _py_spy_frames(text: str) -> list[list[str]]:
    threads = list(_PY_SPY_THREAD.finditer(text))
    chosen = [thread for thread in threads if '"MainThread"' in thread[0].partition("\n")[0]] or threads
    return [[line] for line in chosen[-1][1].splitlines()] if chosen else []
