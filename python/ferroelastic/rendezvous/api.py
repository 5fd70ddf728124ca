"""Mirror of ``torch.distributed.elastic.rendezvous.api``.

Intended differences:

* The host name is resolved once per process.
* A handler can declare that its store is empty in every round (:attr:`RendezvousHandler.renews_store`) and that the agent need not poll it
  (:attr:`RendezvousHandler.may_grow`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from ferroelastic._checks import check_number
from ferroelastic._compat import TorchCompatible, TorchVirtual
from ferroelastic.utils._hostname import fq_hostname
from ferroelastic.utils.distributed import get_free_port

if TYPE_CHECKING:
    from ferroelastic.utils._store_types import Store

__all__ = [
    "RendezvousClosedError",
    "RendezvousConnectionError",
    "RendezvousError",
    "RendezvousGracefulExitError",
    "RendezvousHandler",
    "RendezvousHandlerCreator",
    "RendezvousHandlerRegistry",
    "RendezvousInfo",
    "RendezvousParameters",
    "RendezvousStateError",
    "RendezvousStoreInfo",
    "RendezvousTimeoutError",
    "rendezvous_handler_registry",
]


class RendezvousError(TorchCompatible, Exception):
    """Base class of all rendezvous errors. Mirrors torch's class of this name."""


class RendezvousClosedError(RendezvousError):
    """The rendezvous is closed: there will be no further round. Mirrors torch's class of this name."""


class JobFailedError(RendezvousClosedError):
    """The job has failed, possibly because of a worker on another node. Not in torch.

    Args:
        text: first failure and its node.
        exit_code: exit code of the job, the same on all nodes.
        detail: the explained failure, as the node of the failure reported it.
        is_loss: whether the loss of a node has ended the job.
    """

    def __init__(self, text: str, exit_code: int = 1, *, detail: str = "", is_loss: bool = False) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.detail = detail
        self.is_loss = is_loss


class RendezvousTimeoutError(RendezvousError):
    """The rendezvous did not complete within its timeout. Mirrors torch's class of this name."""


class RendezvousConnectionError(RendezvousError):
    """The connection to the rendezvous backend failed. Mirrors torch's class of this name."""


class RendezvousStateError(RendezvousError):
    """The state of the rendezvous is corrupt. Mirrors torch's class of this name."""


class RendezvousGracefulExitError(RendezvousError):
    """The job does not need this node, so its agent ends. Not a failure. Mirrors torch's class of this name."""


@dataclass
class RendezvousStoreInfo(TorchCompatible):
    """Address of the workers' store. Mirrors ``torch.distributed.elastic.rendezvous.RendezvousStoreInfo``.

    Args:
        master_addr: host name or address of the store.
        master_port: port of the store.
    """

    MASTER_ADDR_KEY: ClassVar[str] = "MASTER_ADDR"
    MASTER_PORT_KEY: ClassVar[str] = "MASTER_PORT"
    master_addr: str
    master_port: int

    @staticmethod
    def build(rank: int, store: Store, local_addr: str | None, server_port: int | None = None) -> RendezvousStoreInfo:
        """Publish the address of rank 0 through ``store``; other ranks wait for it.

        Args:
            rank: rank of this node.
            store: store of the round.
            local_addr: address of this node; its host name by default.
            server_port: port of the workers' store on rank 0; a free port by default.

        Returns:
            The address of rank 0.
        """
        if rank == 0:
            store.set(RendezvousStoreInfo.MASTER_ADDR_KEY, (local_addr or fq_hostname()).encode())
            store.set(RendezvousStoreInfo.MASTER_PORT_KEY, str(server_port or get_free_port()).encode())
        return RendezvousStoreInfo(
            master_addr=store.get(RendezvousStoreInfo.MASTER_ADDR_KEY).decode(),
            master_port=int(store.get(RendezvousStoreInfo.MASTER_PORT_KEY)),
        )


class RendezvousInfo(TorchCompatible):
    """Outcome of a round. Mirrors ``torch.distributed.elastic.rendezvous.RendezvousInfo``.

    Args:
        store: store of the agents.
        rank: rank of this node.
        world_size: number of nodes.
        bootstrap_store_info: address of the workers' store.
    """

    def __init__(self, store: Store, rank: int, world_size: int, bootstrap_store_info: RendezvousStoreInfo) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._bootstrap_store_info = bootstrap_store_info

    @property
    def store(self) -> Store:
        """Store of the agents."""
        return self._store

    @property
    def rank(self) -> int:
        """Rank of this node."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of nodes."""
        return self._world_size

    @property
    def bootstrap_store_info(self) -> RendezvousStoreInfo:
        """Address of the workers' store."""
        return self._bootstrap_store_info


