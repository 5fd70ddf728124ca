"""Events and metrics about the phases, decisions and exits of a run.

The durations are those of :class:`Activity`, which also reports them to the health server. Not in torch.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from ferroelastic._compat import newer
from ferroelastic.agent.server._events import event_log_handler_of, is_read
from ferroelastic.events import EventSource, record
from ferroelastic.metrics import put_metric

if TYPE_CHECKING:
    from ferroelastic import _rust
    from ferroelastic.agent.server._workers import Worker

__all__ = ["AgentReports"]

_PREFIX = "ferroelastic"


class AgentReports:
    """Records the measurements of one run as events and metrics.

    The events have the fields of torch's events about an agent. Their metadata also has ``round``, the number of the round on this node,
    counted from 1, and the fields of the event.

    Args:
        agent: the ``SimpleElasticAgent`` of the run.
    """

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._round = 0
        self._reported: set[tuple[int, int]] = set()

    def took(self, phase: str, duration_s: float) -> None:
        """Record the duration of a phase: the event ``ferroelastic.phase`` and the metric ``phase.<phase>.duration.ms``."""
        if phase == "rendezvous":
            self._round += 1
        put_metric(f"phase.{phase}.duration.ms", int(duration_s * 1000))
        self._record("phase", phase=phase, duration_ms=duration_s * 1000)

    def decided(self, cause: str, reason: str, *, restarts: bool) -> None:
        """Record a decision: the event ``ferroelastic.decision``."""
        why = newer(self._agent, "restart_decision", None)  # of a restart policy
        self._record("decision", cause=cause, reason=reason, decision="restart" if restarts else "end", why=why)

    def ended(self, exits: list[_rust.Exit], workers: list[Worker]) -> None:
        """Record the exits of a round, once each: the event ``ferroelastic.exit``."""
        by_pid = {worker.id: worker for worker in workers}
        for ended in exits:
            worker = by_pid.get(ended.pid)
            if worker is None or (ended.pid, ended.monotonic_ns) in self._reported:
                continue
            self._record(
                "exit",
                worker,
                local_rank=worker.local_rank,
                worker_pid=ended.pid,
                exit_code=ended.code,
                signal=None if ended.signal is None else _signal_name(ended.signal),
                core_dumped=ended.core_dumped,
                stopped=ended.stopped,
                order=ended.order,
                exit_time_ns=ended.realtime_ns,
                max_rss_bytes=ended.max_rss_bytes,
                cpu_time_s=ended.user_time_s + ended.system_time_s,
            )
        self._reported = {(ended.pid, ended.monotonic_ns) for ended in exits}

    def _record(self, name: str, worker: Worker | None = None, **fields: Any) -> None:
        destination = event_log_handler_of(self._agent.get_worker_group().spec)
        if is_read(destination):
            source = EventSource.AGENT if worker is None else EventSource.WORKER
            event = self._agent._construct_event(name.upper(), source, worker)  # noqa: SLF001 - reports of this agent
            event.name = f"{_PREFIX}.{name}"
            event.metadata.update(round=self._round, **fields)
            record(event, destination)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)
