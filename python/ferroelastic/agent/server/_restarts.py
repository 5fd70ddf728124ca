"""The facts that an agent reports about a failure, and its own decisions for rendezvous handlers that make none."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from ferroelastic._compat import newer
from ferroelastic.agent.server._activity import cause_of, first_failure
from ferroelastic.agent.server._policy import NO_RESTART_EXIT_CODE, FailedRound, RestartSettings, Verdict, ask
from ferroelastic.agent.server._progress import ProgressFiles
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ferroelastic import _rust
    from ferroelastic.agent.server._policy import RestartPolicy
    from ferroelastic.agent.server._workers import RunResult, WorkerSpec

__all__ = ["Restarts", "log_decision"]

logger = get_logger("ferroelastic.agent.server.api")

_PROGRESS_INTERVAL_S = 5.0


_QUIET = ("at_once", "max_restarts")
"""Rules of torch, which need no attention."""


def log_decision(role: str, decision: _rust.Decision, cause: str) -> None:
    """Log a decision of the restart policy.

    Args:
        role: role of the workers.
        decision: the decision.
        cause: description of the failure.
    """
    text = cause if cause.endswith(decision.text) else f"{cause}: {decision.text}"
    logger.log(logging.INFO if decision.reason in _QUIET else logging.WARNING, "[%s] %s", role, text)


class Restarts:
    """The restart policy at one agent.

    Args:
        spec: specification of the workers.
        explain: function that returns the kind and the known causes of a failure.

    Attributes:
        have_beaten: function that returns whether a worker has sent a heartbeat in this round.
        may_be_final: whether the last failure may end the job.
        given_back: number of restarts that a healthy round has given back.
    """

    def __init__(self, spec: WorkerSpec, explain: Callable[[RunResult], list[str]]) -> None:
        self._spec = spec
        self._explain = explain
        self.may_be_final = False
        self.have_beaten: Callable[[], bool] = lambda: False
        settings: RestartSettings | None = newer(spec, "restart_settings", None)
        self.settings = RestartSettings() if settings is None else settings
        self._hook: RestartPolicy | None = newer(spec, "restart_policy", None)
        self._files = None if self.settings.progress_file is None else ProgressFiles(self.settings.progress_file)
        self._local: _rust.RestartPolicy | None = None
        self._round_began = time.monotonic()
        self._verdict: Verdict | None = None
        self._has_progressed = False
        self._has_reported_progress = False
        self._next_look = 0.0
        self.given_back = 0

    def begin_run(self) -> None:
        """Forget the previous run."""
        self._local = None
        self.given_back = 0

    def options(self) -> dict[str, str]:
        """Return the settings by the name of their option."""
        return self.settings.options(self._spec.max_restarts)

    def begin_round(self) -> None:
        """Note that the workers were started."""
        self._round_began = time.monotonic()
        self._verdict = None
        self._has_progressed = self._has_reported_progress = False
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
        is_default = self.settings == RestartSettings() and self._verdict.final_reason is None
        is_kept = is_default and result.state.value == "FAILED" and remaining > 0
        self.may_be_final = not is_kept or (failure is not None and failure[1].exitcode == NO_RESTART_EXIT_CODE)
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
        """Return the kind and the known causes of a failure. The search for causes takes time, so they are only read if they matter."""
        failure = first_failure(result)
        if failure is None:
            return ["agent"]
        if result.state.value == "UNHEALTHY":
            return ["stuck"]
        if self._hook is not None or self.settings.fatal_causes != RestartSettings().fatal_causes:
            return self._explain(result)
        return ["exit" if failure[1].exitcode >= 0 else "signal"]

    def text_of(self, decision: _rust.Decision) -> str:
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
        """Decide on a failure, for a rendezvous handler that does not."""
        if self._local is None:
            from ferroelastic import _rust

            # The agent counts the restarts itself, because programs may change the count.
            options = self.options() if self.settings.healthy_window else {**self.options(), "--max-restarts": "none"}
            self._local = _rust.RestartPolicy(options, str(self._spec.rdzv_handler.get_run_id()))
            self._local.begin_round(time.monotonic() - self._round_began)
        return self._local.decide(facts)

    def remaining(self, remaining: int) -> int:
        """Return the number of remaining restarts after a local decision to restart; before it there were ``remaining``."""
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

    def report_progress(self, notifier: Any) -> None:
        """Report the first progress of a round to the host. Looks for it every 5 seconds.

        Args:
            notifier: the rendezvous handler.
        """
        if not self._has_reported_progress and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _PROGRESS_INTERVAL_S
            if self.has_progressed():
                self._has_reported_progress = True
                notifier.report_progress()

    def next_look_s(self, *, has_watchdog: bool) -> float | None:
        """Return the seconds until the next call of :meth:`report_progress`; ``None`` if none is needed.

        Args:
            has_watchdog: whether the workers can send heartbeats.
        """
        if self._has_reported_progress or not (has_watchdog or self._files is not None):
            return None
        return max(0.0, self._next_look - time.monotonic())
