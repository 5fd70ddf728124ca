"""Open MPI: ``mpirun -N 1 ferrorun``, in an allocation of Slurm.

No variable has the address of the node with rank 0: the addresses in the environment are those of ``mpirun`` and of the local daemon.
The host list of a Slurm allocation has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferroelastic._scheduler import slurm
from ferroelastic._scheduler.placement import (
    REMEDY,
    Incomplete,
    Placement,
    Taken,
    check_rank,
    number,
    port_of_name,
    text,
)
from ferroelastic._usage import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ferroelastic._scheduler.placement import Surroundings

__all__ = ["is_inner", "place"]


def is_inner(environ: Mapping[str, str]) -> bool:
    """Return whether ``mpirun`` started this process. The step of Slurm is then the step of mpirun's daemons, not of the job."""
    return bool(environ.get("OMPI_COMM_WORLD_SIZE") and environ.get("OMPI_COMM_WORLD_RANK"))


def place(environ: Mapping[str, str], _: Surroundings) -> Placement | Incomplete | None:
    """Return the place of this node among the processes of ``mpirun``; ``None`` outside of them.

    Raises:
        UsageError: a variable has an invalid value, a node has several processes, or Open MPI and Slurm disagree.
    """
    if not is_inner(environ):
        return None
    nodes, rank = number(environ, "OMPI_COMM_WORLD_SIZE"), number(environ, "OMPI_COMM_WORLD_RANK")
    if nodes is None or rank is None:
        return None
    on_node = number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if on_node is not None and on_node.value > 1:
        raise UsageError(
            f"{on_node.source}={on_node.value} agents run on this node, but the agent of a node starts all its workers; "
            f"run mpirun -N 1 ferrorun --nproc-per-node={on_node.value}, {REMEDY}"
        )
    check_rank(rank, nodes)
    job = slurm.job_number(environ)
    gpus = number(environ, "SLURM_GPUS_ON_NODE") if job is not None and environ.get("SLURMD_NODENAME") else None
    if nodes.value == 1:
        return Incomplete("Open MPI", nodes=nodes, rank=rank, gpus=gpus)
    listed = None if job is None else _hosts(environ, nodes, rank)
    if job is None or listed is None:
        reason = (
            f"Open MPI has {nodes.value} processes ({nodes.source}), but no variable has the address of the first one"
        )
        remedy = "give --nnodes, --rdzv-backend=c10d and --rdzv-endpoint"
        return Incomplete("Open MPI", reason, remedy, rank.value == 0, nodes, rank, gpus)
    # An allocation may have several mpiruns. PMIx gives each a namespace.
    namespace = text(environ, "PMIX_NAMESPACE") or Taken("mpi", "")
    run_id = Taken(f"{job.value}.{namespace.value}", ", ".join(filter(None, (job.source, namespace.source))))
    return Placement(
        scheduler="Open MPI in Slurm",
        nodes=nodes,
        rank=rank,
        run_id=run_id,
        host=Taken(listed.value[0], f"the first node of {listed.source}"),
        port=Taken(port_of_name(run_id.value), "from the id"),
        gpus=gpus,
        end_s=number(environ, "SLURM_JOB_END_TIME"),
    )


def _hosts(environ: Mapping[str, str], nodes: Taken[int], rank: Taken[int]) -> Taken[list[str]] | None:
    """Return the host list of Slurm that agrees with Open MPI; ``None`` without a list.

    Raises:
        UsageError: no list agrees.
    """
    name = text(environ, "SLURMD_NODENAME")
    found = None
    for variable in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        listed = slurm.hosts(environ, variable)
        if listed is None:
            continue
        found = listed
        if len(listed.value) == nodes.value and (name is None or listed.value[rank.value] == name.value):
            return listed
    if found is None:
        return None
    if len(found.value) != nodes.value:
        raise UsageError(
            f"{nodes.source}={nodes.value}, but {found.source} has {len(found.value)} hosts; run one process on each node, "
            f"mpirun -N 1 ferrorun, or srun ferrorun, {REMEDY}"
        )
    raise UsageError(
        f"{rank.source}={rank.value} is {found.value[rank.value]} in {found.source}, but this node is "
        f"{name.value if name else ''} (SLURMD_NODENAME); run srun ferrorun, or give --rdzv-endpoint, {REMEDY}"
    )
