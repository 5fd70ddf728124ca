"""The barrier at the end of a job, in the store of the agents. For handlers with torch's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferroelastic.utils import _interruptible

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["wait_in_store"]


def wait_in_store(barrier: Callable[..., None], store: Any, world_size: int) -> None:
    """Wait until all agents have reached a barrier. Signal handlers run during the wait.

    Args:
        barrier: :func:`ferroelastic.utils.store.barrier` with all arguments except the store.
        store: store of the agents.
        world_size: number of agents.

    Raises:
        DistStoreError: an agent did not reach the barrier in time. Also raised as torch's class.
    """
    if world_size == 1:  # no other agent to wait for
        barrier(store=store)
    else:
        _interruptible.call(barrier, store=_own_connection(store))


def _own_connection(store: Any) -> Any:
    """Return a clone of ``store`` with a connection of its own, or ``store`` if it cannot be cloned.

    A connection serves one request at a time. During a wait, the heartbeats that the rendezvous sends through the same store would be
    delayed, and the other agents would declare this node lost.
    """
    try:
        return store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):
        return store
