"""The failure of a job as data, and its JSON.

Nodes exchange this JSON, so :func:`from_dict` accepts any value: a field of the wrong type gets its default.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from ferroelastic._failure.text import head_and_tail, shortened

__all__ = [
    "Advice",
    "ExceptionReport",
    "Failure",
    "FirstFailure",
    "Job",
    "Kind",
    "Others",
    "Restart",
    "Sender",
    "SenderKind",
    "WatchdogReport",
    "decode_detail",
    "encode_detail",
    "from_dict",
    "to_dict",
    "to_json",
]

VERSION = 1
MAX_DETAIL_BYTES = 32 * 1024
"""Maximum length of the JSON that travels between nodes. The native module does not send a longer one."""

Kind: TypeAlias = Literal["exit", "signal", "watchdog", "stuck", "lost_node", "early_exit", "log_pattern", "agent"]
SenderKind: TypeAlias = Literal["agent", "oom_killer", "process", "unknown"]


@dataclass(frozen=True)
class Job:
    """The failed job.

    Attributes:
        run_id: id of the run.
        name: name of the entrypoint.
        role: role of the workers.
        exit_code: exit code of the job.
        time_ns: time of the report in nanoseconds since the epoch.
    """

    run_id: str = ""
    name: str = ""
    role: str = ""
    exit_code: int = 1
    time_ns: int = 0


@dataclass(frozen=True)
class Sender:
    """The sender of the signal that ended a worker.

    Attributes:
        kind: the agent, the kernel's OOM killer, another process, or unknown.
        pid: process id of another process.
        name: name of another process.
        scope: the OOM killer enforced the limit of a cgroup or of the host.
        limit_bytes: this limit.
        peak_bytes: peak memory of the cgroup; for the host, of the worker.
    """

    kind: SenderKind = "unknown"
    pid: int | None = None
    name: str | None = None
    scope: Literal["cgroup", "host"] | None = None
    limit_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class WatchdogReport:
    """An expired timer: its scope, and the worker's Python stack at the expiry."""

    scope: str = ""
    stack: str = ""


@dataclass(frozen=True)
class ExceptionReport:
    """The Python exception that ended a worker.

    Attributes:
        type: qualified name of the class.
        message: text of the exception.
        traceback: traceback as Python printed it, with the chained exceptions.
        source: where it was found.
    """

    type: str = ""
    message: str = ""
    traceback: str = ""
    source: Literal["stderr", "error_file"] = "stderr"


@dataclass(frozen=True)
class FirstFailure:
    """The first failure of the job.

    Attributes:
        time_ns: time of the failure in nanoseconds since the epoch, from the kernel if it is known.
        time: the same as ISO 8601 text with the zone of the host.
        rank: global rank of the worker. ``None`` in this and the following fields: unknown, or no worker failed.
        local_rank: its rank on the node.
        node_rank: rank of the node.
        host: name of the host.
        pid: process id of the worker.
        round: number of the round of the rendezvous.
        kind: kind of the failure.
        exit_code: exit code of the worker.
        signal: name of the signal that ended the worker.
        sender: sender of the signal.
        watchdog: the expired timer.
        exception: the Python exception.
        fatal_dump: faulthandler's dump of a fatal signal.
        core: location of the core file.
        xid: line of the kernel log about a GPU's error.
        error_file_problem: why the worker's error file could not be used.
        stderr: last lines of the worker's standard error.
        reason: a fact about the cause that the other fields do not contain, as text.
    """

    time_ns: int = 0
    time: str = ""
    rank: int | None = None
    local_rank: int | None = None
    node_rank: int | None = None
    host: str = ""
    pid: int | None = None
    round: int | None = None
    kind: Kind = "agent"
    exit_code: int | None = None
    signal: str | None = None
    sender: Sender | None = None
    watchdog: WatchdogReport | None = None
    exception: ExceptionReport | None = None
    fatal_dump: str | None = None
    core: str | None = None
    xid: str | None = None
    error_file_problem: str | None = None
    stderr: list[str] = field(default_factory=list)
    reason: str | None = None


@dataclass(frozen=True)
class Advice:
    """One line of advice for a cause that is certain.

    Attributes:
        cause: name of the cause, for programs.
        text: the advice.
    """

    cause: str = ""
    text: str = ""


@dataclass(frozen=True)
class Others:
    """The other workers of this node.

    Attributes:
        failed: number of further workers that failed by themselves.
        stopped: number of workers that the agent stopped.
        same_failure: ranks of the further workers that failed with the same exception or exit.
    """

    failed: int = 0
    stopped: int = 0
    same_failure: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Restart:
    """A restart of the workers.

    Attributes:
        round: number of the round that the restart ended, counted on this node from 0.
        cause: the failure or the change of membership, as text.
        time_ns: time in nanoseconds since the epoch.
    """

    round: int = 0
    cause: str = ""
    time_ns: int = 0


