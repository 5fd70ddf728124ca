"""The agent of one host. Mirrors ``torch.distributed.elastic.agent.server.local_elastic_agent``.

Intended differences:

* The agent is notified of exits. ``monitor_interval`` applies only where polling is needed: for stuck workers, or for a rendezvous that reports no events.
* The shutdown timeout is the grace period in all cases: for the peers of a failed worker, for a restart, and after a signal.
* The health server runs from the start of the agent to its end, including restarts. The agent is alive while its loop makes progress and
  no worker outlives a missed deadline.
* A worker that is stuck in the kernel is reported as a failure, and the job ends with an error. torch ends it with exit code 0.
* One watchdog serves all attempts. An expired timer is a failure of its worker. The report contains the timer's scope and the worker's
  Python stack. torch's watchdog also ends the agent.
"""

from __future__ import annotations

import os
import signal
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from ferroelastic import _leftovers, _signals
from ferroelastic._checks import check_logs_specs, check_signal_target
from ferroelastic._compat import newer
from ferroelastic._wait import wait_for_event
from ferroelastic._warm import warm_workers_of
from ferroelastic.agent.server import _environment, _stuck, _watchdog
from ferroelastic.agent.server._detached import handle_helpers
from ferroelastic.agent.server._events import event_log_handler_of, watchdog_event
from ferroelastic.agent.server._progress import Heartbeats
from ferroelastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from ferroelastic.agent.server.health_check_server import (
    HealthCheckServer,
    _AliveCallbackProxy,  # noqa: F401 - a name of torch's module
    create_healthcheck_server,
)
from ferroelastic.events import handlers, record
from ferroelastic.metrics.api import prof
from ferroelastic.multiprocessing import LogsSpecs, PContext, ProcessFailure, _debuggers, _launch, start_processes
from ferroelastic.multiprocessing._stopping import longest_stop_s
from ferroelastic.multiprocessing.errors._failures import exit_of
from ferroelastic.rendezvous._notifying import may_grow
from ferroelastic.utils import macros
from ferroelastic.utils._hostname import hostname_for_report
from ferroelastic.utils.logging import get_logger
from ferroelastic.utils.process_state import is_uninterruptible_state, read_proc_state

if TYPE_CHECKING:
    from ferroelastic import _rust
    from ferroelastic._stop_notice import SignalTarget, StopReason
    from ferroelastic.multiprocessing._log_options import LogOptions

__all__ = [
    "TORCHELASTIC_ENABLE_FILE_TIMER",
    "TORCHELASTIC_HEALTH_CHECK_PORT",
    "TORCHELASTIC_TIMER_FILE",
    "TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT",
    "LocalElasticAgent",
]

logger = get_logger(__name__)

TORCHELASTIC_ENABLE_FILE_TIMER = "TORCHELASTIC_ENABLE_FILE_TIMER"
"""Environment variable: ``1`` starts the watchdog of workers."""
TORCHELASTIC_HEALTH_CHECK_PORT = "TORCHELASTIC_HEALTH_CHECK_PORT"
"""Environment variable: port of the health server. No server is started if it is not set."""
TORCHELASTIC_TIMER_FILE = "TORCHELASTIC_TIMER_FILE"
"""Environment variable: path of the watchdog's named pipe. A path is generated if it is not set."""
TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT = _stuck.TIMEOUT_ENV
"""Environment variable: seconds that a worker may be in uninterruptible sleep. No limit if unset, not a number or not positive."""

_HEALTH_TIMEOUT_S = 60
_KILL_TIME_S = 0.25
"""Upper bound of the time from SIGKILL to the end of a worker, for workers that must have ended by a deadline."""


_resolve_uninterruptible_state_timeout = _stuck.resolve_timeout_s  # torch's name
_read_wait_channel = _stuck.read_wait_channel


