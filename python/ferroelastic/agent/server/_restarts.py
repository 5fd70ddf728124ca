"""The facts that an agent reports about a failure, and its own decisions if the rendezvous handler makes none."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ferroelastic._compat import newer
from ferroelastic.agent.server import _early_exit
from ferroelastic.agent.server._activity import cause_of, first_failure
from ferroelastic.agent.server._policy import NO_RESTART_EXIT_CODE, FailedRound, RestartSettings, Verdict, ask
from ferroelastic.agent.server._progress import ProgressFiles
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ferroelastic import _rust
    from ferroelastic.agent.server._activity import Activity
    from ferroelastic.agent.server._policy import RestartPolicy
    from ferroelastic.agent.server._workers import RunResult, WorkerGroup, WorkerSpec
    from ferroelastic.rendezvous._notifying import NotifyingRendezvous

__all__ = ["Restarts"]

logger = get_logger("ferroelastic.agent.server.api")

_PROGRESS_INTERVAL_S = 5.0


_QUIET = ("at_once", "max_restarts")
"""Reasons of decisions that torch makes too. They are logged as information, others as warnings."""


def _never() -> bool:
    return False


class Restarts:
    """The restart policy at one agent.

    Args:
        spec: specification of the workers.
        activity: counts the decisions.
        explain: function that returns the kind and the known causes of a failure.

    Attributes:
        have_beaten: function that returns whether a heartbeat or timer of a worker shows progress in this round.
        may_be_final: whether the last failure may end the job.
        given_back: number of restarts that healthy rounds have given back.
    """

    def __init__(self, spec: WorkerSpec, activity: Activity, explain: Callable[[RunResult], list[str]]) -> None:
        self._spec, self._activity = spec, activity
        self._explain = explain
        self.may_be_final = False
        self.have_beaten: Callable[[], bool] = _never
        settings: object = newer(spec, "restart_settings", None)
        self.settings = settings if isinstance(settings, RestartSettings) else RestartSettings()
        # Compared without the settings that end no job.
        default = RestartSettings()
        backoff, longest = default.restart_backoff, default.restart_backoff_max
        plain = replace(self.settings, restart_backoff=backoff, restart_backoff_max=longest, on_node_failure="restart")
        self._has_final_failures = plain != default
        # A mock of a specification has every attribute.
        is_real = settings is None or isinstance(settings, RestartSettings)
        self._hook: RestartPolicy | None = newer(spec, "restart_policy", None) if is_real else None
        self._files = None if self.settings.progress_file is None else ProgressFiles(self.settings.progress_file)
        self._local: _rust.RestartPolicy | None = None
        self._round_began = time.monotonic()
        self._verdict: Verdict | None = None
        self._has_progressed = False
        self._has_found_progress = False
        self._next_look = 0.0
        self._delay_s = 0.0
        self._noted: str | None = None
        self.given_back = 0

    def begin_run(self) -> None:
        """Forget the previous run."""
        self._noted = None
        self._local = None
        self.given_back = 0

    def options(self) -> dict[str, str]:
        """Return the settings by the name of their option."""
        return self.settings.options(self._spec.max_restarts)

    def begin_round(self) -> None:
        """Note that the workers were started."""
        self._round_began = time.monotonic()
        self._verdict = None
        self._has_progressed = self._has_found_progress = False
        self._next_look = self._round_began + _PROGRESS_INTERVAL_S
        if self._files is not None:
            self._files.begin_round()
        if self._local is not None:
            self._local.begin_round()

    def facts(self, result: RunResult, remaining: int) -> _rust.FailureFacts:
        """Return the facts of a failure.

        Args:
            result: the failed workers.
            remaining: number of remaining restarts.
        """
        from ferroelastic import _rust

        failure = first_failure(result)
        causes = self._causes(result)
        if self._verdict is None:
            failed = self._failed_round(result, remaining, causes)
            self._verdict = Verdict() if self._hook is None else ask(self._hook, failed)
        is_declared_final = self._verdict.final_reason is not None or result.state.value != "FAILED"
        forbids_restart = failure is not None and failure[1].exitcode == NO_RESTART_EXIT_CODE
        self.may_be_final = self._has_final_failures or is_declared_final or forbids_restart or remaining <= 0
        return _rust.FailureFacts(
            None if failure is None else failure[1].exitcode,
            causes,
            has_progressed=self.has_progressed(),
            # The host knows better if restarts can be given back.
            is_exhausted=remaining <= 0 and not self.settings.healthy_window,
            final_reason=self._verdict.final_reason,
            delay_s=self._verdict.delay_s,
        )

    def _causes(self, result: RunResult) -> list[str]:
        """Return the kind and the known causes of a failure.

        The search for causes takes time. It is left out if neither a setting nor the program's policy uses them.
        """
        failure = first_failure(result)
        if failure is None:
            return ["agent"]
        declared: str | None = newer(failure[1], "declared_kind", None)
        if declared is not None:
            return [declared]
        if self._hook is not None or self.settings.fatal_causes != RestartSettings().fatal_causes:
            return self._explain(result)
        return ["exit" if failure[1].exitcode >= 0 else "signal"]

    def _text_of(self, decision: _rust.Decision) -> str:
        """Return the reason of a decision for the report of the job."""
        if decision.reason != "max_restarts":
            return decision.text
        maximum = self._spec.max_restarts
        return f"no restart is {'left' if maximum else 'allowed'} (--max-restarts={maximum})"

    def _failed_round(self, result: RunResult, remaining: int, causes: Sequence[str]) -> FailedRound:
        failure = first_failure(result)
        return FailedRound(
            text=cause_of(result),
            exit_code=None if failure is None else failure[1].exitcode,
            causes=tuple(causes),
            rank=None if failure is None else failure[0],
            uptime_s=time.monotonic() - self._round_began,
            restarts=max(0, self._spec.max_restarts - remaining),
            max_restarts=self._spec.max_restarts,
            has_progressed=self.has_progressed(),
        )

    def decide(self, facts: _rust.FailureFacts) -> _rust.Decision:
        """Decide on a failure, for a rendezvous handler that makes no decisions."""
        if self._local is None:
            from ferroelastic import _rust

            # The agent counts the restarts itself, because programs may change the count.
            options = self.options() if self.settings.healthy_window else {**self.options(), "--max-restarts": "none"}
            self._local = _rust.RestartPolicy(options, str(self._spec.rdzv_handler.get_run_id()))
            self._local.begin_round(time.monotonic() - self._round_began)
        decision = self._local.decide(facts)
        self._delay_s = decision.delay_s or 0.0
        return decision

    def wait(self) -> None:
        """Wait until the delay of a local decision has passed. The host of the native rendezvous waits for all its nodes."""
        delay_s, self._delay_s = self._delay_s, 0.0
        if delay_s:
            time.sleep(delay_s)

    def note(self, decision: _rust.Decision | None, cause: str) -> str | None:
        """Log and count a decision.

        Args:
            decision: the decision; ``None`` for an event that needs none.
            cause: description of the failure.

        Returns:
            The reason of the last decision, for the report of the job.
        """
        if decision is not None:
            text = cause if cause.endswith(decision.text) else f"{cause}: {decision.text}"
            level = logging.INFO if decision.reason in _QUIET else logging.WARNING
            logger.log(level, "[%s] %s", self._spec.role, text)
            self._activity.note_decision(decision)
            self._noted = self._text_of(decision)
        return self._noted

    def remaining(self, remaining: int) -> int:
        """Return the number of remaining restarts after a decision to restart.

        Args:
            remaining: the number before the decision.
        """
        after = remaining - 1
        if self._local is not None and self.settings.healthy_window:
            after = max(0, self._spec.max_restarts - self._local.used)
        self.given_back += after - (remaining - 1)
        return after

    def note_membership_change(self) -> None:
        """Note that the round has ended, but not by a failure."""
        if self._local is not None:
            self._local.note_membership_change()

    def has_progressed(self) -> bool:
        """Return whether the workers of this node have made progress since their start."""
        self._has_progressed = (
            self._has_progressed or self.have_beaten() or (self._files is not None and self._files.have_changed())
        )
        return self._has_progressed

    def look_for_progress(self, notifier: NotifyingRendezvous | None) -> None:
        """Look for the first progress of a round, every 5 seconds, and report it to the host.

        Args:
            notifier: the rendezvous handler; ``None`` if it makes no decisions.
        """
        if not self._has_found_progress and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _PROGRESS_INTERVAL_S
            if self.has_progressed():
                self._has_found_progress = True
                if notifier is not None:
                    notifier.report_progress()

    def early_exit(self, worker_group: WorkerGroup, group: _rust.Group | None) -> RunResult | None:
        """Return a failed result if workers have run on for too long after another one has ended with exit code 0."""
        return _early_exit.check(worker_group, group, self.settings.early_exit_timeout)

    def timeout_s(self, group: _rust.Group, polling_s: float | None, watchdog: object) -> float | None:
        """Return the seconds until the next check of running workers; ``None`` if none is needed.

        Args:
            group: the workers.
            polling_s: seconds until the next check for other reasons; ``None`` if none is needed.
            watchdog: server of the workers' heartbeats; ``None`` without one.
        """
        looks_for_progress = not self._has_found_progress and (watchdog is not None or self._files is not None)
        look_s = max(0.0, self._next_look - time.monotonic()) if looks_for_progress else None
        limits_s = (polling_s, look_s, _early_exit.left_s(group, self.settings.early_exit_timeout))
        return min((limit_s for limit_s in limits_s if limit_s is not None), default=None)
