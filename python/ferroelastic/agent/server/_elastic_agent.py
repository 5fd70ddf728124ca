"""The interface of agents."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from ferroelastic._compat import TorchVirtual

if TYPE_CHECKING:
    from ferroelastic.agent.server._workers import RunResult, WorkerGroup

__all__ = ["DEFAULT_ROLE", "ElasticAgent"]

DEFAULT_ROLE = "default"


class ElasticAgent(TorchVirtual, abc.ABC):
    """Starts and supervises workers. Mirrors ``torch.distributed.elastic.agent.server.ElasticAgent``."""

    @abc.abstractmethod
    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """Run the workers until they end, and restart them when they fail.

        Args:
            role: role of the workers.

        Returns:
            The outcome of the workers of this node.

        Raises:
            SignalException: this process got a signal that ends it; the workers have ended.
            RendezvousError: the rendezvous failed.
        """

    @abc.abstractmethod
    def get_worker_group(self, role: str = DEFAULT_ROLE) -> WorkerGroup:
        """Return the workers of a role. The result may change while the agent runs."""
