"""Assigns the ranks of the workers: from the rendezvous, from the node rank, or by agreement in the store."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ferroelastic.agent.server._workers import Worker, _RoleInstanceInfo
from ferroelastic.utils import _interruptible

if TYPE_CHECKING:
    from ferroelastic import _rust
    from ferroelastic.agent.server._workers import WorkerSpec

__all__ = ["agree_on_ranks", "assign_ranks"]

_IDENTICAL_ENV = "TORCH_ELASTIC_WORKER_IDENTICAL"

_ROLE_INFO_PREFIX = "torchelastic/role_info/"
_ASSIGNED_RANKS_PREFIX = "torchelastic/assigned_ranks/"


def assign_ranks(
    store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec, place: _rust.Place | None
) -> list[Worker]:
    """Return the workers of this node with their ranks.

    Args:
        store: the store of the round.
        group_rank: rank of this node.
        group_world_size: number of nodes.
        spec: specification of the workers.
        place: ranks that the rendezvous has assigned. If ``None``, the ranks are derived from ``group_rank`` if
            ``TORCH_ELASTIC_WORKER_IDENTICAL=1`` declares all nodes equal; otherwise the agents agree on them in the store.
    """
    size = spec.local_world_size
    if place is not None:
        first_rank, world_size = place.first_rank, place.world_size
        first_role_rank, role_world_size = place.first_role_rank, place.role_world_size
    elif os.environ.get(_IDENTICAL_ENV, "0") == "1":
        world_size = role_world_size = group_world_size * size
        first_rank = first_role_rank = group_rank * size
    else:
        own = _RoleInstanceInfo(spec.role, group_rank, size)
        first_rank, world_size, first_role_rank, role_world_size = agree_on_ranks(store, own, group_world_size)
    return [
        Worker(
            local_rank=local_rank,
            global_rank=first_rank + local_rank,
            role_rank=first_role_rank + local_rank,
            world_size=world_size,
            role_world_size=role_world_size,
        )
        for local_rank in range(size)
    ]


def agree_on_ranks(store: Any, own: _RoleInstanceInfo, group_world_size: int) -> tuple[int, int, int, int]:
    """Agree with the agents of all nodes on the ranks of the workers.

    Every agent stores the role and the number of its workers. Rank 0 reads all entries and stores the first ranks of each agent.

    Args:
        store: the store of the round.
        own: the workers of this node.
        group_world_size: number of nodes.

    Returns:
        For this node: first global rank, world size, first rank within the role, world size of the role.
    """
    store.set(f"{_ROLE_INFO_PREFIX}{own.rank}", own.serialize())
    if own.rank == 0:
        keys = [f"{_ROLE_INFO_PREFIX}{rank}" for rank in range(group_world_size)]
        _publish(store, [_RoleInstanceInfo.deserialize(info) for info in _interruptible.call(store.multi_get, keys)])
    first_rank, world_size, first_role_rank, role_world_size = json.loads(
        _interruptible.call(store.get, f"{_ASSIGNED_RANKS_PREFIX}{own.rank}")
    )
    return first_rank, world_size, first_role_rank, role_world_size


def _publish(store: Any, agents: list[_RoleInstanceInfo]) -> None:
    """Store the return value of :func:`agree_on_ranks` for each agent."""
    role_sizes: defaultdict[str, int] = defaultdict(int)
    for agent in agents:
        role_sizes[agent.role] += agent.local_world_size
    world_size = sum(role_sizes.values())
    next_rank = 0
    next_role_rank: defaultdict[str, int] = defaultdict(int)
    values = []
    for agent in agents:
        values.append(json.dumps([next_rank, world_size, next_role_rank[agent.role], role_sizes[agent.role]]))
        next_rank += agent.local_world_size
        next_role_rank[agent.role] += agent.local_world_size
    store.multi_set([f"{_ASSIGNED_RANKS_PREFIX}{rank}" for rank in range(len(agents))], values)
