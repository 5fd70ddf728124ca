"""What an agent's loop is doing, since when, and how that is told to the health server."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ferroelastic._exit_codes import exit_code
from ferroelastic.agent.server.health_check_server import HealthCheckServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ferroelastic import _rust
    from ferroelastic.agent.server._workers import RunResult, Worker, WorkerSpec

__all__ = ["Activity", "cause_of", "exit_code_of", "failed_first_at_ns"]

_WAITING = None


class Activity:
    """What an agent's loop is doing.

    While the loop waits, for exits, for other nodes or for workers to end within their grace, it makes progress. Otherwise it makes progress
    when it turns to something else, so that a step which does not return shows. Written by the loop, read by any thread.
    """

    def __init__(self) -> None:
        # Since when the loop has been busy with one thing (monotonic), and for how long it may. One object, so that a reader sees both.
        self._busy: tuple[float | None, float] = (_WAITING, 0.0)
        self._server: HealthCheckServer | None = None
        self._state = "starting"
        self._is_restarting = False
        self._measured_s: float | None = None
        self._detect_s: float | None = None

    def stalled_s(self) -> float:
        """Seconds since the last progress; 0 while the loop waits."""
        since, allowance_s = self._busy
        if since is _WAITING:
            return 0.0
        stalled_s = time.monotonic() - since
        return 0.0 if stalled_s <= allowance_s else stalled_s

    def idle(self) -> None:
        """The loop has not begun, or is over: nothing is expected of it."""
        self._busy = (_WAITING, 0.0)

    def busy(self, state: str | None = None, *, allowance_s: float = 0.0) -> None:
        """The loop turns to something else.

        Args:
            state: what it does, in the words of ``_rust.HealthServer.set_state``; ``None`` keeps the word.
            allowance_s: seconds that this may take without being taken for a stop.
        """
        self._busy = (time.monotonic(), allowance_s)
        self._enter(state)

    @contextmanager
    def waiting(self, state: str | None = None) -> Iterator[None]:
        """The loop waits for the length of a ``with`` block, which is progress.

        Args:
            state: as for :meth:`busy`.
        """
        self.idle()
        self._enter(state)
        try:
            yield
        finally:
            self.busy()

    @contextmanager
    def allowing(self, allowance_s: float) -> Iterator[None]:
        """What is done in a ``with`` block may take so many seconds."""
        self.busy(allowance_s=allowance_s)
        try:
            yield
        finally:
            self.busy()

    def attach(self, server: object, spec: WorkerSpec) -> None:
        """Tell a health server everything from now on, if it is one that can be told and is not told yet.

        Args:
            server: the server.
            spec: what the workers are.
        """
        if isinstance(server, HealthCheckServer) and server is not self._server:
            self._server = server
            self._tell("set_job", spec.rdzv_handler.get_run_id(), spec.role)
            self._tell("set_state", self._state)

    def started(self, workers: list[Worker]) -> None:
        """The workers run."""
        self._is_restarting = False
        told = [(worker.local_rank, worker.global_rank, worker.id) for worker in workers if isinstance(worker.id, int)]
        self._tell("set_workers", told)
        self.busy("running")

    def detected(self, latency_s: float) -> None:
        """A failure is being looked at, so many seconds after the exit."""
        self._detect_s = max(0.0, latency_s)

    def restarting(self, cause: Literal["failure", "membership"], reason: str) -> None:
        """The workers are to be started again.

        Args:
            cause: whether a worker failed, or a node came or went.
            reason: what happened.
        """
        self._tell("note_restart", cause, reason)
        self._is_restarting = True
        detect_s, self._detect_s = self._detect_s, None
        if detect_s is not None and cause == "failure":
            self._tell("observe_phase", "detect", detect_s)

    @contextmanager
    def phase(self, name: Literal["stop", "rendezvous", "spawn"]) -> Iterator[None]:
        """A ``with`` block is a part of a restart, if there is one: its duration goes to the health server."""
        self._measured_s = None
        began = time.monotonic()
        yield
        if self._is_restarting:
            took_s = time.monotonic() - began if self._measured_s is None else self._measured_s
            self._tell("observe_phase", name, took_s)

    def measured(self, took_s: float) -> None:
        """Somebody knows better how long the current phase took."""
        self._measured_s = took_s

    def _enter(self, state: str | None) -> None:
        if state is not None and state != self._state:
            self._state = state
            self._tell("set_state", state)

    def _tell(self, method: str, *arguments: Any) -> None:
        board: _rust.HealthServer | None = None if self._server is None else self._server.board
        if board is not None:
            # A run's id, say, may come from bytes that are no text.
            told = [
                value.encode("utf-8", "replace").decode() if isinstance(value, str) else value for value in arguments
            ]
            try:
                getattr(board, method)(*told)
            except RuntimeError:  # it is closed, or this is a forked child: nobody asks
                self._server = None


def failed_first_at_ns(result: RunResult) -> int | None:
    """Return when the first worker failed, in nanoseconds since the epoch, if that is known."""
    from ferroelastic.multiprocessing.errors._failures import failed_at_ns

    times = [failed_at_ns(failure) for failure in result.failures.values()]
    return min(times, default=None)


def cause_of(result: RunResult) -> str:
    """Say in a line what made a run unhealthy: which worker failed first, and how."""
    if not result.failures:
        return f"workers are {result.state.value}"
    from ferroelastic.multiprocessing.errors._failures import failed_at_ns

    rank, failure = min(result.failures.items(), key=lambda item: failed_at_ns(item[1]))
    how = f"exited with code {failure.exitcode}" if failure.exitcode >= 0 else f"was ended by {failure.signal_name()}"
    more = f", and {len(result.failures) - 1} more failed" if len(result.failures) > 1 else ""
    return f"rank {rank} (pid {failure.pid}) {how}{more}"


def exit_code_of(result: RunResult) -> int:
    """Return the exit code of a job that ends of this: that of the worker that failed first, 128+n for signal n."""
    if not result.failures:
        return 1
    from ferroelastic.multiprocessing.errors._failures import failed_at_ns

    return exit_code(min(result.failures.values(), key=failed_at_ns).exitcode)
