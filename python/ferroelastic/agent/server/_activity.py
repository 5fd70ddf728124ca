"""State and progress of an agent's loop, for the health server."""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ferroelastic._exit_codes import exit_code
from ferroelastic.agent.server.health_check_server import HealthCheckServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ferroelastic import _rust
    from ferroelastic.agent.server._workers import RunResult, Worker, WorkerSpec
    from ferroelastic.multiprocessing.errors import ProcessFailure

__all__ = ["Activity", "Observer", "cause_of", "exit_code_of", "failed_first_at_ns", "first_failure"]

_WAITING = None
_MAX_RESTARTS = 20


class Observer(Protocol):
    """Gets the measurements of an agent's loop, which are also those of ``/metrics``."""

    def took(self, phase: str, duration_s: float) -> None:
        """Handle the end of a phase and its duration in seconds."""

    def decided(self, cause: str, reason: str, *, restarts: bool) -> None:
        """Handle the decision to restart the workers or to end the job.

        Args:
            cause: ``failure`` or ``membership``.
            reason: the event, as text.
            restarts: whether the workers are restarted.
        """

    def ended(self, exits: list[_rust.Exit], workers: list[Worker]) -> None:
        """Handle the exits of a round's workers."""


class Activity:
    """State and progress of an agent's loop.

    While the loop waits (for exits, for other nodes, or for workers within their grace period) it counts as making progress. While it is
    busy, the last progress is the start of the current step, so a step that hangs shows up as a stall. The loop writes, any thread may read.
    """

    def __init__(self) -> None:
        # Start of the current step (monotonic) and its allowance. A single object, so that other threads read consistent values.
        self._busy: tuple[float | None, float] = (_WAITING, 0.0)
        self._server: HealthCheckServer | None = None
        self._state = "starting"
        # From the decision to restart to the start of the new workers.
        self.is_restarting = False
        self._measured_s: float | None = None
        self._has_released = False
        self._detect_s: float | None = None
        self._observer: Observer | None = None
        # Index, cause and time (nanoseconds since the epoch) of the last restarts, for the report of a failure.
        self.restarts: deque[tuple[int, str, int]] = deque(maxlen=_MAX_RESTARTS)

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Report all measurements of a run to an observer in a ``with`` block."""
        self._observer, self.is_restarting = observer, False
        try:
            yield
        finally:
            self._observer = None

    def stalled_s(self) -> float:
        """Return the seconds since the last progress, 0 while the loop waits."""
        since, allowance_s = self._busy
        if since is _WAITING:
            return 0.0
        stalled_s = time.monotonic() - since
        return 0.0 if stalled_s <= allowance_s else stalled_s

    def idle(self) -> None:
        """Mark the loop as not running: no progress is expected."""
        self._busy = (_WAITING, 0.0)

    def busy(self, state: str | None = None, *, allowance_s: float = 0.0) -> None:
        """Mark the start of a step of the loop.

        Args:
            state: the new state, one of those of ``_rust.HealthServer.set_state``. ``None`` keeps the current state.
            allowance_s: seconds that the step may take before it counts as a stall.
        """
        self._busy = (time.monotonic(), allowance_s)
        self._enter(state)

    @contextmanager
    def waiting(self, state: str | None = None) -> Iterator[None]:
        """Mark a ``with`` block in which the loop waits. Waiting counts as progress.

        Args:
            state: as for :meth:`busy`.
        """
        self.idle()
        self._enter(state)
        start = time.monotonic()
        try:
            yield
        finally:
            self.busy()
            if state == "exit barrier":
                self.took("exit_barrier", time.monotonic() - start)

    @contextmanager
    def allowing(self, allowance_s: float) -> Iterator[None]:
        """Set an allowance in seconds for a ``with`` block, see :meth:`busy`."""
        self.busy(allowance_s=allowance_s)
        try:
            yield
        finally:
            self.busy()

    def attach(self, server: object, spec: WorkerSpec) -> None:
        """Report all changes to a health server from now on. Servers of other classes than ours are ignored.

        Args:
            server: the server.
            spec: specification of the workers.
        """
        if isinstance(server, HealthCheckServer) and server is not self._server:
            self._server = server
            self._report("set_job", spec.rdzv_handler.get_run_id(), spec.role)
            self._report("set_state", self._state)

    def started(self, workers: list[Worker]) -> None:
        """Report that the workers were started."""
        self.is_restarting = False
        started = [
            (worker.local_rank, worker.global_rank, worker.id) for worker in workers if isinstance(worker.id, int)
        ]
        self._report("set_workers", started)
        self.busy("running")

    def detected(self, latency_s: float) -> None:
        """Record how many seconds after the exit a failure was detected."""
        self._detect_s = max(0.0, latency_s)
        self.took("detect", self._detect_s)

    def note_decision(self, decision: _rust.Decision) -> None:
        """Report a decision of the restart policy."""
        self._report("note_decision", decision.reason, decision.text)

    def restarting(self, cause: Literal["failure", "membership"], reason: str) -> None:
        """Report the start of a restart.

        Args:
            cause: a failed worker, or a change of the membership.
            reason: the event, as text.
        """
        self.is_restarting = True
        index = self.restarts[-1][0] + 1 if self.restarts else 0
        self.restarts.append((index, reason, time.time_ns()))
        self._report("note_restart", cause, reason)
        if self._observer is not None:
            self._observer.decided(cause, reason, restarts=True)
        detect_s, self._detect_s = self._detect_s, None
        if detect_s is not None and cause == "failure":
            self._report("observe_phase", "detect", detect_s)

    def giving_up(self, reason: str) -> None:
        """Report that the job ends because of a failure. ``reason`` is the event, as text."""
        if self._observer is not None:
            self._observer.decided("failure", reason, restarts=False)

    def ended(self, group: _rust.Group | None, workers: list[Worker]) -> None:
        """Report the exits of a round's workers to the observer. ``None`` for workers that the engine does not supervise."""
        if self._observer is not None and group is not None:
            self._observer.ended(group.exits(), workers)

    def took(self, phase: str, duration_s: float) -> None:
        """Report the duration of a phase in seconds to the observer. It may be no phase of a restart."""
        if self._observer is not None:
            self._observer.took(phase, duration_s)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Mark and measure a ``with`` block in which the workers are stopped."""
        self.busy("stopping")
        with self.phase("stop"):
            yield

    @contextmanager
    def phase(self, name: Literal["stop", "rendezvous", "spawn"]) -> Iterator[None]:
        """Report the duration of a ``with`` block as a phase. The health server gets the phases of restarts only."""
        self._measured_s = None
        self._has_released = False
        start = time.monotonic()
        yield
        duration_s = time.monotonic() - start if self._measured_s is None else self._measured_s
        reported = "release" if self._has_released else name
        self.took(reported, duration_s)
        if self.is_restarting:
            self._report("observe_phase", reported, duration_s)

    def measured(self, duration_s: float) -> None:
        """Set a more exact duration of the current phase, in seconds."""
        self._measured_s = duration_s

    def released(self) -> None:
        """Report the current phase ``spawn`` as ``release``: all workers are warm."""
        self._has_released = True

    def refused_warm(self, reason: str) -> None:
        """Report that workers start cold although warm workers were requested."""
        self._report("note_warm_refusal", reason)

    def _enter(self, state: str | None) -> None:
        if state is not None and state != self._state:
            self._state = state
            self._report("set_state", state)

    def _report(self, method: str, *arguments: Any) -> None:
        board: _rust.HealthServer | None = None if self._server is None else self._server.board
        if board is not None:
            # Strings may contain surrogates, for example a run id from bytes that are not UTF-8.
            encodable = [
                value.encode("utf-8", "replace").decode() if isinstance(value, str) else value for value in arguments
            ]
            try:
                getattr(board, method)(*encodable)
            except RuntimeError:  # the server is closed, or this is a forked child
                self._server = None


def first_failure(result: RunResult) -> tuple[int, ProcessFailure] | None:
    """Return the global rank and the failure of the worker that failed first; ``None`` without a failed worker."""
    from ferroelastic.multiprocessing.errors._failures import failed_at_ns

    return min(result.failures.items(), key=lambda item: failed_at_ns(item[1]), default=None)


def failed_first_at_ns(result: RunResult) -> int | None:
    """Return the time of the first failure in nanoseconds since the epoch, or ``None`` without a failure."""
    from ferroelastic.multiprocessing.errors._failures import failed_at_ns

    times = [failed_at_ns(failure) for failure in result.failures.values()]
    return min(times, default=None)


def cause_of(result: RunResult) -> str:
    """Return the cause of a failed or unhealthy run in one line: the first failed worker and how it ended."""
    first = first_failure(result)
    if first is None:
        return f"workers are {result.state.value}"
    rank, failure = first
    how = f"exited with code {failure.exitcode}" if failure.exitcode >= 0 else f"was ended by {failure.signal_name()}"
    more = f", and {len(result.failures) - 1} more failed" if len(result.failures) > 1 else ""
    return f"rank {rank} (pid {failure.pid}) {how}{more}"


def exit_code_of(result: RunResult) -> int:
    """Return the exit code of a job that ends with this result: the code of the first failed worker, 128+n for signal n."""
    first = first_failure(result)
    return 1 if first is None else exit_code(first[1].exitcode)
