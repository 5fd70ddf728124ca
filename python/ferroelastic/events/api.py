"""Mirror of ``torch.distributed.elastic.events.api``; no intended differences."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TypeAlias

from ferroelastic._compat import TorchCompatible, family

__all__ = ["Event", "EventMetadataValue", "EventSource", "NodeState", "RdzvEvent"]

EventMetadataValue: TypeAlias = str | int | float | bool | None


class EventSource(str, Enum):
    """Producer of an event."""

    AGENT = "AGENT"
    WORKER = "WORKER"


@dataclass
class Event(TorchCompatible):
    """An event of a job. Mirrors ``torch.distributed.elastic.events.Event``.

    Args:
        name: name of the event.
        source: producer of the event.
        timestamp: time of the event in milliseconds.
        metadata: further data.
    """

    name: str
    source: EventSource
    timestamp: int = 0
    metadata: dict[str, EventMetadataValue] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.serialize()

    @staticmethod
    def deserialize(data: str | Event) -> Event:
        """Return the event that :meth:`serialize` turned into ``data``. An event is returned unchanged.

        Args:
            data: JSON text, or an event.

        Raises:
            ValueError: ``data`` is not JSON.
            KeyError: the source is unknown or missing.
            TypeError: ``data`` has other fields than an event, or is neither text nor an event.
        """
        if isinstance(data, family(Event)):
            event: Event = data
            return event
        fields = json.loads(data)  # type: ignore[arg-type]  # the type checker cannot follow family()
        fields["source"] = EventSource[fields["source"]]
        return Event(**fields)

    def serialize(self) -> str:
        """Return the event as JSON."""
        return json.dumps(asdict(self))


class NodeState(str, Enum):
    """State of a node in a rendezvous."""

    INIT = "INIT"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


@dataclass
class RdzvEvent(TorchCompatible):
    """An event of a rendezvous. Mirrors ``torch.distributed.elastic.events.RdzvEvent``.

    Args:
        name: name of the event.
        run_id: id of the run.
        message: description of the event.
        hostname: host name of the node.
        pid: process id of the node.
        node_state: state of the node.
        master_endpoint: endpoint of the rendezvous store, if known.
        rank: rank of the node, if known.
        local_id: id of the node within its process, if it has one.
        error_trace: traceback of an error.
    """

    name: str
    run_id: str
    message: str
    hostname: str
    pid: int
    node_state: NodeState
    master_endpoint: str = ""
    rank: int | None = None
    local_id: int | None = None
    error_trace: str = ""

    def __str__(self) -> str:
        return self.serialize()

    @staticmethod
    def deserialize(data: str | RdzvEvent) -> RdzvEvent:
        """Return the event that :meth:`serialize` turned into ``data``. An event is returned unchanged.

        Args:
            data: JSON text, or an event.

        Raises:
            ValueError: ``data`` is not JSON.
            KeyError: the state is unknown or missing.
            TypeError: ``data`` has other fields than an event, or is neither text nor an event.
        """
        if isinstance(data, family(RdzvEvent)):
            event: RdzvEvent = data
            return event
        fields = json.loads(data)  # type: ignore[arg-type]  # the type checker cannot follow family()
        fields["node_state"] = NodeState[fields["node_state"]]
        return RdzvEvent(**fields)

    def serialize(self) -> str:
        """Return the event as JSON."""
        return json.dumps(asdict(self))
