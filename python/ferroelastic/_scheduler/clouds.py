"""SkyPilot and dstack: one command per node, with the rank, the number of nodes and the addresses in variables."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

__all__ = ["place_by_dstack", "place_by_skypilot"]


def place_by_skypilot(environ: Mapping[str, str], _: Surroundings) -> Placement | Incomplete | None:
    """Return the place of this node in a SkyPilot task; ``None`` outside of one.

    Raises:
        UsageError: a variable has an invalid value, or two variables disagree.
    """
    nodes, rank = number(environ, "SKYPILOT_NUM_NODES"), number(environ, "SKYPILOT_NODE_RANK")
    addresses, task = text(environ, "SKYPILOT_NODE_IPS"), text(environ, "SKYPILOT_TASK_ID")
    gpus = number(environ, "SKYPILOT_NUM_GPUS_PER_NODE")
    if nodes is None and rank is None and task is None:
        return None
    if nodes is None or rank is None or addresses is None or task is None:
        reason = missing(
            "SkyPilot",
            SKYPILOT_NUM_NODES=nodes,
            SKYPILOT_NODE_RANK=rank,
            SKYPILOT_NODE_IPS=addresses,
            SKYPILOT_TASK_ID=task,
        )
        return Incomplete("SkyPilot", reason, "give --rdzv-endpoint", is_first(rank), gpus=gpus)
    check_rank(rank, nodes)
    listed = addresses.value.split()
    if len(listed) != nodes.value:
        raise UsageError(
            f"{nodes.source}={nodes.value}, but {addresses.source} has {len(listed)} addresses; give --rdzv-endpoint, {REMEDY}"
        )
    return Placement(
        scheduler="SkyPilot",
        nodes=nodes,
        rank=rank,
        run_id=task,
        host=Taken(listed[0], f"the first address of {addresses.source}"),
        port=Taken(port_of_name(task.value), "from the id"),
        gpus=gpus,
    )


def place_by_dstack(environ: Mapping[str, str], _: Surroundings) -> Placement | Incomplete | None:
    """Return the place of this node in a dstack run; ``None`` outside of one.

    Raises:
        UsageError: a variable has an invalid value.
    """
    nodes, rank = number(environ, "DSTACK_NODES_NUM"), number(environ, "DSTACK_NODE_RANK")
    # The id of a run is unique, its name is not. Older versions set the name only.
    run_id = text(environ, "DSTACK_RUN_ID", "DSTACK_RUN_NAME")
    host = text(environ, "DSTACK_MASTER_NODE_IP")
    gpus = number(environ, "DSTACK_GPUS_PER_NODE")
    if nodes is None and rank is None:
        return None
    if nodes is not None and nodes.value == 1:
        return Incomplete("dstack", gpus=gpus)
    if nodes is None or rank is None or host is None or run_id is None:
        reason = missing(
            "dstack",
            DSTACK_NODES_NUM=nodes,
            DSTACK_NODE_RANK=rank,
            DSTACK_MASTER_NODE_IP=host,
            DSTACK_RUN_NAME=run_id,
        )
        return Incomplete("dstack", reason, "give --rdzv-endpoint", is_first(rank), gpus=gpus)
    check_rank(rank, nodes)
    port = Taken(port_of_name(run_id.value), "from the id")
    return Placement("dstack", nodes, rank, run_id, host, port, gpus)
