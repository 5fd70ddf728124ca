"""Mirror of ``torch.distributed.elastic.events``: structured events through Python's logging.

Intended differences:

* Handlers that are registered with torch's events module are found too.
* A logger to which torch has already added its handler does not get a second one.
* An event is not serialised if its destination has no listener.
* The host name is looked up once per process.
"""

from ferroelastic.events._record import (
    _events_loggers,
    _get_or_create_logger,
    construct_and_record_rdzv_event,
    record,
    record_rdzv_event,
)
from ferroelastic.events.api import Event, EventMetadataValue, EventSource, NodeState, RdzvEvent
from ferroelastic.events.handlers import get_logging_handler

__all__ = [
    "Event",
    "EventMetadataValue",
    "EventSource",
    "NodeState",
    "RdzvEvent",
    "_events_loggers",
    "_get_or_create_logger",
    "construct_and_record_rdzv_event",
    "get_logging_handler",
    "record",
    "record_rdzv_event",
]
