"""Mirror of ``torch.distributed.elastic.rendezvous.api``.

Intended differences: the host name is looked up once per process, and a handler can declare that its store is empty in every round
(:attr:`RendezvousHandler.renews_store`) and that the agent need not poll it (:attr:`RendezvousHandler.may_grow`).
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
    """Base of all errors of a rendezvous."""


class RendezvousClosedError(RendezvousError):
    """The rendezvous is closed."""


class JobFailedError(RendezvousClosedError):
    """The job has failed, also for nodes whose own workers have not. Not in torch.

    Args:
        text: what happened first, and on which node.
        exit_code: that of the job, the same on all nodes.
    """

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class RendezvousTimeoutError(RendezvousError):
    """The rendezvous did not complete in time."""


class RendezvousConnectionError(RendezvousError):
    """The connection to the rendezvous backend failed."""


class RendezvousStateError(RendezvousError):
    """The state of the rendezvous is corrupt."""


class RendezvousGracefulExitError(RendezvousError):
    """This node is not needed and is to leave. Not a failure."""


@dataclass
class RendezvousStoreInfo(TorchCompatible):
    """Where the workers find their store. Mirrors ``torch.distributed.elastic.rendezvous.RendezvousStoreInfo``.

    Args:
        master_addr: host name or address.
        master_port: port.
    """

    MASTER_ADDR_KEY: ClassVar[str] = "MASTER_ADDR"
    MASTER_PORT_KEY: ClassVar[str] = "MASTER_PORT"
    master_addr: str
    master_port: int

    @staticmethod
    def build(rank: int, store: Store, local_addr: str | None, server_port: int | None = None) -> RendezvousStoreInfo:
        """Agree on an address through ``store``: rank 0 publishes its own, the others wait for it.

        Args:
            rank: rank of this node.
            store: the store of the round.
            local_addr: address of this node; by default its host name.
            server_port: port of the store that rank 0 hosts; by default one that is free right now.
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
        store: store that the agents share.
        rank: rank of this node.
        world_size: number of nodes.
        bootstrap_store_info: where the workers find their store.
    """

    def __init__(self, store: Store, rank: int, world_size: int, bootstrap_store_info: RendezvousStoreInfo) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._bootstrap_store_info = bootstrap_store_info

    @property
    def store(self) -> Store:
        """Store that the agents share."""
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
        """Where the workers find their store."""
        return self._bootstrap_store_info


class RendezvousHandler(TorchVirtual, ABC):
    """Finds the other nodes of a job. Mirrors ``torch.distributed.elastic.rendezvous.RendezvousHandler``."""

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
        """Join the next round; blocks until it is complete.

        Raises:
            RendezvousClosedError: the rendezvous is closed.
            RendezvousConnectionError: the connection to the backend failed.
            RendezvousStateError: the state is corrupt.
            RendezvousTimeoutError: it did not complete in time.
            RendezvousGracefulExitError: this node is not needed.
        """

    @abstractmethod
    def is_closed(self) -> bool:
        """Tell whether the rendezvous is closed: no further round will be. May lag behind :meth:`set_closed` elsewhere."""

    @abstractmethod
    def set_closed(self) -> None:
        """Close the rendezvous."""

    @abstractmethod
    def num_nodes_waiting(self) -> int:
        """Return how many nodes wait for the next round."""

    @abstractmethod
    def get_run_id(self) -> str:
        """Return the id of the run, which tells jobs apart."""

    @abstractmethod
    def shutdown(self) -> bool:
        """Close everything that was opened for the rendezvous; tell whether that went well."""


class RendezvousParameters:
    """What a handler is made from. Mirrors ``torch.distributed.elastic.rendezvous.RendezvousParameters``.

    Args:
        backend: name of the backend.
        endpoint: ``host[:port]``.
        run_id: id of the run.
        min_nodes: fewest nodes for a round.
        max_nodes: most nodes for a round.
        local_addr: address of this node.
        **kwargs: parameters of the backend, to be had as :attr:`config`.

    Raises:
        ValueError: the backend has no name, or the numbers of nodes make no sense.
        TypeError: a number of nodes is no number.
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
        """Return a parameter of the backend, or ``default``."""
        return self.config.get(key, default)

    def get_as_bool(self, key: str, default: bool | None = None) -> bool | None:
        """Return a parameter of the backend as a truth value, or ``default``.

        Raises:
            ValueError: it is none of 1, true, t, yes, y, 0, false, f, no, n.
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
        """Return a parameter of the backend as a number, or ``default``.

        Raises:
            ValueError: it is no number.
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
    """The backends by name. Mirrors ``torch.distributed.elastic.rendezvous.RendezvousHandlerRegistry``."""

    def __init__(self) -> None:
        self._registry: dict[str, RendezvousHandlerCreator] = {}

    @property
    def backends(self) -> set[str]:
        """Names of the registered backends. Not in torch."""
        return set(self._registry)

    def register(self, backend: str, creator: RendezvousHandlerCreator) -> None:
        """Add a backend.

        Args:
            backend: its name.
            creator: makes a handler from parameters.

        Raises:
            ValueError: the name is empty or taken.
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
        """Make the handler that the parameters ask for.

        Raises:
            ValueError: there is no such backend.
            RuntimeError: the handler names another backend as its own.
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
"""The registry that launchers use."""