def _added(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that differ from their defaults."""
    return {name: value for name, value in arguments.items() if value not in (None, "group")}


class LocalElasticAgent(SimpleElasticAgent):
    """Runs the workers of one host. Mirrors torch's ``LocalElasticAgent``.

    With ``TORCHELASTIC_ENABLE_FILE_TIMER=1`` in the environment, workers can set deadlines for themselves through a named pipe. Its path is
    ``$TORCHELASTIC_TIMER_FILE``, which is generated if it is not set, and is passed to the workers. When a deadline expires, the agent
    collects evidence of all workers for up to ``$FERROELASTIC_EVIDENCE_S`` seconds (default 2, 0 for none) and stores it in their log
    folders.

    Args:
        spec: specification of the workers.
        logs_specs: destination of the workers' output.
        start_method: ``spawn``, ``fork`` or ``forkserver``, for function entrypoints.
        exit_barrier_timeout: seconds to wait at the end for the agents of other hosts; ``None`` as for :class:`SimpleElasticAgent`.
        log_line_prefix_template: prefix of teed lines, with ``${role_name}``, ``${rank}``, ``${local_rank}``, ``${hostname}`` (the short
            name). Not in torch: ``${pid}``, ``${round}`` (number of restarts after failures), ``${time}`` (of the line; ISO 8601, UTC).
        shutdown_timeout: grace period in seconds between the stop signal and SIGKILL.
        health_check_server: a started server, used instead of a new one on ``$TORCHELASTIC_HEALTH_CHECK_PORT``. The agent stops it.
        uninterruptible_state_timeout: seconds that a worker may be in uninterruptible sleep before the job is ended. 0 means no limit,
            ``None`` uses ``$TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT``.
        interactive_rank: local rank of the worker with the terminal as standard input, ``None`` for no worker. Not in torch.
        log_options: options for the lines of the workers. ``None`` for torch's behaviour. Not in torch.
        grace_signal_target: receivers of the stop signal: ``"group"`` or ``"leader"``, see :class:`PContext`. Not in torch.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        start_method: str = "spawn",
        exit_barrier_timeout: float | None = None,
        log_line_prefix_template: str | None = None,
        shutdown_timeout: int = 30,
        health_check_server: HealthCheckServer | None = None,
        uninterruptible_state_timeout: float | None = None,
        *,
        interactive_rank: int | None = None,
        log_options: LogOptions | None = None,
        grace_signal_target: SignalTarget = "group",
    ) -> None:
        super().__init__(spec, exit_barrier_timeout, shutdown_timeout)
        if logs_specs is not None:  # None is valid for a subclass that starts its workers itself
            check_logs_specs("logs_specs", logs_specs)
        self._start_method = start_method
        self._pcontext: PContext | None = None
        # Generation of the group and context at the last check. A new context is checked at once.
        self._seen_generation = 0
        self._seen_context: weakref.ref[PContext] | None = None
        self._rdzv_handler = spec.rdzv_handler
        self._log_line_prefix_template = _environment.checked_template(log_line_prefix_template)
        self._worker_watchdog: Any = None
        self._generated_timer_file: str | None = None
        self._timer_file = ""  # path of the server's pipe
        self._logs_specs = logs_specs
        self._interactive_rank = interactive_rank
        self._log_options = log_options
        check_signal_target(grace_signal_target)
        self._grace_signal_target = grace_signal_target
        self._health_check_server = health_check_server
        # Invalid value of the port variable that was already reported.
        self._refused_health_check_port: str | None = None
        self._stopping_workers_only = False
        self._may_have_detached = False
        self._warm = warm_workers_of(spec, self._activity.refused_warm)
        self._uninterruptible_state_timeout = _resolve_uninterruptible_state_timeout(uninterruptible_state_timeout)
        # By pid: monotonic time of the first check that found the worker in uninterruptible sleep.
        self._uninterruptible_state_first_seen: dict[int, float] = {}

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """Run the workers until they end, and restart them when they fail. See :meth:`ElasticAgent.run`."""
        try:
            # Before the rendezvous, which can take longer than the timeout of a probe.
            self._setup_healthcheck()
            self._activity.attach(self._health_check_server, self._worker_group.spec)
            self._restarts.have_beaten = Heartbeats(weakref.ref(self)).have_come
            with _leftovers.guarding():
                return super().run(role)
        finally:
            # A subclass's `_shutdown` may not do it, or may not have been called.
            self._stop_healthcheck()

    def _begin_run(self) -> None:
        if self._has_run:
            # The exits of the previous run must not count as the outcome of this run.
            self._pcontext = None
            self._warm = warm_workers_of(self._worker_group.spec, self._activity.refused_warm)
        super()._begin_run()

    def _setup_local_watchdog(self, envs: dict[int, dict[str, str]]) -> None:
        """Start the watchdog if it is enabled and not running, and add the path of its pipe to the workers' environments."""
        watchdog_file = os.environ.get(TORCHELASTIC_TIMER_FILE)
        current = _watchdog.as_worker_watchdog(self._worker_watchdog)
        run_id = envs.get(0, {}).get("TORCHELASTIC_RUN_ID", "")
        if os.environ.get(TORCHELASTIC_ENABLE_FILE_TIMER) == "1":
            if watchdog_file is None:
                watchdog_file = self._generated_timer_file = (
                    self._generated_timer_file or _watchdog.generate_timer_file()
                )
            if self._worker_watchdog is None:
                logger.info("Starting a FileTimerServer with %s ...", watchdog_file)
                if not envs:
                    logger.warning("Empty envs variables, using empty run_id for FileTimerServer")
                self._worker_watchdog = _watchdog.start_server(watchdog_file, run_id, self._log_watchdog_event)
                self._timer_file = watchdog_file
                logger.info("FileTimerServer started")
            elif current is not None:
                watchdog_file, moved_to = self._timer_file, _watchdog.generate_timer_file()
                server = _watchdog.renew(current, watchdog_file, moved_to, run_id, self._log_watchdog_event)
                if server is not current:
                    self._worker_watchdog, self._timer_file, watchdog_file = server, moved_to, moved_to
        else:
            logger.info(
                "Environment variable '%s' not found. Do not start FileTimerServer.", TORCHELASTIC_ENABLE_FILE_TIMER
            )
        if watchdog_file is not None:
            for worker_env in envs.values():
                worker_env[TORCHELASTIC_TIMER_FILE] = watchdog_file

    @staticmethod
    def _get_current_time_secs() -> int:
        return int(time.time())

    def _get_alive_time(self) -> int:
        """Return the time of the agent's last progress in seconds since the epoch, for the health server.

        This is the start of the loop's current step, or now while the loop waits. If the watchdog's last progress is older, it counts
        instead, except in the exit barrier, where no workers run.
        """
        if self._in_exit_barrier:
            return self._get_current_time_secs()
        progress = int(time.time() - self._activity.stalled_s())
        watchdog = self._worker_watchdog
        return progress if watchdog is None else min(progress, int(watchdog.get_last_progress_time()))

    def _setup_healthcheck(self) -> None:
        """Start the health server if a port is set and none runs."""
        port = os.environ.get(TORCHELASTIC_HEALTH_CHECK_PORT)
        if port is None:
            logger.info(
                "Environment variable '%s' not found. Do not start health check.", TORCHELASTIC_HEALTH_CHECK_PORT
            )
            return
        if self._health_check_server is not None or port == self._refused_health_check_port:
            return
        logger.info("Found healthcheck port %s: %s", TORCHELASTIC_HEALTH_CHECK_PORT, port)
        try:
            self._health_check_server = create_healthcheck_server(
                alive_callback=self._get_alive_time, port=int(port), timeout=_HEALTH_TIMEOUT_S
            )
            self._health_check_server.start()
        except ValueError:
            self._refused_health_check_port = port
            logger.error(  # noqa: TRY400 - the text has all details
                "Invalid healthcheck port value: '%s', expecting integer. Not starting healthcheck server.", port
            )
        except OSError as error:  # from a deployment's own server; a job must not fail because of its health checks
            self._refused_health_check_port, self._health_check_server = port, None
            logger.error("Not starting healthcheck server: %s", error)  # noqa: TRY400 - the text has all details

    def _stop_healthcheck(self) -> None:
        server, self._health_check_server = self._health_check_server, None
        if server is not None:
            server.stop()

    def _get_fq_hostname(self) -> str:
        return hostname_for_report()

    def _log_watchdog_event(self, name: str, request: Any | None) -> None:
        """Record the watchdog's action ``name`` for a worker's request as an event."""
        spec = self._worker_group.spec
        event = watchdog_event(
            self._worker_group,
            name,
            request,
            hostname=self._get_fq_hostname(),
            total_run_time=self._total_execution_time,
            remaining_restarts=self._remaining_restarts,
        )
        record(event, event_log_handler_of(spec))

    def _native_group(self) -> _rust.Group | None:
        """Return the engine's group of the workers; ``None`` without workers, or for a context of torch's class."""
        context: object = self._pcontext
        return context.native_group if isinstance(context, PContext) else None

    def _begin_stop(self, death_sig: signal.Signals, reason: StopReason, within_s: float | None = None) -> None:
        if isinstance(self._pcontext, PContext):
            # The deadline is final: a later shutdown does not change it.
            limit_s = self._shutdown_timeout if within_s is None else max(0.0, within_s - _KILL_TIME_S)
            self._pcontext.begin_stop(death_sig, min(self._shutdown_timeout, limit_s), reason)

    def _outcome_before_signal(self) -> RunResult | None:
        group = self._native_group()
        worker_group = self._worker_group
        # A subclass may restart the workers itself.
        is_restarting = self._activity.is_restarting or worker_group.state == WorkerState.STOPPED
        if group is None or self._has_left_exit_barrier or is_restarting:
            return None
        exits = [one for one in group.exits() if _signals.was_before_signal(one.monotonic_ns, one.returncode)]
        has_failed = any(ended.returncode != 0 and not ended.stopped for ended in exits)
        # A success counts only for programs: the return values of functions were already deleted.
        has_succeeded = (
            len(exits) == len(group.pids) and not has_failed and isinstance(worker_group.spec.entrypoint, str)
        )
        if not has_succeeded and not (has_failed and self._remaining_restarts <= 0):
            return None
        # The signal may have been received during the start of the workers, before their ids were set.
        pids = self._pcontext.pids() if self._pcontext else {}
        for worker in worker_group.workers:
            worker.id = pids.get(worker.local_rank)
        result = self._monitor_workers(worker_group)
        if result.state not in {WorkerState.SUCCEEDED, WorkerState.FAILED}:
            return None
        worker_group.state = result.state
        return result

    @prof
    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002 - torch's signature
        # Calls `_shutdown`, which subclasses override. The flag keeps the health server running during a restart.
        self._stopping_workers_only = True
        try:
            self._shutdown(timeout=self._shutdown_timeout)
        finally:
            self._stopping_workers_only = False
        self._handle_detached(has_succeeded=False)
        stopped_within_s = self._stopped_within_s()
        if stopped_within_s is not None:
            self._activity.measured(stopped_within_s)

    @prof
    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        if worker_group.store is None:
            raise AssertionError("the workers need a store; run rendezvous first")
        if spec.entrypoint is None:
            raise AssertionError("the worker spec has no entrypoint")
        if self._logs_specs is None:
            raise AssertionError("the agent was made without logs_specs")
        logger.info("use_agent_store: %s", spec.rdzv_handler.use_agent_store)

        args: dict[int, tuple[Any, ...]] = {}
        envs: dict[int, dict[str, str]] = {}
        for worker in worker_group.workers:
            local_rank = worker.local_rank
            envs[local_rank] = self._worker_env(worker_group, worker)
            args[local_rank] = self._worker_args(spec, worker)

        restarts = spec.max_restarts - self._remaining_restarts
        self._setup_local_watchdog(envs=envs)
        self._setup_healthcheck()
        self._may_have_detached = True
        self._explainer.starting()
        pool = self._warm_pool(spec, args, envs)
        # A signal handler may raise between the return and the assignment.
        owner = partial(setattr, self, "_pcontext") if start_processes is _launch.start_processes else None
        self._pcontext = start_processes(
            name=spec.role,
            entrypoint=spec.entrypoint,
            args=args,
            envs=envs,
            logs_specs=self._logs_specs,
            log_line_prefixes=_environment.log_line_prefixes(self._log_line_prefix_template, worker_group, restarts),
            start_method=self._start_method,
            numa_options=newer(spec, "numa_options", None),
            duplicate_stdout_filters=newer(spec, "duplicate_stdout_filters", None),
            duplicate_stderr_filters=newer(spec, "duplicate_stderr_filters", None),
            shutdown_timeout=self._shutdown_timeout,
            # Only if set: a program may have replaced the function by one with torch's parameters.
            **_added(
                on_created=owner,
                grace_signal_target=self._grace_signal_target,
                interactive_rank=self._interactive_rank,
                warm_pool=pool,
                log_options=self._log_options,
            ),
        )
        handlers.use_folder(newer(self._logs_specs, "_run_log_dir", None))
        if self._warm is not None:
            group = self._native_group()
            self._warm.started(group)
            if group is not None and len(group.warm) == len(group.pids):
                self._activity.released()
        self._pcontext.on_first_failure = self._report_first_failure
        watchdog = _watchdog.as_worker_watchdog(self._worker_watchdog)
        if watchdog is not None:
            watchdog.set_workers(_watchdog.workers_with_folders(self._pcontext, worker_group.workers))
        self._explainer.started(self._pcontext, self._worker_watchdog, self._rdzv_info)
        return self._pcontext.pids()

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        spec = worker_group.spec
        if self._warm is None or spec.entrypoint is None or not self._may_use_zygote(spec):
            super()._rendezvous(worker_group)
            return
        workers = worker_group.workers
        with self._warm.importing_while_waiting(
            spec.entrypoint,
            {worker.local_rank: self._worker_args(spec, worker) for worker in workers},
            {worker.local_rank: self._worker_env(worker_group, worker) for worker in workers},
            is_bound=newer(spec, "numa_options", None) is not None,
        ):
            super()._rendezvous(worker_group)

    def _may_use_zygote(self, spec: WorkerSpec) -> bool:
        return isinstance(spec.entrypoint, str) or self._start_method == "spawn"

    @staticmethod
    def _worker_args(spec: WorkerSpec, worker: Worker) -> tuple[Any, ...]:
        return tuple(macros.substitute(list(spec.args), str(worker.local_rank)))

    def _warm_pool(
        self, spec: WorkerSpec, args: dict[int, tuple[Any, ...]], envs: dict[int, dict[str, str]]
    ) -> _rust.WarmPool | None:
        """Return the parked processes that become the workers; ``None`` to start new processes."""
        if self._warm is None or spec.entrypoint is None:
            return None
        if not self._may_use_zygote(spec):
            self._warm.preload_fork_server(self._start_method)
            return None
        obstacle = None
        if self._interactive_rank is not None:
            obstacle = f"local rank {self._interactive_rank} is connected to the terminal"
        elif _debuggers.is_attached():
            obstacle = "a debugger attaches to the workers"
        with self._activity.allowing(self._warm.longest_preload_s()):
            return self._warm.pool_for(
                spec.entrypoint,
                args,
                envs,
                is_bound=newer(spec, "numa_options", None) is not None,
                obstacle=obstacle,
            )

    def _worker_env(self, worker_group: WorkerGroup, worker: Worker) -> dict[str, str]:
        """Return the environment variables of one worker."""
        spec = worker_group.spec
        env = _environment.worker_environment(worker_group, worker, self._restart_count())
        self._set_local_rank_env(env, worker.local_rank, spec)
        return env

    def _set_local_rank_env(self, worker_env: dict[str, str], local_rank: int, spec: WorkerSpec) -> None:
        _environment.set_local_rank(worker_env, local_rank, spec)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Stop the workers, and at the end of the run also the parked workers, the watchdog and the health server."""
        if self._warm is not None and not self._stopping_workers_only:
            self._warm.close(0)  # kills them without a wait: they end while the workers use their grace period
        try:
            if self._pcontext:
                with self._activity.allowing(longest_stop_s(timeout)):
                    self._pcontext.close(death_sig, timeout)
                self._activity.ended(self._native_group(), self._worker_group.workers)
            if not self._stopping_workers_only:
                self._handle_detached(has_succeeded=self._worker_group.state == WorkerState.SUCCEEDED)
        finally:
            if not self._stopping_workers_only:
                self._stop_servers()

    def _handle_detached(self, *, has_succeeded: bool) -> None:
        """End the helpers that left the session of their worker, or log that they keep running. Only under ``ferrorun``.

        Called after the workers have ended, because workers may need their helpers to save a checkpoint.
        """
        run = _leftovers.current()
        if run is None or run.keep_detached or self._pcontext is None or not self._may_have_detached:
            return
        handle_helpers(
            run,
            list(self._pcontext.pids().values()),
            are_native=isinstance(self._worker_group.spec.entrypoint, str),
            has_succeeded=has_succeeded,
            grace_s=self._shutdown_timeout,
            elapsed_s=self._stopped_within_s() or 0.0,
            activity=self._activity,
        )
        # Reset last: if a signal interrupts this method, the repeated shutdown calls it again.
        self._may_have_detached = False

    def _stopped_within_s(self) -> float | None:
        """Return the duration of the workers' stop in seconds, including a stop that the engine started; ``None`` without a stop."""
        group = self._native_group()
        report = None if group is None else group.stop_report()
        return None if report is None else report.elapsed_s

    def _stop_servers(self) -> None:
        if self._warm is not None:
            self._warm.close()
        if self._worker_watchdog is not None:
            self._worker_watchdog.stop()
            self._worker_watchdog = None
        self._stop_healthcheck()

    def _check_uninterruptible_state_timeout(self, worker_group: WorkerGroup, timeout: float) -> RunResult | None:
        """Return a result with the workers in uninterruptible sleep for at least ``timeout`` seconds, or ``None`` without such workers."""
        if self._pcontext is None:
            return None
        role = worker_group.spec.role
        pids = self._pcontext.pids()
        live_pids = set(pids.values())
        for pid in [pid for pid in self._uninterruptible_state_first_seen if pid not in live_pids]:
            del self._uninterruptible_state_first_seen[pid]

        failures: dict[int, ProcessFailure] = {}
        for local_rank, pid in pids.items():
            dwell = self._update_uninterruptible_dwell(pid, role, timeout)
            if dwell is not None and dwell >= timeout:
                failure = _stuck.failure_of(local_rank, pid, dwell, timeout, _read_wait_channel(pid))
                logger.error("[%s] %s; marking worker group UNHEALTHY and disabling restarts.", role, failure.message)
                failures[worker_group.workers[local_rank].global_rank] = failure
        if not failures:
            return None
        # The stuck worker holds a device or a mount of this host, which would also block a restarted worker.
        self._remaining_restarts = 0
        return RunResult(state=WorkerState.UNHEALTHY, failures=failures)

    def _update_uninterruptible_dwell(self, pid: int, role: str, timeout: float) -> float | None:
        # Looked up in this module, because programs replace the two functions here.
        state = read_proc_state(pid)
        if state is None:
            return None
        is_uninterruptible = is_uninterruptible_state(state)
        first_seen = self._uninterruptible_state_first_seen
        return _stuck.dwell_s(first_seen, pid, role, timeout, is_uninterruptible=is_uninterruptible)

    @prof
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        role = worker_group.spec.role
        context = self._pcontext
        if context is None:
            raise AssertionError("the workers were not started")
        worker_pids = {worker.id for worker in worker_group.workers}
        context_pids = set(context.pids().values())
        if worker_pids != context_pids:
            logger.error(
                "[%s] worker pids do not match process_context pids. Expected: %s, actual: %s",
                role,
                worker_pids,
                context_pids,
            )
            return RunResult(state=WorkerState.UNKNOWN)

        # Read before the check: an exit during the check must not count as handled.
        group = self._native_group()
        self._seen_generation = 0 if group is None else group.generation
        self._seen_context = weakref.ref(context)
        _signals.wait_for_same_signal([] if group is None else group.exits())
        checked_ns = time.monotonic_ns()
        with self._activity.allowing(
            longest_stop_s(self._shutdown_timeout)
        ):  # it may stop the peers of a failed worker
            result = context.wait(0)
        if result is None:
            if self._uninterruptible_state_timeout > 0:
                stuck = self._check_uninterruptible_state_timeout(worker_group, self._uninterruptible_state_timeout)
                if stuck is not None:
                    return stuck
            return self._restarts.early_exit(worker_group, group) or RunResult(state=WorkerState.HEALTHY)
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        if result.is_failed():
            failures = {ranks[local_rank]: failure for local_rank, failure in result.failures.items()}
            self._explain_expiries(role, failures)
            exits = [ended for ended in map(exit_of, failures.values()) if ended is not None]
            if exits:
                self._activity.detected((checked_ns - min(ended.monotonic_ns for ended in exits)) / 1e9)
            return RunResult(state=WorkerState.FAILED, failures=failures)
        return_values = {ranks[local_rank]: value for local_rank, value in result.return_values.items()}
        return RunResult(state=WorkerState.SUCCEEDED, return_values=return_values)

    def _report_first_failure(self, failure: ProcessFailure) -> None:
        """Report the failure to the other nodes at once, so that all nodes stop their workers in parallel."""
        interruption = self._interruption()
        if interruption is None or interruption.is_failure:
            workers = self._worker_group.workers
            rank = next(worker.global_rank for worker in workers if worker.local_rank == failure.local_rank)
            result = RunResult(state=WorkerState.FAILED, failures={rank: failure})
            self._report_failure(result, self._restarts.facts(result, self._remaining_restarts))

    def _explain_expiries(self, role: str, failures: dict[int, ProcessFailure]) -> None:
        """Add the expired timer to the failures of workers that the watchdog ended."""
        watchdog = _watchdog.as_worker_watchdog(self._worker_watchdog)
        if watchdog is None:
            return
        for rank, failure in failures.items():
            expiry = watchdog.expiry(failure.pid)
            if expiry is not None:
                logger.error("[%s] rank %s: %s", role, rank, _watchdog.describe(expiry, failure.pid))
                _watchdog.explain(failure, expiry)

    def _wait_for_event(self, timeout_s: float) -> None:
        """Wait until a worker has ended since the last check, or the rendezvous reports an event.

        The timeout of ``timeout_s`` seconds applies only if polling is needed: to find stuck workers, or for a rendezvous that reports no
        events.
        """
        group = self._native_group()
        seen = self._seen_generation
        if self._pcontext is not None and (self._seen_context is None or self._seen_context() is not self._pcontext):
            return  # check a new context at once: a worker may have ended before the engine observed it
        if group is None:
            super()._wait_for_event(timeout_s)
        else:
            needs_polling = self._uninterruptible_state_timeout > 0 or may_grow(self._rdzv_handler)
            limit_s = self._restarts.timeout_s(group, timeout_s if needs_polling else None, self._worker_watchdog)
            wait_for_event(group, seen, limit_s, self._news_fd())

    def _news_fd(self) -> int | None:
        """Return a descriptor that is readable while the rendezvous has an event to report; ``None`` if it reports none."""
        notifier = self._notifier()
        return None if notifier is None else notifier.news_fd
