"""Flux: one task per node (``flux run --nodes=N --ntasks=N ferrorun``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferroelastic._scheduler.hostlist import expand
from ferroelastic._scheduler.placement import (
    REMEDY,
    Incomplete,
    Placement,
    Taken,
    check_rank,
    is_first,
    missing,
    number,
    port_of_name,
    text,
)
from ferroelastic._usage import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ferroelastic._scheduler.placement import Surroundings

__all__ = ["host_list", "place"]

_COMMAND = ("flux", "hostlist", "local")
_TIMEOUT_S = 30


def place(environ: Mapping[str, str], surroundings: Surroundings) -> Placement | Incomplete | None:
    """Return the place of this node in a Flux job; ``None`` outside of one.

    The environment has no host list. The command ``flux hostlist`` tells it.

    Raises:
        UsageError: a variable has an invalid value, a node has several tasks, or the host list has another number of nodes.
    """
    job = text(environ, "FLUX_JOB_ID")
    if job is None:
        return None
    nodes, rank = number(environ, "FLUX_JOB_NNODES"), number(environ, "FLUX_TASK_RANK")
    if nodes is None or rank is None:
        reason = missing("Flux", FLUX_JOB_NNODES=nodes, FLUX_TASK_RANK=rank)
        return Incomplete("Flux", reason, "give --rdzv-endpoint", is_first(rank))
    tasks = number(environ, "FLUX_JOB_SIZE")
    if tasks is not None and tasks.value > nodes.value:
        raise UsageError(
            f"{tasks.source}={tasks.value} starts several agents on one of {nodes.value} nodes ({nodes.source}), but the agent of a node "
            f"starts all its workers; run flux run --nodes={nodes.value} --ntasks={nodes.value}, {REMEDY}"
        )
    check_rank(rank, nodes)
    if nodes.value == 1:
        return Incomplete("Flux")
    command = " ".join(_COMMAND)
    try:
        hosts = expand(surroundings.flux_hosts().strip())
    except (OSError, ValueError) as error:
        reason = f"the first node is unknown: {command}: {error}"
        return Incomplete("Flux", reason, "give --rdzv-endpoint", rank.value == 0, nodes, rank)
    if len(hosts) != nodes.value:
        raise UsageError(
            f"{nodes.source}={nodes.value}, but {command} has {len(hosts)} hosts; give --rdzv-endpoint, {REMEDY}"
        )
    host = Taken(hosts[0], f"the first node of {command}")
    return Placement("Flux", nodes, rank, job, host, Taken(port_of_name(job.value), "from the id"))


def host_list() -> str:
    """Return the host list of this job from the command ``flux``.

    Raises:
        OSError: the command is missing, fails or does not answer.
    """
    import subprocess

    try:
        done = subprocess.run(  # noqa: S603 - no input of a user
            _COMMAND, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer within {_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise OSError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout
