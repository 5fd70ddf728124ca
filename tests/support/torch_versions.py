"""Differences between the versions of torch. No other module of the tests names a version of torch.

``torch.distributed.elastic`` has changed since 2.6, the oldest version that this package supports. A test with the mark ``needs("id")`` is
skipped on an implementation that lacks the change. ``impl.by_version("id", before=…, since=…)`` gives the expected value where this package
follows the installed version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ferroelastic import _torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CHANGES",
    "OPTIONS",
    "REMOVED",
    "Change",
    "has",
    "has_option",
    "is_between",
    "is_newest",
    "is_older_than",
    "knows",
]


class Change(NamedTuple):
    """A change of torch."""

    since: str
    """First version with the change."""
    of: str
    """The changed name."""
    text: str
    """The change."""
    is_followed: bool = False
    """Whether the installed version decides for this package too. Otherwise this package has the change with each version."""


CHANGES: dict[str, Change] = {
    "timer-server": Change(
        "2.7",
        "FileTimerServer",
        "it opens its pipe before `start` returns, and its thread survives the end of the pipe",
    ),
    "restart-flag": Change("2.8", "SimpleElasticAgent._stop_workers", "it has no argument `is_restart`"),
    "event-log-handler": Change("2.8", "WorkerSpec, LaunchConfig", "`event_log_handler` is a field"),
    "store-operations": Change(
        "2.10", "TCPStore, its client", "queues, barriers, `list_keys` and `clone` are there", is_followed=True
    ),
    "store-protocol": Change("2.10", "TCPStore, its server", "the requests of these operations are known"),
    "stopped-are-failures": Change("2.10", "RunProcsResult.failures", "the workers that were stopped are there too"),
    "error-traits": Change(
        "2.10", "ProcessFailure.error_file_data", "`errorTraits` is there for an exit code without an error file"
    ),
    "signal-names": Change(
        "2.12", "ChildFailedError.format_msg", "the line of the exit code has the name of the signal"
    ),
    "numa-functions": Change("2.10", "torch.numa.binding, private functions", "commands are wrapped in numactl"),
    "exit-barrier-flag": Change("2.12", "SimpleElasticAgent._in_exit_barrier", "the attribute exists"),
    "free-static-port": Change(
        "2.12", "run, the static rendezvous of one node", "the default port is chosen when the job starts"
    ),
    "alive-callback": Change("2.13", "HealthCheckServer.alive_callback", "the property exists"),
    "numa": Change("2.9", "torch.numa", "the module exists. `numa_options` is a field and an argument"),
    "filtered-files": Change(
        "2.10",
        "duplicate_stdout_filters, duplicate_stderr_filters",
        "they exist, and `filtered_stdout`, `filtered_stderr` of `LogsDest`",
    ),
    "virtual-local-rank": Change("2.10", "WorkerSpec, LaunchConfig", "`virtual_local_rank` is a field"),
    "signals-to-handle": Change("2.10", "LaunchConfig", "`signals_to_handle` is a field"),
    "exit-codes-of-events": Change(
        "2.10", "SimpleElasticAgent, its events", "they have the exit code and the pid of the worker"
    ),
    "shutdown-timeout": Change(
        "2.12", "SimpleElasticAgent, LaunchConfig", "`shutdown_timeout` is an argument and a field"
    ),
    "shared-health-server": Change("2.12", "LocalElasticAgent, elastic_launch", "`health_check_server` is an argument"),
    "uninterruptible-state": Change("2.13", "LocalElasticAgent", "`uninterruptible_state_timeout` is an argument"),
    "enriched-signal-failures": Change(
        "2.14",
        "ErrorHandler.maybe_enrich_signal_failure_message",
        "`ChildFailedError` calls it for each worker that a signal ended",
    ),
    "hostname-in-prefixes": Change("2.14", "log_line_prefix_template", "`${hostname}` is replaced"),
    "device-index": Change(
        "2.14", "torch.numa.binding, private functions", "`gpu_index` is `device_index`, and any accelerator counts"
    ),
    "hooks-of-the-error-handler": Change(
        "2.15", "ErrorHandler.set_entrypoint_fn_name, ErrorHandler.record_success", "`record` calls them"
    ),
    "hip-visible-devices": Change(
        "2.15",
        "LocalElasticAgent with virtual_local_rank",
        "`HIP_VISIBLE_DEVICES` has the devices, if it is set, and is set for the worker",
        is_followed=True,
    ),
    "ports-on-all-addresses": Change(
        "2.15",
        "utils.get_socket_with_port",
        "the socket is bound to all addresses and does not listen; before, it listened on localhost",
        is_followed=True,
    ),
}

OPTIONS: dict[str, str] = {
    "event_log_handler": "2.8",
    "numa_binding": "2.9",
    "duplicate_stderr_filters": "2.10",
    "duplicate_stdout_filters": "2.10",
    "signals_to_handle": "2.10",
    "virtual_local_rank": "2.10",
    "shutdown_timeout": "2.12",
    "log_line_prefix_template": "2.14",
    "print_completion": "2.14",
}
"""First version of each option of the command line that the oldest version lacks, by destination."""


REMOVED: tuple[str, ...] = (
    "agent.server.*:*ElasticAgent._shutdown",
    "agent.server.*:*ElasticAgent._stop_workers",
    "events.api:EventMetadataValue",
    "multiprocessing.api:*Context._std*_tail",
    "multiprocessing.subprocess_handler.subprocess_handler:maybe_*",
    "numa.binding:maybe_*",
)
"""Names that versions before 2.13 have, or have with other arguments, as patterns of ``module:name`` and ``module:Class.member``."""

_OLDEST = "2.6"


def _parsed(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def is_older_than(version: str) -> bool:
    """Whether the installed torch is older than a version."""
    return _torch.is_older_than(*_parsed(version))


def has_option(destination: str) -> bool:
    """Whether the installed torch has an option of the newest version."""
    return not is_older_than(OPTIONS.get(destination, _OLDEST))


def knows(line: Sequence[str]) -> bool:
    """Whether the installed torch has all options of a command line."""
    names = {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in line}
    return all(has_option(name) for name in names)


def is_between(since: str, fixed_in: str) -> bool:
    """Whether the installed torch is at least ``since`` and older than ``fixed_in``. An empty version is no limit."""
    return not (since and is_older_than(since)) and (not fixed_in or is_older_than(fixed_in))


def has(change: str) -> bool:
    """Whether the installed torch has a change."""
    return not is_older_than(CHANGES[change].since)


def is_newest() -> bool:
    """Whether the installed torch is at least the newest version that this package knows."""
    return not _torch.is_older_than(*_torch.NEWEST_VERSION)
