"""Mirror of ``torch.distributed.elastic.rendezvous``: how the agents of a job find each other.

Intended differences: errors and data are classes of this package (and torch's too, where torch is loaded); torch's handlers and
out-of-tree ones are loaded when one is asked for, not at import.
"""

from ferroelastic.rendezvous import registry as _registry  # noqa: F401 - registers the built-in backends
from ferroelastic.rendezvous.api import (
    JobFailedError,
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousHandlerCreator,
    RendezvousHandlerRegistry,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

__all__ = [
    "JobFailedError",
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
