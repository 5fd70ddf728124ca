"""The rendezvous of a job with one node, of which nobody else knows the endpoint (``--standalone``).

torch sends such a job through the whole protocol for several nodes, with its delays and heartbeats. There is nobody to wait for here.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from ferroelastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)
from ferroelastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

if TYPE_CHECKING:
    from ferroelastic.rendezvous.api import RendezvousParameters

__all__ = ["SingleNodeRendezvous", "is_private"]

_ANY_PORT = 0


def is_private(params: RendezvousParameters) -> bool:
    """Whether no other node can take part: one node at most, and a port of this host that nobody knows beforehand."""
    host, port = parse_rendezvous_endpoint(params.endpoint, default_port=-1)
    return params.max_nodes == 1 and port == _ANY_PORT and _matches_machine_hostname(host)


class SingleNodeRendezvous(RendezvousHandler):
    """One node, one agent. Each round gives its workers a store of their own, which is empty.

    Args:
        params: ``run_id``, and ``local_addr`` for the address that workers find the store at (default ``localhost``).
    """

    renews_store = True
    """Each round has a store of its own: the agent need not see to that."""

    may_grow = False
    """``num_nodes_waiting`` is always 0: the agent need not ask."""

    def __init__(self, params: RendezvousParameters) -> None:
        self._run_id = params.run_id or str(uuid.uuid4())
        self._address = params.local_addr or "localhost"
        self._is_closed = False

    def get_backend(self) -> str:
        """``c10d``, as torch has it for this case."""
        return "c10d"

    @property
    def use_agent_store(self) -> bool:
        """The workers are clients of the agent's store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Begin a round; returns at once.

        Raises:
            RendezvousClosedError: :meth:`shutdown` or :meth:`set_closed` came before.
            ModuleNotFoundError: torch, which has the store, is not installed.
        """
        if self._is_closed:
            raise RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed")
        from ferroelastic import _torch

        store = _torch.start_worker_store()
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(self._address, store.port))

    def is_closed(self) -> bool:
        """Whether there will be no other round."""
        return self._is_closed

    def set_closed(self) -> None:
        """Allow no other round."""
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        """Nobody else can come."""
        return 0

    def get_run_id(self) -> str:
        """Return the id of the job."""
        return self._run_id

    def shutdown(self) -> bool:
        """Allow no other round."""
        self._is_closed = True
        return True
