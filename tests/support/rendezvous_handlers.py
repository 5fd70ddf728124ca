"""Rendezvous handlers without other nodes."""

from __future__ import annotations

from tests.support.memory_store import MemoryStore

from ferroelastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo


class QuietHandler(RendezvousHandler):
    """A handler that never closes and has no waiting nodes. Subclasses define ``next_rendezvous``."""

    def get_backend(self) -> str:
        return "memory"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "run"

    def shutdown(self) -> bool:
        return True


class AloneRendezvous(QuietHandler):
    """Completes at once, with this node alone.

    Attributes:
        rounds: completed rounds.
        waiting: nodes that ``num_nodes_waiting`` reports until the next round.
        stops: calls of ``set_closed``.
    """

    use_agent_store = True
    renews_store = True
    may_grow = False

    def __init__(self) -> None:
        self.rounds = 0
        self.waiting = 0
        self.stops = 0

    def get_backend(self) -> str:
        return "alone"

    def next_rendezvous(self) -> RendezvousInfo:
        self.rounds += 1
        self.waiting = 0
        return RendezvousInfo(MemoryStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 4242))

    def num_nodes_waiting(self) -> int:
        return self.waiting

    def set_closed(self) -> None:
        self.stops += 1


class GrowingRendezvous(AloneRendezvous):
    """As ``AloneRendezvous``, but an agent polls ``num_nodes_waiting`` at its monitor interval."""

    may_grow = True
