"""Mirror of ``torch.distributed.elastic.agent.server.api``.

Intended differences:

* The agent waits in one method, ``SimpleElasticAgent._wait_for_event``, which subclasses may override.
* Restarted workers start with an empty store (see ``ferroelastic.rendezvous._worker_store``).
* ``run()`` always shuts the workers down, with the agent's shutdown timeout. A signal during the shutdown does not skip it and changes
  neither its deadline nor the outcome. Signal handlers are installed for the run and restored after it.
* On a node that the rendezvous does not need, ``run()`` returns a successful result (torch returns ``None``).
* A stuck worker is a failure (torch's launcher exits with 0).
* Signals are handled at once even while the agent waits in the store.
* Errors for out-of-range values of a specification contain the value.
"""

from __future__ import annotations

import abc
import json
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import ferroelastic.utils.store as store_util
from ferroelastic import _signals
from ferroelastic._checks import check_number
from ferroelastic._compat import family
from ferroelastic._exit_codes import exit_code as _exit_code
from ferroelastic._signals import SignalException
from ferroelastic._text import format_current_traceback
from ferroelastic._timeouts import exit_barrier_timeout_s
from ferroelastic.agent.server._activity import Activity, cause_of, exit_code_of, failed_first_at_ns
from ferroelastic.agent.server._elastic_agent import DEFAULT_ROLE, ElasticAgent
from ferroelastic.agent.server._events import event_log_handler_of, is_read, log_round, status_event
from ferroelastic.agent.server._exit_barrier import wait_in_store
from ferroelastic.agent.server._explaining import Explainer
from ferroelastic.agent.server._ranks import assign_ranks
from ferroelastic.agent.server._reports import AgentReports
from ferroelastic.agent.server._restarts import Restarts
from ferroelastic.agent.server._shutdown import shut_down
from ferroelastic.agent.server._workers import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
    _RoleInstanceInfo,  # noqa: F401 - a name of torch's module
)
from ferroelastic.events import Event, EventSource, record
from ferroelastic.metrics import prof, put_metric
from ferroelastic.multiprocessing.errors import ProcessFailure
from ferroelastic.numa.binding import NumaOptions
from ferroelastic.rendezvous import RendezvousGracefulExitError
from ferroelastic.rendezvous._notifying import PlacedRendezvousInfo, notifier_of
from ferroelastic.rendezvous._worker_store import RenewedRendezvousInfo, next_rendezvous
from ferroelastic.utils._hostname import begin_look_up
from ferroelastic.utils._hostname import hostname_for_report as _get_fq_hostname
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ferroelastic import _rust
    from ferroelastic._failure.model import Failure
    from ferroelastic._stop_notice import StopReason
    from ferroelastic.rendezvous import RendezvousInfo
    from ferroelastic.rendezvous._notifying import Interruption, NotifyingRendezvous
    from ferroelastic.utils._store_types import Store

__all__ = [
    "ElasticAgent",
    "NumaOptions",
    "ProcessFailure",
    "RunResult",
    "SimpleElasticAgent",
    "Worker",
    "WorkerGroup",
    "WorkerSpec",
    "WorkerState",
]


_TERMINAL_STATE_SYNC_ID = "torchelastic/agent/terminal_state"

logger = get_logger(__name__)


