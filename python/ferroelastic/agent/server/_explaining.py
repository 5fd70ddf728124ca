"""The explanation of a failed run, for the report, the other nodes and the events.

The modules of the explanation are loaded while the workers start for the first time, and not at a failure.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ferroelastic._compat import family, newer
from ferroelastic._exit_codes import FAILURE, exit_code
from ferroelastic._text import launched_name
from ferroelastic.multiprocessing.errors._failures import failed_at_ns
from ferroelastic.rendezvous import JobFailedError, RendezvousConnectionError, RendezvousTimeoutError
from ferroelastic.rendezvous._notifying import PlacedRendezvousInfo
from ferroelastic.utils._hostname import hostname_for_report
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferroelastic._failure.collect import Observation
    from ferroelastic._failure.model import Failure, FirstFailure, Kind, Others, WatchdogReport
    from ferroelastic._failure.oom import MemoryCgroup, OomCounts
    from ferroelastic.agent.server._activity import Activity
    from ferroelastic.agent.server._workers import RunResult, WorkerGroup
    from ferroelastic.multiprocessing import PContext, ProcessFailure
    from ferroelastic.rendezvous import RendezvousInfo
    from ferroelastic.rendezvous._notifying import Interruption

__all__ = ["Explainer"]

T = TypeVar("T")

logger = get_logger(__name__)


class Explainer:
    """Explains why the workers of an agent have failed.

    Args:
        group: the workers of this node.
        activity: record of the restarts of the run.
    """

    def __init__(self, group: WorkerGroup, activity: Activity) -> None:
        self._group = group
        self._activity = activity
        # Weak: the context has descriptors, and the agent decides how long it lives.
        self._context: Callable[[], PContext | None] = _no_context
        self._watchdog: Any = None
        self._round: int | None = None
        self._observation: Observation | None = None
        self._before_start: tuple[MemoryCgroup | None, OomCounts] | None = None
        # The explained failure of a worker, by its process id: it is collected once.
        self._explained: tuple[int, FirstFailure] | None = None
        # The explanation of the failure that has ended the job, from the node of that failure.
        self._verdict = ""

    def explained(self, agent: Any, run: Callable[[], RunResult]) -> RunResult:
        """Run an agent, and explain the failure of its workers in ``agent.job_failure``.

        Args:
            agent: the agent.
            run: function that runs the agent.

        Returns:
            The result of the run.

        Raises:
            Exception: the exception of the run, with the explanation as its attribute ``job_failure``.
        """
        agent.job_failure = self._explained = self._round = None
        self._verdict = ""
        self._activity.restarts.clear()
        try:
            result = run()
        except Exception as error:
            agent.job_failure = error.job_failure = _unless_raised(self._explain_error, error, agent)  # type: ignore[attr-defined]
            raise
        else:
            if result.is_failed():
                agent.job_failure = _unless_raised(self._explain, result, agent)
            return result
        finally:
            observation, self._observation = self._observation, None
            if observation is not None:
                observation.close()

    def starting(self) -> None:
        """Note the counters of the OOM killer before a start of workers, because it may kill a worker at once."""
        try:
            from ferroelastic._failure.oom import count, find_cgroup

            cgroup = find_cgroup()
            self._before_start = cgroup, count(cgroup)
        except Exception:
            logger.debug("the counters of the OOM killer cannot be read", exc_info=True)

    def started(self, context: PContext | None, watchdog: object, info: RendezvousInfo | None) -> None:
        """Observe workers that have just been started.

        Args:
            context: their processes.
            watchdog: the server of their timers; ``None`` without one.
            info: the outcome of the rendezvous.
        """
        try:
            # Loaded here, because a failure must be shown at once. ChildFailedError needs datetime.
            import datetime as dt  # noqa: F401

            from ferroelastic._failure import box, save  # noqa: F401
            from ferroelastic._failure.collect import Observation

            self._context = _no_context if context is None else weakref.ref(context)
            self._watchdog, self._explained = watchdog, None
            last = -1 if self._round is None else self._round
            self._round = info.place.round if isinstance(info, PlacedRendezvousInfo) else last + 1
            if self._observation is None:
                self._observation = Observation()
            pids = [] if context is None else list(context.pids().values())
            self._observation.begin(pids[0] if pids else None, self._before_start)
        except Exception:
            logger.debug("the workers cannot be observed for the report of a failure", exc_info=True)

    def detail(self, result: RunResult) -> str:
        """Return the explanation of the first failed worker for the other nodes; ``""`` if no worker has failed.

        Call this before the watchdog is stopped: the watchdog has the facts about an expired timer.

        Args:
            result: a failed result.
        """
        if not result.failures:
            return ""
        from ferroelastic._failure.model import encode_detail

        rank, failure = min(result.failures.items(), key=lambda item: failed_at_ns(item[1]))
        first = self._first(rank, failure, result)
        return encode_detail(first)

    def causes(self, result: RunResult) -> list[str]:
        """Return the kind and the known causes of the first failure, for the restart policy.

        Args:
            result: a failed result with a failed worker.
        """
        from ferroelastic._failure.advice import advice_for

        rank, failure = min(result.failures.items(), key=lambda item: failed_at_ns(item[1]))
        first = self._first(rank, failure, result)
        advice = advice_for(first)
        return [first.kind] if advice is None else [first.kind, advice.cause]

    def judged(self, interruption: Interruption | None) -> None:
        """Note the event that has ended the job: a worker of another node may have failed first.

        Args:
            interruption: the event; ``None`` if the rendezvous reports none.
        """
        self._verdict = "" if interruption is None else interruption.detail

    def _explain(self, result: RunResult, agent: Any) -> Failure:
        """Explain a run whose workers have failed on this node."""
        from ferroelastic._failure.model import FirstFailure, Others

        first, others = FirstFailure(host=hostname_for_report(), reason=f"workers are {result.state.value}"), Others()
        code = FAILURE
        if result.failures:
            rank, failure = min(result.failures.items(), key=lambda item: failed_at_ns(item[1]))
            code = exit_code(failure.exitcode)
            first = self._first(rank, failure, result)
            others = self._others(rank, result)
            reported = self._reported(self._verdict)
            if reported is not None and (reported.host, reported.pid) != (first.host, first.pid):
                first, others = reported, replace(others, failed=len(result.failures), same_failure=[])
        decision = newer(agent, "restart_decision", None) or self._decision()
        if result.state.value == "UNHEALTHY":
            decision = "no restart, because a stuck worker keeps its device or mount"
        return self._conclude(first, others, agent.job_exit_code or code, decision, agent)

    @staticmethod
    def _reported(detail: str) -> FirstFailure | None:
        """Return the first failure that a node has reported."""
        from ferroelastic._failure.model import decode_detail

        return decode_detail(detail)

    def _decision(self) -> str:
        restarts = self._group.spec.max_restarts
        used = "no restart is allowed" if restarts == 0 else "no restart is left"
        return f"{used} (--max-restarts={restarts})"

    def _explain_error(self, error: Exception, agent: Any) -> Failure | None:
        """Explain a run that an event on another node, or the loss of one, has ended. ``None`` if no workers had been started."""
        is_loss = newer(error, "is_loss", False) or isinstance(
            error, (*family(RendezvousTimeoutError), *family(RendezvousConnectionError))
        )
        if self._round is None or not (is_loss or isinstance(error, JobFailedError)):
            return None
        from ferroelastic._failure.collect import iso_time
        from ferroelastic._failure.model import FirstFailure, Others

        now = time.time_ns()
        first = self._reported(newer(error, "detail", ""))
        decision = None if first is None else newer(agent, "restart_decision", None) or self._decision()
        if first is None:
            kind: Kind = "lost_node" if is_loss else "agent"
            first = FirstFailure(now, iso_time(now), round=self._round, kind=kind, reason=str(error))
        code: int = newer(error, "exit_code", FAILURE)
        return self._conclude(first, Others(stopped=self._stopped()), code, decision, agent)

    def _conclude(self, first: FirstFailure, others: Others, code: int, decision: str | None, agent: Any) -> Failure:
        """Return the failure of the job, and write it to the log folder."""
        from ferroelastic._failure.advice import advice_for
        from ferroelastic._failure.model import Failure, Job, Restart
        from ferroelastic._failure.save import run_folder, save

        spec = self._group.spec
        # A subclass that starts its workers itself has no destinations of their output.
        folder = run_folder(newer(agent, "_logs_specs", None))
        failure = Failure(
            job=Job(
                run_id=str(spec.rdzv_handler.get_run_id()),
                name=launched_name(spec.entrypoint, spec.args),
                role=str(spec.role),
                exit_code=code,
                time_ns=time.time_ns(),
            ),
            first=first,
            advice=advice_for(first),
            others=others,
            restarts=[Restart(*one) for one in self._activity.restarts],
            decision=decision,
            logs=folder,
        )
        save(failure, folder)
        return failure

    def _first(self, rank: int, failure: ProcessFailure, result: RunResult) -> FirstFailure:
        if self._explained is not None and self._explained[0] == failure.pid:
            return self._explained[1]
        first = self._collected(rank, failure, result)
        self._explained = (failure.pid, first)
        return first

    def _collected(self, rank: int, failure: ProcessFailure, result: RunResult) -> FirstFailure:
        from ferroelastic._failure.collect import Facts, Observation, collect
        from ferroelastic._failure.model import FirstFailure

        kind, reason = self._judgement(failure, result)
        watchdog, expired = self._expired(failure.pid)
        facts = Facts(
            rank=rank,
            node_rank=self._group.group_rank,
            host=hostname_for_report(),
            round=self._round,
            time_ns=failed_at_ns(failure),
            stderr=self._stderr(failure.local_rank),
            watchdog=watchdog,
            reason=reason or expired,
            kind=kind,
        )
        try:
            return collect(failure, facts, self._observation or Observation())
        except Exception:
            logger.debug("the failure of rank %s cannot be explained completely", rank, exc_info=True)
            code = failure.exitcode
            return FirstFailure(
                time_ns=facts.time_ns,
                rank=rank,
                local_rank=failure.local_rank,
                host=facts.host,
                pid=failure.pid,
                kind="exit" if code >= 0 else "signal",
                exit_code=code if code >= 0 else None,
                signal=failure.signal_name() if code < 0 else None,
            )

    def _judgement(self, failure: ProcessFailure, result: RunResult) -> tuple[Kind | None, str | None]:
        """Return kind and reason of a failure that the agent has declared; ``None`` if the worker ended by itself."""
        matched: dict[int, str] = newer(self._context(), "log_failures", {})
        if failure.local_rank in matched:
            return "log_pattern", matched[failure.local_rank]
        declared: Kind | None = newer(failure, "declared_kind", None)
        if declared is not None:
            return declared, str(failure.message)
        if result.state.value == "UNHEALTHY":
            return "stuck", str(failure.message)
        return None, None

    def _expired(self, pid: int) -> tuple[WatchdogReport | None, str | None]:
        """Return the timer for whose expiry the watchdog ended a process, and its description."""
        from ferroelastic._failure.model import WatchdogReport
        from ferroelastic.agent.server import _watchdog

        watchdog = _watchdog.as_worker_watchdog(self._watchdog)
        expiry = None if watchdog is None else watchdog.expiry(pid)
        if expiry is None:
            return None, None
        return WatchdogReport(expiry.scope, _watchdog.stack_of(expiry)), _watchdog.describe(expiry, pid)

    def _stderr(self, local_rank: int) -> bytes:
        read = newer(self._context(), "stderr_tail", None)
        try:
            return b"" if read is None else read(local_rank)
        except Exception:
            logger.debug("standard error of local rank %s cannot be read", local_rank, exc_info=True)
            return b""

    def _stopped(self) -> int:
        group = newer(self._context(), "native_group", None)
        return 0 if group is None else sum(ended.stopped for ended in group.exits())

    def _others(self, first_rank: int, result: RunResult) -> Others:
        from ferroelastic._failure.collect import exception_of
        from ferroelastic._failure.model import Others
        from ferroelastic._failure.text import clean

        def signature(failure: ProcessFailure) -> tuple[object, ...]:
            exception = exception_of(failure, clean(self._stderr(failure.local_rank)))
            if exception is None:
                return (failure.exitcode,)
            # Without the messages, which may contain the rank.
            frames = [line for line in exception.traceback.split("\n") if line.lstrip(" |").startswith("File ")]
            return (failure.exitcode, exception.type, *frames)

        failures = dict(result.failures)
        first = failures.pop(first_rank)
        same: list[int] = []
        if failures:
            try:
                expected = signature(first)
                same = sorted(rank for rank, failure in failures.items() if signature(failure) == expected)
            except Exception:
                logger.debug("the failures cannot be compared", exc_info=True)
        return Others(failed=len(failures), stopped=self._stopped(), same_failure=same)


def _no_context() -> None:
    return None


def _unless_raised(explain: Callable[[T, Any], Failure | None], ended: T, agent: Any) -> Failure | None:
    """Return the explanation; ``None`` if it raises: the job has failed, and the error of the job must be reported."""
    try:
        return explain(ended, agent)
    except Exception:
        logger.debug("the failure cannot be explained", exc_info=True)
        return None
