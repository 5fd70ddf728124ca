"""The report of a failed job for the console: a box, a few lines, or JSON."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from ferroelastic._failure.model import to_json
from ferroelastic._failure.text import clean, shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ferroelastic._failure.model import Failure, FirstFailure, Sender

__all__ = ["FORMS", "headline", "render"]

FORMS = ("full", "short", "json")
_WIDTH = 60
_MAX_LINE = 400
_MAX_TRACEBACK_LINES = 60
_MAX_STDERR_LINES = 10
_MAX_RESTARTS = 5
_MAX_RANKS = 16
_JUDGED = {
    "stuck": "is stuck in the kernel",
    "early_exit": "ended early, while other workers ran on",
    "log_pattern": "wrote a line that fails the job",
}
_FAULTS = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS")
_GIB, _MIB = 1 << 30, 1 << 20
_RED, _BOLD, _YELLOW, _END = "\x1b[1;31m", "\x1b[1m", "\x1b[33m", "\x1b[0m"


def render(failure: Failure, form: str, *, has_colour: bool = False, file: str | None = None) -> str:
    """Return the report of a failure, without a newline at its end.

    Args:
        failure: the failure.
        form: ``full``, ``short`` or ``json``.
        has_colour: whether to use colours.
        file: path of the report as JSON, which the full form shows; ``None`` shows none.
    """
    if form == "json":
        return to_json(failure)
    return "\n".join(_short(failure) if form == "short" else _full(failure, file, has_colour))


def headline(failure: Failure) -> str:
    """Return the failure in one line: ``train.py FAILED: rank 1 exited with code 3``."""
    name = f"{failure.job.name} FAILED" if failure.job.name else "FAILED"
    return _line(f"{name}: {_event(failure.first)}")


def _event(first: FirstFailure) -> str:
    if first.kind == "lost_node":
        return "a node was lost"
    if first.rank is None:
        return first.reason or "the job has ended"
    if first.watchdog is not None:
        how = f"missed the deadline of its timer {first.watchdog.scope!r}"
    elif first.kind in _JUDGED:
        how = _JUDGED[first.kind]
    elif first.sender is not None and first.sender.kind == "oom_killer":
        how = "was killed by the kernel's OOM killer"
    elif first.signal is not None:
        how = f"was ended by {first.signal}"
    else:
        how = f"exited with code {first.exit_code}"
    return f"rank {first.rank} {how}"


def _short(failure: Failure) -> list[str]:
    first = failure.first
    lines = [headline(failure), ", ".join(filter(None, [first.time, *_place(first)]))]
    if first.exception is not None:
        lines.append(_one_line(first.exception.type, first.exception.message))
    elif first.reason is not None and first.rank is not None:
        lines.append(first.reason)
    elif first.stderr:
        lines.append(first.stderr[-1])
    if failure.advice is not None:
        lines.append(f"advice: {failure.advice.text}")
    if failure.logs is not None:
        lines.append(f"logs: {failure.logs}")
    return [_line(line) for line in lines]


def _place(first: FirstFailure) -> list[str]:
    place = [f"host {first.host}"] if first.host else []
    return [*place, f"pid {first.pid}"] if first.pid is not None else place


def _one_line(kind: str, message: str) -> str:
    text = message.partition("\n")[0]
    return f"{kind}: {text}" if kind and text else kind or text


def _full(failure: Failure, file: str | None, has_colour: bool) -> Iterator[str]:
    def paint(text: str, colour: str) -> str:
        return f"{colour}{text}{_END}" if has_colour else text

    def row(key: str, value: str, colour: str = "") -> str:
        text = _line(value)
        return f"  {paint(key.ljust(10), _BOLD)}: {paint(text, colour) if colour else text}"

    yield "=" * _WIDTH
    yield paint(headline(failure), _RED)
    yield "-" * _WIDTH
    yield "Root Cause (first observed failure):"
    for key, value in (*_rows(failure.first), *_causes(failure.first)):
        yield row(key, value)
    yield from _blocks(failure.first, row)
    if failure.restarts:
        yield row("restarts", str(failure.restarts[-1].round + 1))
        yield from _indented([f"after round {one.round}: {one.cause}" for one in failure.restarts[-_MAX_RESTARTS:]])
    for key, value in _job_rows(failure):
        yield row(key, value)
    if file is not None:
        yield row("report", file)
    if failure.advice is not None:
        yield row("advice", failure.advice.text, _YELLOW)
    yield "=" * _WIDTH


def _rows(first: FirstFailure) -> Iterator[tuple[str, str]]:
    """Yield the lines about time, place and exit of the first failure."""
    yield "time", first.time
    if first.host:
        yield "host", first.host
    if first.rank is not None:
        yield "rank", f"{first.rank}" + ("" if first.local_rank is None else f" (local_rank: {first.local_rank})")
    if first.node_rank is not None and first.round is not None:
        yield "node", f"{first.node_rank}, in round {first.round}"
    pid = "" if first.pid is None else f" (pid: {first.pid})"
    if first.signal is not None:
        yield "exitcode", f"{_returncode(first.signal)}{pid} ({first.signal})"
    elif first.exit_code is not None:
        yield "exitcode", f"{first.exit_code}{pid}"


def _causes(first: FirstFailure) -> Iterator[tuple[str, str]]:
    """Yield the lines about the cause of the first failure that are one line each."""
    if first.sender is not None:
        yield "sender", _sender(first.sender, first)
    if first.reason is not None and first.reason not in _event(first):
        yield "reason", first.reason
    if first.xid is not None:
        yield "GPU", first.xid
    if first.core is not None:
        yield "core", first.core
    if first.error_file_problem is not None:
        yield "error file", f"cannot be used: {first.error_file_problem}"


def _returncode(name: str) -> str:
    """Return minus the number of a signal, as torch's report shows it."""
    number = getattr(signal, name, None)
    return str(-number) if isinstance(number, int) else f"-{name.rpartition(' ')[2]}"