class SimpleElasticAgent(ElasticAgent):
    """An agent for the workers of one role. Mirrors ``torch.distributed.elastic.agent.server.SimpleElasticAgent``.

    Args:
        spec: specification of the workers.
        exit_barrier_timeout: seconds to wait for the other agents after the workers of this node have succeeded. ``None`` uses
            ``$TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT``, else 300.
        shutdown_timeout: grace period in seconds between the stop signal and SIGKILL.

    Raises:
        TypeError: a timeout is not a number.
        ValueError: the timeout of the exit barrier (argument or variable) is negative or not a number.

    Attributes:
        job_exit_code: exit code of the job, equal on all nodes, after a failure without a restart left. ``None`` if the rendezvous reports
            none. Not in torch.
        restart_decision: reason of the last decision of the restart policy; ``None`` before a failure. Not in torch.
        job_failure: the explained failure of the job; ``None`` if it has not failed. Not in torch.
    """

    def __init__(self, spec: WorkerSpec, exit_barrier_timeout: float | None = None, shutdown_timeout: int = 30) -> None:
        check_number("shutdown_timeout", shutdown_timeout)
        self._worker_group = WorkerGroup(spec)
        self._remaining_restarts = spec.max_restarts
        self.job_exit_code: int | None = None
        self.job_failure: Failure | None = None
        self._store: Store | None = None
        self._exit_barrier_timeout = exit_barrier_timeout_s(exit_barrier_timeout)
        self._shutdown_timeout = shutdown_timeout
        self._total_execution_time = 0
        self._in_exit_barrier = False
        self._has_left_exit_barrier = False
        self._has_run = False
        self._activity = Activity()
        self._explainer = Explainer(self._worker_group, self._activity)
        self._restarts = Restarts(spec, self._activity, self._explainer.causes)
        self.restart_decision: str | None = None
        # Keeps the workers' store alive if this node hosts one outside of the handler.
        self._rdzv_info: RendezvousInfo | None = None

    def get_worker_group(self, role: str = DEFAULT_ROLE) -> WorkerGroup:  # noqa: ARG002 - there is one role
        """Return the workers."""
        return self._worker_group

    @abc.abstractmethod
    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start the workers and return their ids by local rank."""

    @abc.abstractmethod
    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Stop the workers in any state. There may be none."""

    @abc.abstractmethod
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Check the workers once and return their state."""

    @abc.abstractmethod
    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Stop the workers and release all resources, at the end of the run.

        Args:
            death_sig: first signal to the workers.
            timeout: grace period in seconds until the workers are killed.
        """

    def _wait_for_event(self, timeout_s: float) -> None:
        """Wait for the next check of the workers, at most ``timeout_s`` seconds.

        This implementation sleeps for the whole time. Subclasses that are notified of exits return earlier.
        """
        time.sleep(timeout_s)

    def _begin_stop(self, death_sig: signal.Signals, reason: StopReason, within_s: float | None = None) -> None:
        """Send the stop signal to the workers without waiting for them, if the agent supports it. The shutdown follows later.

        Args:
            death_sig: the signal.
            reason: reason of the stop, for the workers.
            within_s: seconds within which the workers must have ended; ``None`` leaves them the grace period.
        """

    def _outcome_before_signal(self) -> RunResult | None:
        """Return the result of the run if the run had ended before the first signal. The signal then does not change it."""
        return None

    @prof
    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Run a rendezvous with the other nodes and set its results: ranks, stores, the master's address."""
        spec = worker_group.spec
        with self.record_duration("RENDEZVOUS"):
            info = self._next_rendezvous(spec)
        master = info.bootstrap_store_info
        # An address in the specification is the address of the handler's store. It is not valid if the workers' store was moved.
        moved = isinstance(info, RenewedRendezvousInfo)
        master_addr = (not moved and spec.master_addr) or master.master_addr
        master_port = (not moved and spec.master_port) or master.master_port
        self._store = info.store
        if isinstance(info, PlacedRendezvousInfo):
            # Failures are counted for the whole job, so all nodes have the same restart count.
            self._remaining_restarts = max(0, spec.max_restarts - info.place.restarts_used)

        with self.record_duration("ASSIGN_WORKER_RANKS"):
            workers = self._assign_worker_ranks(info.store, info.rank, info.world_size, spec)
        worker_group.workers = workers
        worker_group.store = info.store
        worker_group.group_rank = info.rank
        worker_group.group_world_size = info.world_size
        worker_group.master_addr = master_addr
        worker_group.master_port = master_port

        log_round(worker_group, self._restart_count())

    def _restart_count(self) -> int:
        """Return the number of restarts after failures, for the whole job if the rendezvous counts them."""
        if isinstance(self._rdzv_info, PlacedRendezvousInfo):
            return self._rdzv_info.place.failures
        return self._worker_group.spec.max_restarts - self._remaining_restarts + self._restarts.given_back

    def _notifier(self) -> NotifyingRendezvous | None:
        """Return the rendezvous handler if it reports events of other nodes, else ``None``: torch's handlers are polled."""
        return notifier_of(self._worker_group.spec.rdzv_handler)

    def _next_rendezvous(self, spec: WorkerSpec) -> RendezvousInfo:
        notifier = self._notifier()
        if notifier is not None:
            notifier.introduce(spec.role, spec.local_world_size, spec.max_restarts, self._restarts.options())
        if "torch.distributed" in sys.modules:
            self._rdzv_info = next_rendezvous(spec.rdzv_handler, self._rdzv_info, local_addr=spec.local_addr)
        else:
            self._rdzv_info = spec.rdzv_handler.next_rendezvous()
        return self._rdzv_info

    @prof
    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Return the workers of this node with their ranks. See :func:`assign_ranks`."""
        info = self._rdzv_info
        place = info.place if isinstance(info, PlacedRendezvousInfo) else None
        return assign_ranks(store, group_rank, group_world_size, spec, place)

    @prof
    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        """Run a rendezvous and start the workers. There must be no running workers."""
        signalled = _signals.received()
        if signalled is not None:
            # Received during the preceding stop: do not start another round.
            raise signalled
        _signals.resume()
        spec = worker_group.spec
        logger.info("[%s] Rendezvous'ing worker group", spec.role)
        with self._activity.waiting("rendezvous"), self._activity.phase("rendezvous"):
            self._rendezvous(worker_group)
        logger.info("[%s] Starting worker group", spec.role)
        self._activity.busy("spawning")
        with self._activity.phase("spawn"):
            ids = self._start_workers(worker_group)
        for local_rank, worker_id in ids.items():
            worker = worker_group.workers[local_rank]
            worker.id = worker_id
            record(self._construct_event("START", EventSource.WORKER, worker), event_log_handler_of(spec))
        worker_group.state = WorkerState.HEALTHY
        self._restarts.begin_round()
        self._activity.started(worker_group.workers)

    @prof
    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Stop the workers, run a rendezvous and start the workers again."""
        logger.info("[%s] Stopping worker group", worker_group.spec.role)
        with self._activity.stopping():
            self._stop_workers(worker_group)
        worker_group.state = WorkerState.STOPPED
        with self._activity.waiting():
            self._restarts.wait()
        self._initialize_workers(worker_group)

    @prof
    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """Run the workers until they end, and restart them when they fail. See :meth:`ElasticAgent.run`."""
        begin_look_up()
        names = os.environ.get(_signals.SIGNALS_ENV, _signals.DEFAULT_SIGNALS)
        with _signals.Handling(names), self._activity.observed_by(AgentReports(self)):
            try:
                return self._explainer.explained(self, partial(self._run, role))
            finally:
                _signals.conclude()

    def _run(self, role: str) -> RunResult:
        start = time.monotonic()
        signalled: BaseException | None = None
        death_sig: signal.Signals | None = None
        interruption: BaseException | None
        is_unwinding = True
        try:
            self._begin_run()
            result = self._invoke_run(role)
            self._total_execution_time = int(time.monotonic() - start)
            self._record_metrics(result)
            self._record_worker_events(result)
            is_unwinding = False
        except family(RendezvousGracefulExitError) as error:
            logger.warning("Rendezvous gracefully exited: %s", error)
            result = RunResult(state=WorkerState.SUCCEEDED)
            is_unwinding = False
        except family(SignalException) as error:
            _signals.conclude()
            signalled, death_sig = error, error.sigval
            # Before the log message, because a log handler may block on its reader.
            notifier = self._notifier()
            if notifier is not None:
                notifier.say_farewell(f"its agent was ended by {error.sigval.name}", _exit_code(-error.sigval))
            self._begin_stop(error.sigval, "signal")
            logger.warning("Received %s death signal, shutting down workers", death_sig)
        finally:
            interruption, is_over = None, False
            while not is_over:
                # The loop has no function of its own: a signal handler can raise at the entry of a function, outside its `try`.
                try:
                    shut_down(self._shutdown, death_sig, self._shutdown_timeout, self._activity)
                    is_over = True
                except family(SignalException) as error:  # noqa: PERF203 - a loop over interruptions
                    logger.warning("Received %s death signal while shutting down", error.sigval)
                    interruption = error
            self._activity.idle()
            self._activity.took("total", time.monotonic() - start)
            # Also after an exception, whose event contains the time.
            self._total_execution_time = int(time.monotonic() - start)
            if interruption is not None and not is_unwinding:
                raise interruption
        if signalled is not None:
            outcome = self._outcome_before_signal()
            if outcome is None:
                raise signalled
            result = outcome
            self._record_metrics(result)
            self._record_worker_events(result)
        return result

    def _begin_run(self) -> None:
        """Reset the state of a previous run: each run is a new job with all its restarts."""
        if self._has_run:
            self._worker_group.state = WorkerState.INIT
            self._remaining_restarts = self._worker_group.spec.max_restarts
            self.job_exit_code = self.restart_decision = None
            self._has_left_exit_barrier = False
            self._restarts.begin_run()
        self._has_run = True
        notifier = self._notifier()
        if notifier is not None:
            notifier.begin()

    def get_event_failed(self) -> Event:
        """Return the event for a failed agent, with the traceback of the exception being handled."""
        return self._construct_event(state="FAILED", source=EventSource.AGENT, raw_error=format_current_traceback())

    def get_event_succeeded(self) -> Event:
        """Return the event for an agent that has completed its run."""
        return self._construct_event(state="SUCCEEDED", source=EventSource.AGENT)

    def _record_worker_events(self, result: RunResult) -> None:
        for worker in self._worker_group.workers:
            failure = result.failures.get(worker.global_rank)
            event = self._construct_event(
                state=self._get_worker_state(worker, result),
                source=EventSource.WORKER,
                worker=worker,
                raw_error=json.dumps(failure.error_file_data) if failure else None,
                exit_code=failure.exitcode if failure else None,
                worker_pid=failure.pid if failure else None,
            )
            record(event, event_log_handler_of(self._worker_group.spec))

    def _get_worker_state(self, worker: Worker, result: RunResult) -> str:
        if worker.global_rank in result.failures or worker.global_rank in result.return_values:
            return result.state.value
        if result.state in (WorkerState.UNHEALTHY, WorkerState.FAILED):
            return "TERMINATED"  # by the agent, because another worker failed
        raise ValueError(f"Unknown worker: {worker.global_rank}")

    @contextmanager
    def record_duration(self, state: str) -> Iterator[None]:
        """Send an event with the duration of a ``with`` block.

        Args:
            state: name of the measured phase.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            duration_ms = (time.perf_counter() - start) * 1000
            event = self._construct_event(state=state, source=EventSource.AGENT, duration_ms=duration_ms)
            record(event, event_log_handler_of(self._worker_group.spec))

    def _construct_event(
        self,
        state: str,
        source: EventSource,
        worker: Worker | None = None,
        raw_error: str | None = None,
        duration_ms: float | None = None,
        exit_code: int | None = None,
        worker_pid: int | None = None,
    ) -> Event:
        spec = self._worker_group.spec
        return status_event(
            self._worker_group,
            state,
            source,
            worker,
            exit_code=exit_code,
            worker_pid=worker_pid,
            # Without a listener the DNS lookup is skipped, which may take seconds.
            hostname=_get_fq_hostname() if is_read(event_log_handler_of(spec)) else socket.gethostname(),
            failure=self.job_failure if source == EventSource.AGENT else None,
            total_run_time=self._total_execution_time,
            remaining_restarts=self._remaining_restarts,
            raw_error=raw_error,
            duration_ms=duration_ms,
        )

    def _record_metrics(self, group_results: RunResult) -> None:
        is_failed = group_results.is_failed()
        self._record_flakiness_metric(is_failed)
        spec = self._worker_group.spec
        has_restarted = self._remaining_restarts != spec.max_restarts
        put_metric(f"workers.{spec.role}.run_total", 1)
        self._record_metric_with_condition("run_success_with_retries", not is_failed and has_restarted)
        self._record_metric_with_condition("run_success_no_retries", not is_failed and not has_restarted)
        self._record_metric_with_condition("run_failed_with_retries", is_failed and has_restarted)
        self._record_metric_with_condition("run_failed_no_retries", is_failed and not has_restarted)

    def _record_metric_with_condition(self, metric_name: str, condition: bool) -> None:
        put_metric(f"workers.{self._worker_group.spec.role}.{metric_name}", 1 if condition else 0)

    def _record_flakiness_metric(self, is_failed: bool = False) -> None:
        """Publish the percentage of used restarts."""
        spec = self._worker_group.spec
        unused = 0.0 if is_failed else 100.0 * (self._remaining_restarts + 1) / (spec.max_restarts + 1)
        put_metric(f"workers.{spec.role}.flakiness", int(100.0 - unused))

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        group = self._worker_group
        spec = group.spec
        role = spec.role
        logger.info("[%s] starting workers for entrypoint: %s", role, spec.get_entrypoint_name())
        self._initialize_workers(group)

        while True:
            if group.state == WorkerState.INIT:
                raise AssertionError(
                    f"workers of role {role!r} were not started: _initialize_workers left them in INIT"
                )
            with self._activity.waiting():
                self._wait_for_event(spec.monitor_interval)
            result = self._monitor_workers(group)
            state = result.state
            group.state = state
            put_metric(f"workers.{role}.remaining_restarts", self._remaining_restarts)
            put_metric(f"workers.{role}.{state.name.lower()}", 1)

            if state == WorkerState.SUCCEEDED:
                logger.info(
                    "[%s] worker group successfully finished. Waiting %s seconds for other agents to finish.",
                    *(role, self._exit_barrier_timeout),
                )
                if _signals.received() is not None:
                    _signals.conclude()  # the workers had already succeeded
                self._exit_barrier()
                interruption = self._interruption()
                if interruption is None:
                    return result
                self._restart_because_of(interruption)
            elif state in (WorkerState.UNHEALTHY, WorkerState.FAILED):
                if not self._restart_failed_workers(result):
                    return result
            elif state == WorkerState.HEALTHY:
                self._check_other_nodes()
            else:
                raise RuntimeError(f"[{role}] Worker group in {state.name} state")

    def _restart_failed_workers(self, result: RunResult) -> bool:
        """Restart the workers after a failure; if no restart is left, stop them and return ``False``."""
        group = self._worker_group
        spec = group.spec
        interruption = self._interruption()
        if interruption is not None and not interruption.is_failure:
            # The workers failed because another node was lost.
            self._restart_because_of(interruption)
            return True
        facts = self._restarts.facts(result, self._remaining_restarts)
        if (notifier := self._notifier()) is not None:
            self._report_failure(result, facts)
            self._begin_stop(signal.SIGTERM, "failure")
            if self._remaining_restarts <= 0:
                _signals.conclude()  # very likely final
            interruption = notifier.verdict()
            if interruption is not None and not interruption.is_failure:
                self._restart_because_of(interruption)
                return True
        # The host decides for all nodes. Workers of another node may have failed earlier.
        decision = interruption.decision if interruption is not None else self._restarts.decide(facts)
        is_final = interruption.is_final if interruption is not None else decision is None or decision.delay_s is None
        self.restart_decision = self._restarts.note(
            decision, cause_of(result) if interruption is None else interruption.text
        )
        if is_final:
            with self._activity.stopping():
                self._stop_workers(group)
            _signals.conclude()  # the outcome is final: signals do not change it
            self.job_exit_code = None if interruption is None else interruption.exit_code
            self._explainer.judged(interruption)
            self._activity.giving_up(cause_of(result))
            group.state = WorkerState.FAILED
            return False
        logger.info(
            "[%s] Worker group %s. %s/%s attempts left; will restart worker group",
            *(spec.role, result.state.name, self._remaining_restarts, spec.max_restarts),
        )
        # Before the counter: if a signal finds 0 and no restart, the failure is the outcome of the job.
        self._activity.is_restarting = True
        self._remaining_restarts = self._restarts.remaining(self._remaining_restarts)
        self._activity.restarting("failure", cause_of(result))
        self._restart_workers(group)
        return True

    def _check_other_nodes(self) -> None:
        """Restart the running workers if another node reports an event. Such a restart does not count."""
        group = self._worker_group
        spec = group.spec
        notifier = self._notifier()
        self._restarts.look_for_progress(notifier)
        if notifier is not None:
            interruption = notifier.interruption()
            if interruption is not None:
                self._restart_because_of(interruption)
            return
        waiting = spec.rdzv_handler.num_nodes_waiting()
        if waiting > 0:
            self._begin_stop(signal.SIGTERM, "membership")
            logger.info(
                "[%s] Detected %s new nodes from group_rank=%s; will restart worker group",
                *(spec.role, waiting, group.group_rank),
            )
            self._restarts.note_membership_change()
            self._activity.restarting("membership", f"{waiting} waiting to join")
            self._restart_workers(group)

    def _interruption(self) -> Interruption | None:
        """Return why the round has ended; ``None`` if it has not, or if the rendezvous reports no events."""
        notifier = self._notifier()
        return None if notifier is None else notifier.interruption()

    def _restart_because_of(self, interruption: Interruption) -> None:
        """Restart the workers because of an event on another node.

        Raises:
            JobFailedError: the job has ended, or no restart is left.
        """
        role = self._worker_group.spec.role
        self.restart_decision = self._restarts.note(interruption.decision, interruption.text)
        if interruption.is_final:
            raise interruption.as_error()
        cause: Literal["failure", "membership"] = "failure" if interruption.is_failure else "membership"
        self._begin_stop(signal.SIGTERM, cause, interruption.stop_within_s)
        logger.warning("[%s] %s; will restart worker group", role, interruption.text)
        self._activity.restarting(cause, interruption.text)
        self._restart_workers(self._worker_group)

    def _report_failure(self, result: RunResult, facts: _rust.FailureFacts) -> None:
        """Report failed workers of this node to the other nodes, if the rendezvous supports it."""
        if (notifier := self._notifier()) is not None:
            at_ns, cause = failed_first_at_ns(result) or time.time_ns(), cause_of(result)
            detail = self._explainer.detail(result) if self._restarts.may_be_final else ""
            notifier.report_failure(at_ns, cause, exit_code=exit_code_of(result), facts=facts, detail=detail)

    def _exit_barrier(self) -> None:
        """Wait until the agents of all nodes have reached the barrier, or the timeout has passed.

        If an agent exited earlier, its node would count as lost, and a store that it hosts would be closed.
        """
        timeout_s = self._exit_barrier_timeout
        if _signals.received() is not None:
            timeout_s = min(timeout_s, self._shutdown_timeout)
        logger.info(
            "Local worker group finished (%s). Waiting %s seconds for other agents to finish",
            self._worker_group.state,
            timeout_s,
        )
        start = time.monotonic()
        world_size: Any = self._worker_group.group_world_size
        notifier = self._notifier()
        barrier = partial(
            store_util.barrier,
            world_size=world_size,
            key_prefix=_TERMINAL_STATE_SYNC_ID,
            barrier_timeout=timeout_s,
        )

        self._in_exit_barrier = True
        try:
            with self._activity.waiting("exit barrier"):
                if notifier is not None:
                    notifier.wait_for_others(timeout_s)
                else:
                    wait_in_store(barrier, self._store, world_size)
            logger.info("Done waiting for other agents. Elapsed: %s seconds", time.monotonic() - start)
        except family(SignalException) as error:
            self._has_left_exit_barrier = world_size != 1
            logger.warning("Got termination signal: %s", error.sigval)
            raise
        except Exception:
            # The workers of this node have succeeded, even if other agents do not reach the barrier.
            logger.exception("Error waiting on exit barrier. Elapsed: %s seconds", time.monotonic() - start)
        finally:
            self._in_exit_barrier = False
