"""The rendezvous of the agents of a job. Mirrors ``torch.distributed.elastic.rendezvous``.

Intended differences:

* Errors and data classes belong to this package. If torch is loaded, they are also instances of torch's classes.
* torch's handlers and plug-ins are loaded on first use, not at import.
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
