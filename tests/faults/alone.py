"""``ferrorun`` with a rendezvous that needs neither torch nor another node: ``python -m tests.faults.alone --rdzv-backend=alone ...``.

All the rest is the real thing. For faults that need many jobs, of which each would import torch for seconds.
"""

from __future__ import annotations

import sys

from tests.memory_store import MemoryStore

from ferroelastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo
from ferroelastic.rendezvous.api import rendezvous_handler_registry
from ferroelastic.run import cli


class AloneRendezvous(RendezvousHandler):
    """Completes at once, with this node alone."""

    use_agent_store = True
    renews_store = True
    may_grow = False

    def get_backend(self) -> str:
        return "alone"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(MemoryStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 4242))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "the-run"

    def shutdown(self) -> bool:
        return True


def main() -> int:
    """Run ``ferrorun`` and return its exit code."""
    rendezvous_handler_registry.register("alone", lambda _params: AloneRendezvous())
    return cli()


if __name__ == "__main__":
    sys.exit(main())
