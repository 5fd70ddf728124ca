"""Gives the workers of every round an empty store.

Workers publish their addresses under keys in a store. A restarted worker must not read the keys of the failed attempt, but with torch's
handlers it can. This module has three remedies:

* ``DynamicRendezvousHandler`` (c10d, etcd-v2): its attributes for the first store are reset, so it starts a new store in each round.
* ``StaticTCPRendezvous``: the store must stay, because the user chose its port. Rank 0 deletes the workers' keys after all agents have
  joined, because all previous workers have ended then. Before torch 2.10 a store cannot list its keys, and the next remedy applies.
* Other handlers that return the address of the previous round: rank 0 starts a store and publishes its address in the returned store.

The last two remedies need an agreement between the nodes. The number of the round is counted in the store, because an agent may be a
replacement that has not seen the previous rounds.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ferroelastic._compat import family
from ferroelastic.rendezvous import _torch_handlers
from ferroelastic.rendezvous._notifying import renews_store
from ferroelastic.rendezvous._store_server import start_store
from ferroelastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from ferroelastic.rendezvous.utils import _matches_machine_hostname
from ferroelastic.utils import _interruptible
from ferroelastic.utils._hostname import fq_hostname
from ferroelastic.utils.logging import get_logger
from ferroelastic.utils.store import DistStoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferroelastic import _rust
    from ferroelastic.rendezvous.api import RendezvousHandler

__all__ = ["RenewedRendezvousInfo", "next_rendezvous"]

logger = get_logger(__name__)

_KEYS = "ferroelastic/worker_store"
_AGENT_KEYS = "torchelastic/"
_ROUND = f"{_KEYS}/round"


class RenewedRendezvousInfo(RendezvousInfo):
    """Outcome of a round with another workers' store than the handler returned.

    Args:
        info: result of the handler.
        bootstrap_store_info: address of the workers' store.
        server: the store if this node hosts it. It ends with this object.
    """

    def __init__(
        self, info: RendezvousInfo, bootstrap_store_info: RendezvousStoreInfo, server: _rust.StoreServer | None
    ) -> None:
        super().__init__(info.store, info.rank, info.world_size, bootstrap_store_info)
        self.handler_address = _address(info)
        self.server = server


def next_rendezvous(
    handler: RendezvousHandler, previous: RendezvousInfo | None, *, local_addr: str | None = None
) -> RendezvousInfo:
    """Join the next round with an empty store for the workers.

    Args:
        handler: the handler.
        previous: result of the previous call; ``None`` in the first round. It keeps the store of the previous round alive.
        local_addr: address of this node, for a store on this node; its host name by default.

    Returns:
        Outcome of the round.

    Raises:
        RendezvousTimeoutError: not all nodes of the round arrived within the store's timeout.
        RendezvousConnectionError: the connection to the store was lost.
        RendezvousError: ``next_rendezvous()`` of the handler raised it.
    """
    if not handler.use_agent_store or renews_store(handler):
        return handler.next_rendezvous()
    if _torch_handlers.starts_stores(handler):
        return _torch_handlers.join_with_new_store(handler)

    info = handler.next_rendezvous()
    if info.bootstrap_store_info is None:
        return info
    has_fixed_port = _torch_handlers.has_fixed_port(handler)
    if has_fixed_port:
        store = _torch_handlers.listing_store(info.store)
        if store is not None:
            _empty_store(store, handler.get_run_id(), info)
            return info
    return _move_store(info, previous, local_addr=local_addr, has_fixed_port=has_fixed_port)


def _empty_store(store: Any, run_id: str, info: RendezvousInfo) -> None:
    """Delete the workers' keys of the previous round, and the agents' keys for rank assignment and the exit barrier."""
    arrival = _arrive(info, is_stale=False)
    if arrival.round == 0:
        # A new store. No wait is needed, because the agents wait for each other at the assignment of ranks.
        if arrival.is_last:
            info.store.add(_ROUND, 1)
        return

    prefix = f"{run_id}/"
    current_round = f"{_KEYS}/{arrival.round}/"

    def delete_keys() -> str:
        deleted = 0
        for key in store.list_keys():
            name = key.removeprefix(prefix)
            is_agent_key = name != key
            is_stale = (
                name.startswith((_AGENT_KEYS, f"{_KEYS}/")) and name != _ROUND and not name.startswith(current_round)
            )
            if not is_agent_key or is_stale:
                deleted += store.delete_key(key)
        logger.info("deleted %d keys of the workers' store of run %s for its round %d", deleted, run_id, arrival.round)
        return "emptied"

    _prepare_together(info, arrival, delete_keys)


def _move_store(
    info: RendezvousInfo,
    previous: RendezvousInfo | None,
    *,
    local_addr: str | None,
    has_fixed_port: bool,
) -> RendezvousInfo:
    """Let rank 0 start a store if any node got the address of the previous round again."""
    given = _address(info)
    is_stale = previous is not None and given == _handler_address(previous)
    servers: list[_rust.StoreServer] = []

    def start() -> str:
        if has_fixed_port or (local_addr is None and _matches_machine_hostname(given[0])):
            host = given[0]
        else:
            host = local_addr or fq_hostname()
        _delete_rank_keys(info)
        servers.append(start_store())
        return f"{host}:{servers[0].port}"

    def start_if_stale() -> str:
        return start() if info.store.add(_stale_key(arrival.round), 0) else f"{given[0]}:{given[1]}"

    if info.world_size == 1:
        answer = start() if is_stale else ""
    else:
        arrival = _arrive(info, is_stale=is_stale)
        answer = _prepare_together(info, arrival, start_if_stale)
    host, _, port = answer.rpartition(":")
    if not answer or (host, int(port)) == given:
        return info
    return RenewedRendezvousInfo(info, RendezvousStoreInfo(host, int(port)), servers[0] if servers else None)


def _handler_address(info: RendezvousInfo) -> tuple[str, int]:
    """Return the address from the handler, also if the workers use another store."""
    return info.handler_address if isinstance(info, RenewedRendezvousInfo) else _address(info)


def _address(info: RendezvousInfo) -> tuple[str, int]:
    bootstrap = info.bootstrap_store_info
    return bootstrap.master_addr, int(bootstrap.master_port)


def _delete_rank_keys(info: RendezvousInfo) -> None:
    """Delete the agents' keys of the previous round if the store supports it. Their names are the same in every round."""
    names = [f"{_AGENT_KEYS}agent/terminal_state/{name}" for name in ("num_members", "last_member")]
    for kind in ("role_info", "assigned_ranks"):
        names += [f"{_AGENT_KEYS}{kind}/{rank}" for rank in range(info.world_size)]
    store: Any = info.store
    with suppress(AttributeError, NotImplementedError, RuntimeError):
        for name in names:
            store.delete_key(name)