@dataclass(frozen=True)
class Failure:
    """The failure of a job.

    Attributes:
        job: the job.
        first: its first failure.
        advice: advice, if the cause is certain.
        others: the other workers of this node.
        restarts: the last restarts before the failure, up to 20.
        decision: why there was no further restart.
        logs: log folder of this run on this node.
    """

    job: Job = field(default_factory=Job)
    first: FirstFailure = field(default_factory=FirstFailure)
    advice: Advice | None = None
    others: Others = field(default_factory=Others)
    restarts: list[Restart] = field(default_factory=list)
    decision: str | None = None
    logs: str | None = None


_NESTED: dict[str, type[Any]] = {
    "job": Job,
    "first": FirstFailure,
    "advice": Advice,
    "others": Others,
    "sender": Sender,
    "watchdog": WatchdogReport,
    "exception": ExceptionReport,
}
_CHOICES = {
    (FirstFailure, "kind"): get_args(Kind),
    (Sender, "kind"): get_args(SenderKind),
    (Sender, "scope"): ("cgroup", "host"),
    (ExceptionReport, "source"): ("stderr", "error_file"),
}


def to_dict(failure: Failure) -> dict[str, Any]:
    """Return a failure as the object of ``failure.json``. A sender has only the fields that are known."""
    data = {"version": VERSION, **asdict(failure)}
    sender = data["first"]["sender"]
    if sender is not None:
        data["first"]["sender"] = {name: value for name, value in sender.items() if value is not None}
    return data


def to_json(failure: Failure) -> str:
    """Return a failure as one line of JSON."""
    return json.dumps(to_dict(failure))


def from_dict(data: object) -> Failure:
    """Return the failure of an object of ``failure.json``. Fields that are missing or of the wrong type get their defaults."""
    parsed: Failure = _parse(Failure, data)
    restarts = data.get("restarts") if isinstance(data, dict) else None
    listed = [_parse(Restart, entry) for entry in restarts] if isinstance(restarts, list) else []
    return replace(parsed, restarts=listed)


def _parse(cls: type[Any], data: object) -> Any:
    known = data if isinstance(data, dict) else {}
    values: dict[str, Any] = {}
    for one in fields(cls):
        value = known.get(one.name)
        if one.name in _NESTED and is_dataclass(_NESTED[one.name]):
            if isinstance(value, dict):
                values[one.name] = _parse(_NESTED[one.name], value)
        elif value is not None and _fits(cls, one.name, str(one.type), value):
            values[one.name] = value
    return cls(**values)


def _fits(cls: type[Any], name: str, annotation: str, value: object) -> bool:
    choices = _CHOICES.get((cls, name))
    if choices is not None:
        return value in choices if isinstance(value, str) else False
    if annotation.startswith("int"):
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation.startswith("str"):
        return isinstance(value, str)
    if annotation.startswith("list[str]"):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if annotation.startswith("list[int]"):
        return isinstance(value, list) and all(isinstance(item, int) for item in value)
    return False


def encode_detail(first: FirstFailure) -> str:
    """Return the first failure as JSON for the other nodes, shortened to ``MAX_DETAIL_BYTES``."""
    for size in (8192, 4096, 2048, 512, 0):
        text = json.dumps(to_dict(Failure(first=_shortened(first, size))))
        if len(text) <= MAX_DETAIL_BYTES:  # the JSON is ASCII
            return text
    return ""


def decode_detail(text: str) -> FirstFailure | None:
    """Return the first failure that another node reported; ``None`` if the text is not such a report."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not isinstance(data.get("first"), dict):
        return None
    return from_dict(data).first


def _shortened(first: FirstFailure, size: int) -> FirstFailure:
    """Return the failure with no text that is longer than about ``size`` characters."""
    exception, watchdog, dump = first.exception, first.watchdog, first.fatal_dump
    lines = [shortened(line, max(size // 20, 20)) for line in first.stderr] if size else []
    return replace(
        first,
        exception=exception
        and replace(
            exception,
            type=shortened(exception.type, 200),
            message=shortened(exception.message, max(size // 2, 200)),
            traceback=head_and_tail(exception.traceback, size),
        ),
        watchdog=watchdog
        and replace(watchdog, scope=shortened(watchdog.scope, 200), stack=head_and_tail(watchdog.stack, size)),
        fatal_dump=dump and head_and_tail(dump, size),
        core=first.core and shortened(first.core, 500),
        xid=first.xid and shortened(first.xid, 500),
        error_file_problem=first.error_file_problem and shortened(first.error_file_problem, 500),
        reason=first.reason and shortened(first.reason, max(size // 2, 500)),
        stderr=lines,
    )
