"""Kubernetes: an Indexed Job, whose pods find each other through a headless service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferroelastic._scheduler.placement import Incomplete, Placement, Taken, check_rank, number, port_of_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ferroelastic._scheduler.placement import Surroundings

__all__ = ["place"]


def place(environ: Mapping[str, str], surroundings: Surroundings) -> Placement | Incomplete | None:
    """Return the place of this pod in an Indexed Job; ``None`` outside of one.

    The environment does not have the number of completions: ``--nnodes`` gives it. The host name of a pod is the name of the job and the
    index. With a subdomain the fully qualified name has the headless service.

    Raises:
        UsageError: the index is not a number, or not below the number of nodes.
    """
    index = number(environ, "JOB_COMPLETION_INDEX")
    if index is None:
        return None
    nodes = surroundings.nodes
    if nodes is None:
        reason = f"{index.source}={index.value} is an index of an Indexed Job, whose number of pods is not in the environment"
        remedy = "give --nnodes with the job's completions, or --standalone"
        return Incomplete("Kubernetes", reason, remedy, index.value == 0)
    check_rank(index, nodes)
    name = surroundings.hostname().partition(".")[0]
    job = name.removesuffix(f"-{index.value}")
    if job == name:
        reason = (
            f"the host name {name!r} does not end with -{index.value} ({index.source}), so the first pod is unknown"
        )
        return Incomplete("Kubernetes", reason, "give --rdzv-endpoint", index.value == 0)
    domain = surroundings.fqdn().partition(".")[2]
    if not domain:
        reason = f"the pod {name!r} has no subdomain, so other pods cannot find it"
        remedy = "add a headless service and spec.subdomain with its name, or give --rdzv-endpoint"
        return Incomplete("Kubernetes", reason, remedy, index.value == 0)
    return Placement(
        scheduler="Kubernetes",
        nodes=nodes,
        rank=index,
        run_id=Taken(job, "host name"),
        host=Taken(f"{job}-0.{domain}", "host name and subdomain"),
        port=Taken(port_of_name(job), "from the id"),
    )
