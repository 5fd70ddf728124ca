"""The agent's side of warm workers: starts the zygote, and decides before each start whether its children are used."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ferroelastic import _leftovers
from ferroelastic._engine import get_engine
from ferroelastic._process import open_files_of_workers
from ferroelastic._wait import wait_for_event
from ferroelastic._warm.cold import ColdError
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ferroelastic import _rust
    from ferroelastic._warm.target import Target

__all__ = ["WarmWorkers"]

logger = get_logger(__name__)

TIMEOUT_ENV = "FERROELASTIC_WARM_TIMEOUT_S"
"""Environment variable: seconds until a zygote that still imports is killed. Default 300."""

_DEFAULT_TIMEOUT_S = 300.0
_CLOSE_TIMEOUT_S = 5.0
_START_DELAY_S = 0.3
"""From the start of the workers to that of the zygote in the background. The workers start undisturbed."""
_WAIT_BEFORE_IMPORT_S = 1.0
"""Time that a node waits for other nodes before it starts its zygote."""
_FORK_TIMEOUT_S = 1.0
"""Upper bound of the wait for children of a zygote that is ready. A fork takes milliseconds, an import takes seconds."""
_MAX_CRASHES = 2
_MAX_ZYGOTES = 5

_CRASHES = frozenset(
    -number
    for number in (
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,
        signal.SIGTRAP,
    )
)
_NOT_ENDED = "the imports of the zygote have not ended yet"
_UNSET = "\1"  # as in zygote.py
_HOOK = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hook")


class WarmWorkers:
    """The warm workers of an agent.

    Call :meth:`pool_for` before each start of the workers, and :meth:`started` after it.

    Args:
        children: number of workers to keep parked.
        imports: modules to import, and functions to call as ``package.module:function``.
        preload: whether the first start waits for the imports.
        on_refusal: called with the reason if workers start cold.
    """

    def __init__(
        self, *, children: int, imports: Sequence[str], preload: bool, on_refusal: Callable[[str], object]
    ) -> None:
        self._children = children
        self._imports = tuple(imports)
        self._preload = preload
        self._is_first = True
        self._is_given_up = False
        self._zygotes = 0
        self._crashes = 0
        self._pool: _rust.WarmPool | None = None
        self._target: Target | None = None  # of the pool
        self._next_target: Callable[[], Target] | None = None
        self._group: _rust.Group | None = None
        self._on_refusal = on_refusal
        self._timer: threading.Timer | None = None
        self._last_reason: str | None = None  # of the last start, if it was cold

    @property
    def preloads(self) -> bool:
        """Whether the next start waits for the imports."""
        return self._preload and self._is_first

    def longest_preload_s(self) -> float:
        """Return an upper bound of the duration of the next :meth:`pool_for` in seconds."""
        return _FORK_TIMEOUT_S + (_import_timeout_s() if self.preloads else 0.0)

    def pool_for(
        self,
        entrypoint: str | Callable[..., Any],
        args: Mapping[int, Sequence[Any]],
        envs: Mapping[int, Mapping[str, str]],
        *,
        is_bound: bool = False,
        obstacle: str | None = None,
    ) -> _rust.WarmPool | None:
        """Return the pool for the next start of the workers; ``None`` for a cold start.

        The log has the reason of a cold start. A reason of several starts in a row is logged once.

        Args:
            entrypoint: program, or function for processes of the start method ``spawn``.
            args: arguments of each worker by local rank.
            envs: environment variables of each worker by local rank, added to the environment of this process.
            is_bound: whether each worker is bound to CPUs of its own.
            obstacle: a reason for a cold start that the caller knows.

        Raises:
            SignalException: a terminating signal arrived during a preload.
        """
        preloads, is_first = self.preloads, self._is_first
        was_due = self._cancel_timer()
        self._is_first, self._next_target = False, None
        if self._is_given_up:
            return None
        try:
            self._check(obstacle)
            find_target = partial(_target_of, entrypoint, args, envs, is_bound=is_bound)
            if is_first and not preloads and not self._is_ready():
                self._next_target = find_target  # called after the start, which it would delay
                return None
            target = find_target()
            self._next_target = lambda: target
            pool = self._usable_pool(target, len(args), preloads=preloads, was_due=was_due)
        except ColdError as error:
            reason = str(error)  # a log record with the exception would keep its frames alive
            if not error.is_logged and reason != self._last_reason:
                logger.warning("The workers start without warm imports: %s", reason)
            self._last_reason = reason
            self._on_refusal(reason)
            return None
        self._last_reason = None
        return pool

    def _is_ready(self) -> bool:
        return self._pool is not None and self._pool.state().phase == "ready"

    @contextmanager
    def importing_while_waiting(
        self,
        entrypoint: str | Callable[..., Any],
        args: Mapping[int, Sequence[Any]],
        envs: Mapping[int, Mapping[str, str]],
        *,
        is_bound: bool = False,
    ) -> Iterator[None]:
        """Start a zygote if a ``with`` block that waits for other nodes lasts long. A spare node then starts warm.

        Args:
            entrypoint: as for :meth:`pool_for`.
            args: as for :meth:`pool_for`.
            envs: as for :meth:`pool_for`. Values of a round are ignored.
            is_bound: as for :meth:`pool_for`.
        """
        if not self._is_first or self._pool is not None:
            yield
            return
        self._open_later(_WAIT_BEFORE_IMPORT_S, partial(_target_of, entrypoint, args, envs, is_bound=is_bound))
        try:
            yield
        finally:
            self._cancel_timer()

    def _open_later(self, delay_s: float, target: Callable[[], Target]) -> None:
        """Start a zygote in the background after ``delay_s`` seconds, unless :meth:`_cancel_timer` is called before."""

        def open_now() -> None:
            try:
                self._open(target(), self._children, in_background=True)
            except ColdError as error:
                self._last_reason = str(error)
                logger.warning("The next start of the workers has no warm imports: %s", self._last_reason)
                self._on_refusal(self._last_reason)

        self._timer = timer = threading.Timer(delay_s, open_now)
        timer.daemon = True
        timer.start()

    def _cancel_timer(self) -> bool:
        """Cancel the start of a zygote; return whether it was still due."""
        timer, self._timer = self._timer, None
        if timer is None:
            return False
        timer.cancel()
        timer.join()
        return self._pool is None

    def preload_fork_server(self, start_method: str) -> None:
        """For function workers: let the fork server of ``multiprocessing`` import the modules.

        Args:
            start_method: ``forkserver``, or ``fork``, which starts cold.
        """
        if not self._is_first:
            return
        self._is_first = False
        if start_method != "forkserver":
            reason = f"function workers of the start method {start_method} cannot be warm; use forkserver or spawn"
        else:
            from ferroelastic._warm.fork_server import preload

            if preload(self._imports):
                return
            reason = "the fork server of this process was started before; start the agent before other processes"
        logger.warning("The workers start without warm imports: %s", reason)
        self._on_refusal(reason)

    def started(self, group: _rust.Group | None) -> None:
        """Note the started workers. Start a zygote in the background if none runs.

        Args:
            group: the workers, or ``None`` if the engine did not start them.
        """
        self._group = group
        if self._pool is not None and (self._children == 0 or self._pool.state().phase == "lost"):
            self.close()
        target = self._next_target
        if self._pool is not None:
            self._pool.resize(self._children, delayed=True)
        elif target is not None and not self._is_given_up and self._children > 0:
            self._open_later(_START_DELAY_S, target)

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Kill the zygote and its parked children. Released workers are not affected.

        Args:
            timeout_s: upper bound of the wait for their ends, in seconds. With 0, a later call can wait.
        """
        self._cancel_timer()
        if self._pool is not None and self._pool.close(timeout_s):
            self._pool = self._target = None

    def _usable_pool(self, target: Target, workers: int, *, preloads: bool, was_due: bool) -> _rust.WarmPool:
        if self._pool is not None and self._target is not None:
            difference = self._target.difference(target)
            if difference is not None:
                self.close()
                raise ColdError(difference)
        if self._pool is None:
            if not preloads:
                raise ColdError(_NOT_ENDED if was_due else "there is no zygote")
            self._open(target, max(workers, self._children), in_background=False)
        pool = self._pool
        if pool is None:
            raise ColdError("there is no zygote")
        self._wait_for_children(pool, workers if preloads else min(workers, self._children), preloads=preloads)
        changed = pool.find_changed()
        if changed is not None:
            self.close()
            raise ColdError(f"{changed} has changed since its import")
        return pool

    def _wait_for_children(self, pool: _rust.WarmPool, needed: int, *, preloads: bool) -> None:
        """Wait until the children are parked. Wait for imports only if this start is a preload.

        Raises:
            ColdError: no child can be used now.
        """
        deadline = None
        while True:
            generation = pool.generation
            state = pool.state()
            if state.parked >= needed:
                return
            is_late = deadline is not None and (bool(state.shortage) or time.monotonic() >= deadline)
            if is_late or state.phase in {"lost", "refused"}:
                if state.parked:
                    return
                raise self._without_children(state)
            if state.phase == "importing":
                if not preloads:
                    raise ColdError(_NOT_ENDED)
                wait_for_event(pool, generation)
                continue
            if deadline is None:
                deadline = time.monotonic() + _FORK_TIMEOUT_S
                pool.resize(max(needed, self._children))  # orders the missing children at once
            wait_for_event(pool, generation, deadline - time.monotonic())

    def _without_children(self, state: _rust.WarmState) -> ColdError:
        """Return the reason why no child is parked. Drop a zygote that cannot fork any more."""
        if state.phase == "ready" and state.shortage:
            return ColdError(state.shortage, is_logged=True)
        self.close()
        if state.phase == "ready":  # it may be suspended
            return ColdError(f"the zygote has forked no worker within {_FORK_TIMEOUT_S:g} s")
        self._is_given_up = state.phase == "refused"
        return ColdError(state.reason, is_logged=True)

    def _open(self, target: Target, children: int, *, in_background: bool) -> None:
        """Start a zygote.

        Raises:
            ColdError: it cannot be started, or too many were lost.
        """
        from ferroelastic import _rust

        if self._zygotes >= _MAX_ZYGOTES:
            self._is_given_up = True
            raise ColdError(f"{self._zygotes} zygotes have ended or do not fit the workers any more")
        hook = os.path.join(_HOOK, "sitecustomize.py")
        if not os.path.isfile(hook):  # the zygote would run the script
            self._is_given_up = True
            raise ColdError(f"{hook} is missing")
        self._zygotes += 1
        python_path = target.variables.get("PYTHONPATH")
        command = _rust.Command(
            target.command,
            {**target.variables, "PYTHONPATH": _HOOK if not python_path else f"{_HOOK}{os.pathsep}{python_path}"},
            stdout=os.devnull,
            stderr=os.devnull,
            open_files=open_files_of_workers(),
        )
        fields = (
            str(len(target.path)),
            *target.path,
            _UNSET if python_path is None else python_path,
            "1" if in_background else "",
            ",".join(target.of_worker),
            *self._imports,
        )
        configuration = "\0".join(fields).encode(errors="surrogateescape")
        try:
            self._pool = get_engine().warm_pool(
                command, configuration, children=children, timeout_s=_import_timeout_s()
            )
        except OSError as error:
            raise ColdError(f"the zygote cannot be started: {error}") from error
        self._target = target
        run = _leftovers.current()
        if run is not None:
            run.zygote_sessions.append(self._pool.state().zygote)

    def _check(self, obstacle: str | None) -> None:
        """Check the obstacle, and count consecutive rounds in which a warm worker crashed.

        Raises:
            ColdError: there is an obstacle, or the imports may have left a state that workers do not survive.
        """
        if obstacle is not None:
            raise ColdError(obstacle)
        group, self._group = self._group, None
        if group is None or not group.warm:
            return
        warm = set(group.warm)
        crashes = [
            ended
            for ended in group.exits()
            if ended.index in warm and not ended.stopped and ended.returncode in _CRASHES
        ]
        self._crashes = self._crashes + 1 if crashes else 0
        if self._crashes >= _MAX_CRASHES:
            self._is_given_up = True
            self.close()
            name = signal.Signals(-(crashes[0].returncode or 0)).name
            raise ColdError(f"warm workers crashed in {self._crashes} rounds in a row ({name})")


def _target_of(
    entrypoint: str | Callable[..., Any],
    args: Mapping[int, Sequence[Any]],
    envs: Mapping[int, Mapping[str, str]],
    *,
    is_bound: bool,
) -> Target:
    from ferroelastic._warm.target import target_of  # late: a cold first start does not wait for this import

    return target_of(entrypoint, args, envs, is_bound=is_bound)


def _import_timeout_s() -> float:
    text = os.environ.get(TIMEOUT_ENV)
    if text is None:
        return _DEFAULT_TIMEOUT_S
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = -1.0
    if timeout_s > 0:
        return timeout_s
    logger.warning("%s=%r is not a positive number of seconds; using %g", TIMEOUT_ENV, text, _DEFAULT_TIMEOUT_S)
    return _DEFAULT_TIMEOUT_S
