"""Completes a command line with the values of the scheduler."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from ferroelastic._scheduler import clouds, flux, kubernetes, mpi, slurm
from ferroelastic._scheduler.placement import REMEDY, Incomplete, Placement, Surroundings, Taken
from ferroelastic._text import endpoint_text
from ferroelastic._usage import UsageError, named
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Collection, Mapping

__all__ = ["END_VARIABLE", "find", "take"]

# Name of an agent's process in /proc, of this package and of torch.
_AGENT_NAME = "pt_elastic"
END_VARIABLE = "FERROELASTIC_JOB_END_S"
"""Environment variable of the workers: the end of the job in seconds since 1970."""

# The innermost first: it started this process, and knows its own processes.
_SOURCES = (
    mpi.place,
    flux.place,
    clouds.place_by_skypilot,
    clouds.place_by_dstack,
    slurm.place,
    kubernetes.place,
)


def find(environ: Mapping[str, str], surroundings: Surroundings) -> Placement | Incomplete | None:
    """Return the place of this node from the innermost scheduler whose variables are complete.

    Args:
        environ: the environment.
        surroundings: facts outside of it.

    Returns:
        The place; an ``Incomplete`` if no scheduler tells it; ``None`` without a scheduler.

    Raises:
        UsageError: a variable has an invalid value, or two schedulers disagree.
    """
    skipped = slurm.place if mpi.is_inner(environ) else None
    found = [one for source in _SOURCES if source is not skipped and (one := source(environ, surroundings)) is not None]
    complete = [one for one in found if isinstance(one, Placement)]
    if not found:
        return None
    chosen = (complete or found)[0]
    for other in found:
        _check_agreement(chosen, other)
    return chosen


def _check_agreement(one: Placement | Incomplete, other: Placement | Incomplete) -> None:
    """Check that two schedulers name the same number of nodes and the same rank.

    Raises:
        UsageError: they do not.
    """
    for mine, theirs in ((one.nodes, other.nodes), (one.rank, other.rank)):
        if mine is not None and theirs is not None and mine.value != theirs.value:
            raise UsageError(
                f"{one.scheduler} and {other.scheduler} disagree: {mine.source}={mine.value}, {theirs.source}={theirs.value}; "
                f"give --nnodes and --rdzv-endpoint, {REMEDY}"
            )


def take(args: Namespace, given: Collection[str], nodes: tuple[int, int] | None) -> None:
    """Complete a command line without options of the rendezvous.

    Args:
        args: the parsed command line. Modified in place.
        given: names of the options that the user gave.
        nodes: smallest and largest number of nodes, if the user gave ``--nnodes`` for several nodes.

    Raises:
        UsageError: a variable has an invalid value, two schedulers disagree, or ``--nnodes`` needs more nodes than the scheduler has.
    """
    if _is_in_worker():
        return  # a job of its own
    user = None if nodes is None else Taken(nodes[1], "--nnodes")
    found = find(os.environ, Surroundings(user, socket.gethostname, socket.getfqdn, flux.host_list))
    if found is None:
        return
    taken: list[str] = []
    if isinstance(found, Placement):
        _take_rendezvous(args, found, nodes, taken)
        is_first = found.rank.value == 0
    else:
        _check_alone(args, found, nodes)
        is_first = found.is_first
    if "nproc_per_node" not in given:
        _take_gpus(args, found.gpus, taken)
    if found.end_s is not None:
        os.environ[END_VARIABLE] = str(found.end_s.value)
    logger = get_logger(__name__)
    # One node speaks for all.
    log = logger.warning if is_first else logger.info
    if isinstance(found, Incomplete) and found.reason:
        log("%s: %s: ferrorun runs on this node alone; %s", found.scheduler, found.reason, found.remedy)
    if taken:
        log("%s: %s; --no-scheduler ignores these values", found.scheduler, ", ".join(taken))


def _is_in_worker() -> bool:
    """Return whether a worker of another agent started this process.

    The variables of a worker are not enough: a job that a worker submits inherits them.
    """
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
    while pid > 0:
        try:
            with open(f"/proc/{pid}/stat", errors="replace") as file:
                stat = file.read()
        except OSError:
            return False
        name, _, rest = stat.partition("(")[2].rpartition(")")
        if name == _AGENT_NAME:
            return True
        pid = int(rest.split()[1])
    return False


def _check_alone(args: Namespace, found: Incomplete, nodes: tuple[int, int] | None) -> None:
    """Check that a node without a place does not wait for others.

    Raises:
        UsageError: it would.
    """
    if nodes is not None and nodes[0] > 1 and found.reason:
        raise UsageError(
            f"{named('nnodes', args.nnodes)} waits for other nodes, but their place is unknown: {found.reason}; {found.remedy}"
        )


def _take_rendezvous(args: Namespace, placement: Placement, nodes: tuple[int, int] | None, taken: list[str]) -> None:
    most = placement.nodes.value if nodes is None else nodes[1]
    if most == 1:
        return  # the launcher uses a local rendezvous
    if nodes is None:
        args.nnodes = str(placement.nodes.value)
        taken.append(f"--nnodes={args.nnodes} ({placement.nodes.source})")
    elif nodes[0] > placement.nodes.value:
        raise UsageError(
            f"{named('nnodes', args.nnodes)} waits for {nodes[0]} nodes, but {placement.scheduler} has {placement.nodes.value} "
            f"({placement.nodes.source}); give --nnodes={placement.nodes.value}, {REMEDY}"
        )
    rank = placement.rank
    # First, so that an option of the user wins.
    options = [f"is_host={int(rank.value == 0)}"]
    if placement.nodes.value <= most:  # otherwise there are spares, which have no rank
        options.append(f"node_rank={rank.value}")
    args.rdzv_conf = ",".join([*options, *filter(None, [args.rdzv_conf])])
    args.rdzv_backend = "c10d"
    args.rdzv_id = placement.run_id.value
    args.rdzv_endpoint = endpoint_text(placement.host.value, placement.port.value)
    taken += [
        f"node rank {rank.value} ({rank.source})",
        f"--rdzv-id={args.rdzv_id} ({placement.run_id.source})",
        f"--rdzv-endpoint={args.rdzv_endpoint} ({placement.host.source}; port {placement.port.source})",
    ]


def _take_gpus(args: Namespace, gpus: Taken[int] | None, taken: list[str]) -> None:
    if gpus is None:
        return
    from ferroelastic import _devices

    count, source = gpus.value, gpus.source
    for variable in _devices.VISIBILITY_VARIABLES:
        # A user may have hidden some of the GPUs of the job.
        if variable in os.environ:
            visible = len(_devices.parse_visible_devices(os.environ[variable]))
            if visible < count:
                count, source = visible, variable
    if count > 0:
        args.nproc_per_node = str(count)
        taken.append(f"--nproc-per-node={count} ({source})")
