"""Slurm: one task of a job step per node (``srun --ntasks-per-node=1 ferrorun``)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ferroelastic._scheduler.hostlist import expand
from ferroelastic._scheduler.placement import (
    REMEDY,
    Incomplete,
    Placement,
    Taken,
    check_rank,
    missing,
    number,
    port_of_number,
    text,
)
from ferroelastic._usage import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ferroelastic._scheduler.placement import Surroundings

__all__ = ["hosts", "job_number", "place"]

_JOB = ("SLURM_JOB_ID", "SLURM_JOBID")
_STEP = ("SLURM_STEP_ID", "SLURM_STEPID")
_JOB_HOSTS = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
# Slurm numbers the batch script, the shell of salloc and similar steps from here. Each has one process.
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0


def place(environ: Mapping[str, str], _: Surroundings) -> Placement | Incomplete | None:
    """Return the place of this node in a job step; ``None`` outside of a job.

    Raises:
        UsageError: a variable has an invalid value, two variables disagree, or a node has several tasks.
    """
    job = job_number(environ)
    if job is None:
        return None
    step = number(environ, *_STEP)
    end_s = number(environ, "SLURM_JOB_END_TIME")
    # Only slurmd sets the node's name: a shell of salloc on a login node has no GPUs of the job.
    is_on_node = bool(environ.get("SLURMD_NODENAME"))
    gpus = number(environ, "SLURM_GPUS_ON_NODE") if is_on_node else None
    listed = hosts(environ, "SLURM_STEP_NODELIST", *_JOB_HOSTS)
    if step is None or step.value >= _FIRST_SPECIAL_STEP or _is_elsewhere(environ, listed):
        reason = _outside_of_step(environ, job)
        return Incomplete(
            "Slurm", reason, "run srun ferrorun for all nodes, or give --standalone", gpus=gpus, end_s=end_s
        )
    _check_tasks(environ)
    nodes = number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    rank = number(environ, "SLURM_NODEID")
    if nodes is None or rank is None or listed is None:
        reason = missing("Slurm", SLURM_STEP_NUM_NODES=nodes, SLURM_NODEID=rank, SLURM_STEP_NODELIST=listed)
        return Incomplete("Slurm", reason, "run srun ferrorun, or give --rdzv-endpoint", gpus=gpus, end_s=end_s)
    check_rank(rank, nodes)
    _check_hosts(environ, listed, nodes, rank)
    restarts = number(environ, "SLURM_RESTART_COUNT")
    run_id = f"{job.value}.{step.value}"
    source = f"{job.source}, {step.source}"
    if restarts is not None and restarts.value:
        # A requeued job keeps its number. Agents of the former run may still end.
        run_id, source = f"{run_id}.{restarts.value}", f"{source}, {restarts.source}"
    return Placement(
        scheduler="Slurm",
        nodes=nodes,
        rank=rank,
        run_id=Taken(run_id, source),
        host=Taken(listed.value[0], f"the first node of {listed.source}"),
        port=_port(environ, job.value, step.value),
        gpus=gpus,
        end_s=end_s,
    )


def job_number(environ: Mapping[str, str]) -> Taken[int] | None:
    """Return the number of the job, or ``None`` outside of a job.

    Raises:
        UsageError: it is not a number.
    """
    return number(environ, *_JOB)


def hosts(environ: Mapping[str, str], *env_names: str) -> Taken[list[str]] | None:
    """Return the expanded host list of the first of the variables that is set, or ``None``.

    Raises:
        UsageError: the list is malformed.
    """
    found = text(environ, *env_names)
    if found is None:
        return None
    try:
        return Taken(expand(found.value), found.source)
    except ValueError as error:
        raise UsageError(
            f"{found.source}={found.value!r} is not a host list: {error}; give --rdzv-endpoint, {REMEDY}"
        ) from None


def _is_elsewhere(environ: Mapping[str, str], listed: Taken[list[str]] | None) -> bool:
    """Return whether the step does not have this node. A batch script that a step submitted inherits the variables of that step."""
    name = environ.get("SLURMD_NODENAME")
    return bool(name) and listed is not None and name not in listed.value


def _outside_of_step(environ: Mapping[str, str], job: Taken[int]) -> str:
    nodes = number(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    if nodes is None or nodes.value == 1:
        return ""
    return f"job {job.value} has {nodes.value} nodes ({nodes.source}), but this process is not in a step of it (SLURM_STEP_ID)"


def _check_tasks(environ: Mapping[str, str]) -> None:
    """Check that each node has one task.

    Raises:
        UsageError: a node has several tasks.
    """
    tasks = text(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if tasks is None:
        return
    # For example 2(x3),1: three nodes with two tasks, one node with one.
    counts = [re.fullmatch(r"([0-9]+)(?:\(x[0-9]+\))?", part) for part in tasks.value.split(",")]
    if not all(counts):
        raise UsageError(f"{tasks.source}={tasks.value!r} is not a list of numbers such as 1(x4); unset it, {REMEDY}")
    most = max(int(count[1]) for count in counts if count)
    if most > 1:
        raise UsageError(
            f"{tasks.source}={tasks.value} starts {most} agents on one node, but the agent of a node starts all its workers; "
            f"run srun --ntasks-per-node=1 ferrorun --nproc-per-node={most}, {REMEDY}"
        )


def _check_hosts(environ: Mapping[str, str], listed: Taken[list[str]], nodes: Taken[int], rank: Taken[int]) -> None:
    """Check that the host list has the number of nodes, and this node at its rank.

    Raises:
        UsageError: the variables disagree.
    """
    if len(listed.value) != nodes.value:
        raise UsageError(
            f"{nodes.source}={nodes.value}, but {listed.source} has {len(listed.value)} hosts; give --rdzv-endpoint, {REMEDY}"
        )
    name = text(environ, "SLURMD_NODENAME")
    if name is not None and listed.value[rank.value] != name.value:
        raise UsageError(
            f"{name.source}={name.value}, but node {rank.value} ({rank.source}) of {listed.source} is {listed.value[rank.value]}; "
            f"run srun ferrorun in this job, or give --rdzv-endpoint, {REMEDY}"
        )


def _port(environ: Mapping[str, str], job: int, step: int) -> Taken[int]:
    """Return a port that Slurm has reserved for the step (``srun --resv-ports``), else one from the numbers of job and step.

    Raises:
        UsageError: the reserved ports are malformed.
    """
    reserved = text(environ, "SLURM_STEP_RESV_PORTS")
    if reserved is None:
        return Taken(port_of_number(job, step), "from the id")
    found = re.match(r"([0-9]{1,5})(?=[-,]|$)", reserved.value)
    if found is None:
        raise UsageError(f"{reserved.source}={reserved.value!r} is not a list of ports; give --rdzv-endpoint, {REMEDY}")
    return Taken(int(found[1]), reserved.source)
