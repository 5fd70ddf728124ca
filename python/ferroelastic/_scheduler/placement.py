"""A node's place in a job, with the source of each value."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ferroelastic._usage import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "REMEDY",
    "Incomplete",
    "Placement",
    "Surroundings",
    "Taken",
    "check_rank",
    "is_first",
    "missing",
    "number",
    "port_of_name",
    "port_of_number",
    "text",
]

REMEDY = "or ignore the scheduler with --no-scheduler"
"""End of each error: the command line that needs no scheduler."""

# Below the ephemeral ports of Linux (from 32768), which connections of any process may hold.
_FIRST_PORT = 20000
_PORTS = 10000
# Prime to the number of ports: the steps of one job have different ports, and so have the first steps of jobs with close numbers.
_PORTS_BETWEEN_STEPS = 997

T = TypeVar("T")


@dataclass(frozen=True)
class Taken(Generic[T]):
    """A value and its source."""

    value: T
    source: str
    """Names of the variables, for the log."""


@dataclass(frozen=True)
class Placement:
    """The place of this node in a job."""

    scheduler: str
    """Name of the scheduler, for the log."""
    nodes: Taken[int]
    rank: Taken[int]
    run_id: Taken[str]
    host: Taken[str]
    """Name or address of the node with rank 0."""
    port: Taken[int]
    gpus: Taken[int] | None = None
    """Number of GPUs of the job on this node."""
    end_s: Taken[int] | None = None
    """End of the job, in seconds since 1970."""


@dataclass(frozen=True)
class Incomplete:
    """A scheduler whose variables do not tell the place of this node."""

    scheduler: str
    reason: str = ""
    """The missing part. Empty if this node is the whole job."""
    remedy: str = ""
    """The action to take."""
    is_first: bool = True
    """Whether this is the node that reports the reason to the console."""
    nodes: Taken[int] | None = None
    rank: Taken[int] | None = None
    gpus: Taken[int] | None = None
    end_s: Taken[int] | None = None


class Surroundings(NamedTuple):
    """Sources of facts outside of the environment variables. Tests replace them."""

    nodes: Taken[int] | None
    """The number of nodes that the user gave."""
    hostname: Callable[[], str]
    """Returns the short name of this host."""
    fqdn: Callable[[], str]
    """Returns the fully qualified name of this host."""
    flux_hosts: Callable[[], str]
    """Returns the host list of the Flux job. Raises ``OSError`` with the reason."""


def text(environ: Mapping[str, str], *env_names: str) -> Taken[str] | None:
    """Return the first of the variables that is set and not empty, or ``None``."""
    for env_name in env_names:
        value = environ.get(env_name)
        if value:
            return Taken(value, env_name)
    return None


def number(environ: Mapping[str, str], *env_names: str) -> Taken[int] | None:
    """Return the first of the variables that is set and not empty as a number, or ``None``.

    Raises:
        UsageError: the value is not a whole number from 0.
    """
    found = text(environ, *env_names)
    if found is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", found.value):
        raise UsageError(
            f"{found.source}={found.value!r} is not a whole number; unset it or give the number of the scheduler, {REMEDY}"
        )
    return Taken(int(found.value), found.source)


def missing(scheduler: str, **values: object) -> str:
    """Return a text that names the variables without a value.

    Args:
        scheduler: name of the scheduler.
        values: the variables with their values, ``None`` for one that is not set.
    """
    absent = [env_name for env_name, value in values.items() if value is None]
    return f"the variables of {scheduler} are incomplete: {', '.join(absent)} not set"


def check_rank(rank: Taken[int], nodes: Taken[int]) -> None:
    """Check that a rank is below the number of nodes.

    Raises:
        UsageError: it is not.
    """
    if rank.value >= nodes.value:
        raise UsageError(
            f"{rank.source}={rank.value} is not a rank of {nodes.value} nodes ({nodes.source}); "
            f"start one ferrorun per node with the launcher of the scheduler, {REMEDY}"
        )


def is_first(rank: Taken[int] | None) -> bool:
    """Return whether a node reports for all: the first one, or each one if the ranks are unknown."""
    return rank is None or rank.value == 0


def port_of_number(job: int, step: int = 0) -> int:
    """Return the port of a numbered job: 20000 to 29999, different for jobs with close numbers and for the steps of one job."""
    return _FIRST_PORT + (job + _PORTS_BETWEEN_STEPS * step) % _PORTS


def port_of_name(run_id: str) -> int:
    """Return the port of a named job: 20000 to 29999, from a checksum of the name."""
    return _FIRST_PORT + zlib.crc32(run_id.encode()) % _PORTS