class _Arrival(NamedTuple):
    """The arrival of this node in a round."""

    round: int
    is_last: bool


def _stale_key(number: int) -> str:
    return f"{_KEYS}/{number}/stale"


def _arrived_key(number: int, rank: int) -> str:
    return f"{_KEYS}/{number}/arrived/{rank}"


def _complete_key(number: int) -> str:
    return f"{_KEYS}/{number}/complete"


def _arrive(info: RendezvousInfo, *, is_stale: bool) -> _Arrival:
    """Publish the arrival of this node. A rank counts once, even if its agent is replaced while other nodes arrive."""
    store = info.store
    number = store.add(_ROUND, 0)
    if is_stale:
        store.add(_stale_key(number), 1)
    is_last = False
    if store.add(_arrived_key(number, info.rank), 1) == 1:
        is_last = store.add(f"{_KEYS}/{number}/arrivals", 1) == info.world_size
        if is_last:
            store.set(_complete_key(number), "1")
    return _Arrival(number, is_last)


def _prepare_together(info: RendezvousInfo, arrival: _Arrival, prepare: Callable[[], str]) -> str:
    """Wait until all nodes have arrived, and let rank 0 prepare the workers' store.

    Returns:
        The result of ``prepare`` on rank 0, on all nodes.

    Raises:
        RendezvousTimeoutError: not all nodes arrived within the store's timeout.
        RendezvousConnectionError: the connection to the store was lost.
    """
    store = info.store
    done = f"{_KEYS}/{arrival.round}/done"
    try:
        if info.rank == 0:
            _interruptible.call(store.wait, [_complete_key(arrival.round)])
            answer = prepare()
            # Count the round first: a node that has the answer may join the next round immediately.
            store.add(_ROUND, 1)
            store.set(done, answer)
            return answer
        _interruptible.call(store.wait, [done])
        return store.get(done).decode()
    except RuntimeError as error:
        if not isinstance(error, family(DistStoreError)):
            raise RendezvousConnectionError(
                f"the connection to the store of the rendezvous failed during the reset of the workers' store: {error}"
            ) from error
        missing = [rank for rank in range(info.world_size) if not store.add(_arrived_key(arrival.round, rank), 0)]
        raise RendezvousTimeoutError(
            f"nodes {missing or [0]} of {info.world_size} did not join the reset of the workers' store within "
            f"{store.timeout.total_seconds():g} s: check that their agents run and restart too"
        ) from error
