"""Sends events to their destinations."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from ferroelastic._compat import torch_module
from ferroelastic._text import format_current_traceback
from ferroelastic.events.api import NodeState, RdzvEvent
from ferroelastic.utils._hostname import hostname_for_report
from ferroelastic.utils.log_level import chosen_log_level

if TYPE_CHECKING:
    from ferroelastic.events.api import Event

_events_loggers: dict[str, logging.Logger] = {}


def _get_or_create_logger(destination: str = "null") -> logging.Logger:
    """Return the logger of a destination, with its handler attached. Its records do not propagate.

    Raises:
        KeyError: no handler is registered under that name.
    """
    logger = _events_loggers.get(destination)
    if logger is None:
        # Looked up in the package, because programs replace it there.
        from ferroelastic import events

        handler = events.get_logging_handler(destination)
        logger = logging.getLogger(f"torchelastic-events-{destination}")
        logger.setLevel(chosen_log_level("INFO"))
        logger.propagate = False
        # torch's events module uses loggers with the same names. A second handler would write each event twice.
        if destination not in getattr(torch_module(events.__name__), "_events_loggers", {}):
            logger.addHandler(handler)
        _events_loggers[destination] = logger
    return logger


def has_listener(destination: str) -> bool:
    """Return whether a destination has a listener. If not, expensive fields of an event need not be determined.

    Raises:
        KeyError: no handler is registered under that name.
    """
    return not all(isinstance(handler, logging.NullHandler) for handler in _get_or_create_logger(destination).handlers)


def record(event: Event, destination: str = "null") -> None:
    """Send an event to a destination. Mirrors ``torch.distributed.elastic.events.record``.

    Args:
        event: the event.
        destination: name of a handler, see :func:`ferroelastic.events.handlers.get_logging_handler`.

    Raises:
        KeyError: no handler is registered under that name.
    """
    if has_listener(destination):
        _get_or_create_logger(destination).info(event.serialize())


def record_rdzv_event(event: RdzvEvent) -> None:
    """Send an event to the destination ``"dynamic_rendezvous"``."""
    _get_or_create_logger("dynamic_rendezvous").info(event.serialize())


def construct_and_record_rdzv_event(
    run_id: str,
    message: str,
    node_state: NodeState,
    name: str = "",
    hostname: str = "",
    pid: int | None = None,
    master_endpoint: str = "",
    local_id: int | None = None,
    rank: int | None = None,
) -> None:
    """Create an event of a rendezvous and send it to ``"dynamic_rendezvous"``, if that destination has a listener.

    Args:
        run_id: id of the run.
        message: description of the event.
        node_state: state of the node. With ``FAILED`` the event contains the current traceback.
        name: name of the event. Default: name of the calling function.
        hostname: host name of the node. Default: name of this host.
        pid: process id of the node. Default: id of this process.
        master_endpoint: endpoint of the rendezvous store, if known.
        local_id: id of the node within its process, if it has one.
        rank: rank of the node, if known.
    """
    from ferroelastic import events

    if isinstance(events.get_logging_handler("dynamic_rendezvous"), logging.NullHandler):
        return

    caller = sys._getframe(1).f_code  # noqa: SLF001 - inspect.stack() would read every source file on the stack
    trace = format_current_traceback() if node_state == NodeState.FAILED else ""
    event = RdzvEvent(
        name=f"{os.path.basename(caller.co_filename)}:{name or caller.co_name}",
        run_id=run_id,
        message=message,
        hostname=hostname or hostname_for_report(),
        pid=pid or os.getpid(),
        node_state=node_state,
        master_endpoint=master_endpoint,
        rank=rank,
        local_id=local_id,
        error_trace=trace,
    )
    events.record_rdzv_event(event)