class RendezvousHandler(TorchVirtual, ABC):
    """Base class of rendezvous handlers. Mirrors ``torch.distributed.elastic.rendezvous.RendezvousHandler``."""

    @abstractmethod
    def get_backend(self) -> str:
        """Return the name of the backend."""

    @property
    def use_agent_store(self) -> bool:
        """Whether the workers use a store that an agent hosts."""
        return False

    @property
    def renews_store(self) -> bool:
        """Whether the workers' store is empty at the start of every round. If not, the agent empties it. Not in torch."""
        return False

    @property
    def may_grow(self) -> bool:
        """Whether nodes can join later without notification, so that the agent has to poll :meth:`num_nodes_waiting`. Not in torch."""
        return True

    @abstractmethod
    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round and wait until it is complete.

        Returns:
            Rank of this node, number of nodes and stores of the round.

        Raises:
            RendezvousClosedError: the rendezvous is closed.
            RendezvousConnectionError: the connection to the backend failed.
            RendezvousStateError: the state is corrupt.
            RendezvousTimeoutError: the round did not complete within its timeout.
            RendezvousGracefulExitError: the job does not need this node.
        """

    @abstractmethod
    def is_closed(self) -> bool:
        """Return whether the rendezvous is closed. The result may lag behind :meth:`set_closed` on another node."""

    @abstractmethod
    def set_closed(self) -> None:
        """Close the rendezvous: there will be no further round."""

    @abstractmethod
    def num_nodes_waiting(self) -> int:
        """Return the number of nodes that wait for the next round."""

    @abstractmethod
    def get_run_id(self) -> str:
        """Return the run id, which identifies the job."""

    @abstractmethod
    def shutdown(self) -> bool:
        """Release all resources of the rendezvous; return whether this succeeded."""


class RendezvousParameters:
    """Parameters of a rendezvous handler. Mirrors ``torch.distributed.elastic.rendezvous.RendezvousParameters``.

    Args:
        backend: name of the backend.
        endpoint: address of the backend as ``host[:port]``.
        run_id: run id of the job.
        min_nodes: minimum number of nodes of a round.
        max_nodes: maximum number of nodes of a round.
        local_addr: address of this node.
        **kwargs: options of the backend, stored in ``config``.

    Raises:
        ValueError: the name of the backend is empty, ``min_nodes`` is less than 1, or ``max_nodes`` is less than ``min_nodes``.
        TypeError: ``min_nodes`` or ``max_nodes`` is not a number.
    """

    def __init__(
        self,
        backend: str,
        endpoint: str,
        run_id: str,
        min_nodes: int,
        max_nodes: int,
        local_addr: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not backend:
            raise ValueError("The rendezvous backend name must be a non-empty string.")
        check_number("min_nodes of the rendezvous", min_nodes, "a number of nodes")
        check_number("max_nodes of the rendezvous", max_nodes, "a number of nodes")
        if min_nodes < 1:
            raise ValueError(f"The minimum number of rendezvous nodes ({min_nodes}) must be greater than zero.")
        if max_nodes < min_nodes:
            raise ValueError(
                f"The maximum number of rendezvous nodes ({max_nodes}) must be greater than or equal to the minimum "
                f"number of rendezvous nodes ({min_nodes})."
            )
        self.backend = backend
        self.endpoint = endpoint
        self.run_id = run_id
        self.min_nodes = min_nodes
        self.max_nodes = max_nodes
        self.config = kwargs
        self.local_addr = local_addr

    def get(self, key: str, default: Any = None) -> Any:
        """Return an option of the backend, or ``default`` if it is not set."""
        return self.config.get(key, default)

    def get_as_bool(self, key: str, default: bool | None = None) -> bool | None:
        """Return an option of the backend as a boolean, or ``default`` if it is not set.

        Raises:
            ValueError: the value is not one of 1, true, t, yes, y, 0, false, f, no, n.
        """
        value = self.get(key, default)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | str):
            text = str(value).lower()
            if text in {"1", "true", "t", "yes", "y"}:
                return True
            if text in {"0", "false", "f", "no", "n"}:
                return False
        raise ValueError(f"The rendezvous configuration option '{key}' does not represent a valid boolean value.")

    def get_as_int(self, key: str, default: int | None = None) -> int | None:
        """Return an option of the backend as an integer, or ``default`` if it is not set.

        Raises:
            ValueError: the value is not an integer.
        """
        value = self.get(key, default)
        if value is None:
            return None
        try:
            return int(value)
        except ValueError as error:
            raise ValueError(
                f"The rendezvous configuration option '{key}' does not represent a valid integer value."
            ) from error


RendezvousHandlerCreator: TypeAlias = Callable[[RendezvousParameters], RendezvousHandler]


class RendezvousHandlerRegistry:
    """Registry of backends. Mirrors ``torch.distributed.elastic.rendezvous.RendezvousHandlerRegistry``."""

    def __init__(self) -> None:
        self._registry: dict[str, RendezvousHandlerCreator] = {}

    @property
    def backends(self) -> set[str]:
        """Names of the registered backends. Not in torch."""
        return set(self._registry)

    def register(self, backend: str, creator: RendezvousHandlerCreator) -> None:
        """Register a backend.

        Args:
            backend: name of the backend.
            creator: function that creates a handler from :class:`RendezvousParameters`.

        Raises:
            ValueError: the name is empty, or registered with another creator.
        """
        if not backend:
            raise ValueError("The rendezvous backend name must be a non-empty string.")
        current = self._registry.get(backend, creator)
        if current != creator:
            raise ValueError(
                f"The rendezvous backend '{backend}' cannot be registered with '{creator}' as it is already registered "
                f"with '{current}'."
            )
        self._registry[backend] = creator

    def create_handler(self, params: RendezvousParameters) -> RendezvousHandler:
        """Create the handler of a backend.

        Args:
            params: parameters of the rendezvous; ``params.backend`` names the backend.

        Raises:
            ValueError: the backend is not registered.
            RuntimeError: ``get_backend()`` of the handler returns another name.
        """
        creator = self._registry.get(params.backend)
        if creator is None:
            raise ValueError(
                f"The rendezvous backend '{params.backend}' is not registered. Did you forget to call `register`?"
            )
        handler = creator(params)
        if handler.get_backend() != params.backend:
            raise RuntimeError(
                f"The rendezvous backend '{handler.get_backend()}' does not match the requested backend '{params.backend}'."
            )
        return handler


rendezvous_handler_registry = RendezvousHandlerRegistry()
"""Registry of the built-in backends."""
