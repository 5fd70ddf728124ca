"""Events of an agent, with the same fields as torch's events."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ferroelastic._compat import newer
from ferroelastic.events import Event, EventSource
from ferroelastic.events._record import has_listener
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from ferroelastic._failure.model import Failure
    from ferroelastic.agent.server._workers import Worker, WorkerGroup

__all__ = ["event_log_handler_of", "is_read", "log_round", "status_event", "watchdog_event"]

logger = get_logger("ferroelastic.agent.server.api")


def event_log_handler_of(settings: Any) -> str:
    """Return the name of the handler for events.

    Args:
        settings: a specification of workers or a configuration, of this package's or of torch's class. Before 2.8 torch's have no handler.
    """
    name: str = newer(settings, "event_log_handler", "null")
    return name


def is_read(destination: str) -> bool:
    """Return whether events for a destination reach a reader.

    Args:
        destination: name of a handler.
    """
    try:
        return has_listener(destination)
    except KeyError:
        return True  # recording the event raises the error


def log_round(group: WorkerGroup, restart_count: int) -> None:
    """Log the result of a rendezvous.

    Args:
        group: the workers of this node, with their ranks.
        restart_count: number of restarts after failures.
    """
    workers = group.workers
    logger.info(
        "[%s] Rendezvous complete for workers. Result:\n"
        "  restart_count=%s\n  master_addr=%s\n  master_port=%s\n  group_rank=%s\n  group_world_size=%s\n"
        "  local_ranks=%s\n  role_ranks=%s\n  global_ranks=%s\n  role_world_sizes=%s\n  global_world_sizes=%s\n"
        "  event_log_handler=%s\n",
        group.spec.role,
        restart_count,
        group.master_addr,
        group.master_port,
        group.group_rank,
        group.group_world_size,
        [worker.local_rank for worker in workers],
        [worker.role_rank for worker in workers],
        [worker.global_rank for worker in workers],
        [worker.role_world_size for worker in workers],
        [worker.world_size for worker in workers],
        event_log_handler_of(group.spec),
    )


def status_event(
    group: WorkerGroup,
    state: str,
    source: EventSource,
    worker: Worker | None,
    *,
    exit_code: int | None,
    worker_pid: int | None,
    duration_ms: float | None,
    failure: Failure | None = None,
    **common: Any,
) -> Event:
    """Return an event about the state of the agent or of one worker.

    Args:
        group: the workers of this node.
        state: the state.
        source: the agent or a worker.
        worker: the worker, if the event is about one.
        exit_code: exit code of a failed worker.
        worker_pid: process id of a failed worker.
        duration_ms: duration in milliseconds, if the event has one.
        failure: the explained failure of the job. ``metadata`` has it as ``failure``.
        common: see :func:`_metadata`.
    """
    details: dict[str, Any] = {
        "group_world_size": group.group_world_size,
        "entry_point": group.spec.get_entrypoint_name(),
    }
    if worker:
        # Tuples of one element, as in torch's events.
        details["local_rank"] = (worker.local_rank,)
        details["role_rank"] = (worker.role_rank,)
        details["role_world_size"] = (worker.role_world_size,)
        details["exit_code"] = (exit_code,)
        details["worker_pid"] = (worker_pid,)
    if failure is not None:
        from ferroelastic._failure.model import to_dict

        details["failure"] = to_dict(failure)
    metadata = _metadata(group, worker, state=state, details=details, **common)
    metadata["duration_ms"] = duration_ms
    return Event(name=f"torchelastic.worker.status.{state}", source=source, metadata=metadata)


def watchdog_event(group: WorkerGroup, name: str, request: Any | None, **common: Any) -> Event:
    """Return an event about an action of the watchdog.

    Args:
        group: the workers of this node.
        name: the action.
        request: the request of a worker that the action is about, if there is one.
        common: see :func:`_metadata`.
    """
    details = {"watchdog_event": name}
    if request is not None:
        details["worker_pid"] = str(request.worker_pid)
        details["scope_id"] = request.scope_id
        details["expiration_time"] = str(request.expiration_time)
        details["signal"] = str(request.signal)
    metadata = _metadata(group, None, state="RUNNING", details=details, **common)
    return Event(name=name, source=EventSource.AGENT, metadata=metadata)


def _metadata(
    group: WorkerGroup,
    worker: Worker | None,
    *,
    state: str,
    details: dict[str, Any],
    hostname: str,
    total_run_time: int,
    remaining_restarts: int,
    raw_error: str | None = None,
) -> dict[str, Any]:
    """Return the metadata of an event.

    Args:
        group: the workers of this node.
        worker: the worker, if the event is about one.
        state: the state.
        details: serialised as JSON.
        hostname: name of this host.
        total_run_time: seconds that the agent has run.
        remaining_restarts: restarts that are left.
        raw_error: text of an error.
    """
    spec = group.spec
    return {
        "run_id": spec.rdzv_handler.get_run_id(),
        "global_rank": worker.global_rank if worker else None,
        "group_rank": group.group_rank,
        "worker_id": str(worker.id) if worker else None,
        "role": spec.role,
        "hostname": hostname,
        "state": state,
        "total_run_time": total_run_time,
        "rdzv_backend": spec.rdzv_handler.get_backend(),
        "raw_error": raw_error,
        "metadata": json.dumps(details),
        "agent_restarts": spec.max_restarts - remaining_restarts,
    }
