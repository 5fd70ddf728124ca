"""``ferrorun`` with a rendezvous that needs neither torch nor another node: ``python -m tests.faults.alone --rdzv-backend=alone ...``.

All the rest is the real thing. For faults that need many jobs, of which each would import torch for seconds.
"""

from __future__ import annotations

import sys

from tests.support.rendezvous_handlers import AloneRendezvous

from ferroelastic.rendezvous.api import rendezvous_handler_registry
from ferroelastic.run import cli


def main() -> int:
    """Run ``ferrorun`` and return its exit code."""
    rendezvous_handler_registry.register("alone", lambda _params: AloneRendezvous())
    return cli()


if __name__ == "__main__":
    sys.exit(main())