def _sender(sender: Sender, first: FirstFailure) -> str:
    if sender.kind == "agent":
        return "the agent"
    if sender.kind == "process":
        return f"process {sender.pid}" + (f" ({sender.name})" if sender.name else "")
    if sender.kind == "unknown":
        if first.signal in _FAULTS:
            return "unknown; not the agent. The program raises this signal itself after a fault"
        counted = (
            ", and the kernel has counted no OOM kill" if first.signal == "SIGKILL" and first.reason is None else ""
        )
        return f"unknown; not the agent{counted}"
    limit = "" if sender.limit_bytes is None else f", limit {_bytes(sender.limit_bytes)}"
    whose = "peak" if sender.scope == "cgroup" else "peak of the worker"
    peak = "" if sender.peak_bytes is None else f", {whose} {_bytes(sender.peak_bytes)}"
    scope = {"cgroup": ": memory of the cgroup", "host": ": memory of the host"}.get(sender.scope or "", "")
    return f"the kernel's OOM killer{scope}{limit}{peak}"


def _bytes(number: int) -> str:
    return f"{number / _GIB:.2f} GiB" if number >= _GIB else f"{number / _MIB:.1f} MiB"


def _blocks(first: FirstFailure, row: Callable[[str, str], str]) -> Iterator[str]:
    """Yield the entries about the first failure that have several lines each."""
    if first.watchdog is not None and first.watchdog.stack:
        yield row("stack", "where the worker was at the deadline")
        yield from _indented(first.watchdog.stack.split("\n"))
    if first.exception is not None:
        yield row("exception", _one_line(first.exception.type, first.exception.message))
        yield from _indented((first.exception.traceback or first.exception.message).split("\n"))
    if first.fatal_dump is not None:
        yield row("stack", "where the worker was when the signal came")
        yield from _indented(first.fatal_dump.split("\n"))
    # The traceback and the dump are lines of standard error already.
    elif first.stderr and first.exception is None:
        yield row("stderr", "its last lines")
        yield from _indented(first.stderr[-_MAX_STDERR_LINES:])


def _indented(lines: list[str]) -> Iterator[str]:
    half = _MAX_TRACEBACK_LINES // 2
    if len(lines) > _MAX_TRACEBACK_LINES:
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines left out ...", *lines[-half:]]
    for line in lines:
        yield f"    {_line(line)}".rstrip()


def _job_rows(failure: Failure) -> Iterator[tuple[str, str]]:
    others = failure.others
    if others.failed or others.stopped:
        yield "others", _others(failure)
    if failure.decision is not None:
        yield "decision", failure.decision
    yield "job", f"ends with exit code {failure.job.exit_code}"
    if failure.logs is not None:
        yield "logs", failure.logs


def _others(failure: Failure) -> str:
    others = failure.others
    parts = []
    if others.failed:
        same = others.same_failure
        parts.append(f"{others.failed} failed by {'itself' if others.failed == 1 else 'themselves'}")
        if same:
            shown = ", ".join(map(str, same[:_MAX_RANKS])) + (" ..." if len(same) > _MAX_RANKS else "")
            parts[-1] += f" ({'rank' if len(same) == 1 else 'ranks'} {shown} in the same way)"
    if others.stopped:
        parts.append(f"{others.stopped} stopped by the agent")
    return ", ".join(parts)


def _line(text: str) -> str:
    """Return text as one line that is safe to show."""
    return shortened(clean(text).replace("\n", " ").replace("\t", "    "), _MAX_LINE)
