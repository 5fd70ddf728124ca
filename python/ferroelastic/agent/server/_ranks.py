"""How agents agree on the ranks of their workers in the store, where the rendezvous has not said them."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from ferroelastic.agent.server._workers import _RoleInstanceInfo
from ferroelastic.utils import interruptible

__all__ = ["agree_on_ranks"]

_ROLE_INFO_PREFIX = "torchelastic/role_info/"
_ASSIGNED_RANKS_PREFIX = "torchelastic/assigned_ranks/"


def agree_on_ranks(store: Any, own: _RoleInstanceInfo, group_world_size: int) -> tuple[int, int, int, int]:
    """Agree with the agents of all nodes on the ranks of the workers.

    Every agent says in the store how many workers of which role it has; rank 0 reads them all and writes each agent's first ranks.

    Args:
        store: the store of the round.
        own: the workers of this node.
        group_world_size: number of nodes.

    Returns:
        For this node: its first global rank, the world size, its first rank within the role, the size of the role.
    """
    store.set(f"{_ROLE_INFO_PREFIX}{own.rank}", own.serialize())
    if own.rank == 0:
        keys = [f"{_ROLE_INFO_PREFIX}{rank}" for rank in range(group_world_size)]
        _publish(store, [_RoleInstanceInfo.deserialize(info) for info in interruptible.call(store.multi_get, keys)])
    first_rank, world_size, first_role_rank, role_world_size = json.loads(
        interruptible.call(store.get, f"{_ASSIGNED_RANKS_PREFIX}{own.rank}")
    )
    return first_rank, world_size, first_role_rank, role_world_size


def _publish(store: Any, agents: list[_RoleInstanceInfo]) -> None:
    """Write what :func:`agree_on_ranks` returns, for each agent."""
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
