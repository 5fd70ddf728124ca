"""Signals to the agent: termination, repeated interrupts, forwarded and ignored signals.

Mirrors the part of ``torch.distributed.elastic.multiprocessing.api`` that has ``SignalException``. The rules:

* The first terminating signal raises :class:`SignalException` on the main thread, once. After that no handler raises.
* During a stop (:func:`shielded`) no handler raises either. The signal stays pending until the stop is finished.
* SIGTERM and SIGHUP never shorten a grace period, because schedulers send signals twice. The second SIGINT or SIGQUIT does, because a
  person sends it.
* A worker that the same signal ended up to 100 ms before the agent received it has not failed.
* If other code swallows the exception (``logging``, a destructor), the next wait raises it again.

Intended differences from torch: the previous handlers are restored; a SIGHUP that was ignored when the agent started stays ignored
(``nohup``); an unknown signal name is always a warning.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ferroelastic._compat import TorchCompatible
from ferroelastic._exit_codes import SIGNAL_BASE, exit_code

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from typing_extensions import Self

    from ferroelastic import _rust

__all__ = [
    "DEFAULT_SIGNALS",
    "SIGNALS_ENV",
    "Handling",
    "SignalException",
    "conclude",
    "forget_in_child",
    "ignore_the_rest",
    "is_impatient",
    "raise_pending",
    "received",
    "report",
    "resume",
    "shielded",
    "wait_for_same_signal",
    "was_before_signal",
]

DEFAULT_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
"""Names of the signals that end an agent by default."""
SIGNALS_ENV = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""Environment variable: names of the signals that end an agent, separated by commas."""

_INTERRUPTS = frozenset({signal.SIGINT, signal.SIGQUIT})
_INTERRUPTS_THAT_KILL = 2
_RESEND_DELAY_S = 0.001
_ONE_INSTANT_NS = 100_000_000

# Left out: SIGCHLD, SIGCONT, SIGURG and SIGWINCH, whose default action does not terminate; the stop signals of a terminal; the signals of
# faults in the process, after which it cannot continue; SIGPIPE and SIGXFSZ, which the interpreter ignores.
_SAFE_TO_IGNORE = [
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGTERM",
    "SIGUSR1",
    "SIGUSR2",
    "SIGALRM",
    "SIGVTALRM",
    "SIGPROF",
    "SIGIO",
    "SIGPWR",
    "SIGSTKFLT",
    "SIGXCPU",
]


class SignalException(TorchCompatible, Exception):  # noqa: N818 - torch's name
    """The agent's process received a terminating signal.

    Mirrors ``torch.distributed.elastic.multiprocessing.SignalException``. The handlers of :class:`Handling` raise it once, at any point
    of the main thread.

    Args:
        msg: text of the exception.
        sigval: the signal.
    """

    __torch_class__ = ("torch.distributed.elastic.multiprocessing.api", "SignalException")

    def __init__(self, msg: str, sigval: signal.Signals) -> None:
        super().__init__(msg)
        self.sigval = sigval


class _State:
    """Signals received since the outermost :class:`Handling` was installed."""

    def __init__(self) -> None:
        self.first: int | None = None  # not the exception, whose traceback would keep the interrupted frames alive
        self.first_at_ns = 0
        self.is_pending = False  # the first signal was not handled yet
        self.is_raised = False  # SignalException was raised; other code may have swallowed it
        self.is_concluded = False  # the agent is ending: there is nothing to interrupt
        self.interrupts = 0
        self.resent: set[int] = set()


_state = _State()
_active: weakref.WeakSet[Handling] = weakref.WeakSet()
_shorten: list[Callable[[], object]] = []  # one for each stop in progress
_warnings: list[str] = []
_reported: set[int] = set()
_resend_lock = threading.Lock()


def _terminate_process_handler(signum: int, frame: FrameType | None) -> None:
    """Record a terminating signal. Raise :class:`SignalException` if it is the first one and no stop is in progress."""
    if not _active:
        raise _exception(signum)
    state = _state
    is_resent = signum in state.resent
    state.resent.discard(signum)
    if signum in _INTERRUPTS and not is_resent:
        state.interrupts += 1
    is_first = state.first is None
    if state.first is None:
        state.first, state.first_at_ns = signum, time.monotonic_ns()
        state.is_pending = not state.is_concluded
    # Only once, so that a flood of signals costs little.
    if state.interrupts == _INTERRUPTS_THAT_KILL and not is_resent and signum in _INTERRUPTS:
        for shorten in _shorten:
            with suppress(OSError, RuntimeError):  # the engine is closed; code interrupted by a handler catches nothing
                shorten()
    if state.is_concluded or _shorten or not state.is_pending or not (is_first or is_resent):
        return
    if _is_in_logging(frame):
        _resend_soon(signum)
        return
    state.is_raised = True
    raise _exception(state.first)


def _exception(signum: int) -> SignalException:
    sigval = signal.Signals(signum)
    return SignalException(f"Process {os.getpid()} got signal: {sigval}", sigval=sigval)


def _is_in_logging(frame: FrameType | None) -> bool:
    """Return whether ``logging`` was interrupted. It swallows every exception as a failure to write the record."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "logging":
            return True
        frame = frame.f_back
    return False


def _resend_soon(signum: int) -> None:
    state = _state

    def send() -> None:
        with _resend_lock:
            # Not if a wait has raised it in the meantime, and never after the previous handlers were restored.
            if _active and state is _state and state.is_pending and not state.is_raised:
                state.resent.add(signum)
                signal.pthread_kill(threading.main_thread().ident or 0, signum)

    timer = threading.Timer(_RESEND_DELAY_S, send)
    timer.daemon = True
    timer.start()


def _note_handler(signum: int, _frame: FrameType | None) -> None:
    """Record an ignored signal."""
    if signum not in _reported:
        _reported.add(signum)
        name = _name(signum)
        _warnings.append(
            f"Ignored {name}: its default action would end this process and the workers. To end the job with it, use "
            f"--signals-to-handle={name}; to forward it to the workers, use --signals-to-forward={name}"
        )


def _forward_handler(signum: int, _frame: FrameType | None) -> None:
    """Forward a signal to the workers."""
    reached = 0
    for handling in _active:
        if handling.receiver is not None:
            with suppress(OSError, RuntimeError):  # the engine is closed
                reached += handling.receiver(signum)
    if reached == 0:
        _warnings.append(f"{_name(signum)} was not forwarded: no worker is running")


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"SIGRTMIN+{signum - signal.SIGRTMIN}"


def _logger() -> logging.Logger:
    """The logger; ``logging`` is not loaded for ``--help``."""
    from ferroelastic.utils.logging import get_logger

    return get_logger(__name__)


def report() -> None:
    """Log the warnings of the handlers. A handler must not log itself, because it may have interrupted ``logging``."""
    while _warnings:
        _logger().warning("%s", _warnings.pop(0))


class Handling:
    """Signal handlers that are installed for a limited time. Afterwards the previous handlers are restored.

    Only the main thread can install handlers; on another thread this has no effect. Instances may be nested: one for an agent's run, and
    one for each group of workers in it. Installing the outermost one forgets all received signals.

    Args:
        names: comma-separated names of the signals that raise :class:`SignalException`: ``"SIGTERM,SIGINT"``.
        forward: comma-separated names of signals that are forwarded to the workers.
        receiver: called with each forwarded signal. Returns the number of workers that it reached.
    """

    def __init__(
        self, names: str = DEFAULT_SIGNALS, *, forward: str = "", receiver: Callable[[int], int] | None = None
    ) -> None:
        self._names = names
        self._forward = forward
        self.receiver = receiver
        self._former: dict[int, Any] = {}
        self._is_installed = False

    def install(self) -> None:
        """Install the handlers."""
        global _state  # noqa: PLW0603 - signals are the process's
        if threading.current_thread() is not threading.main_thread():
            return
        if not _active:
            _state = _State()  # an instance that was never restored may have left signals
        _active.add(self)
        self._is_installed = True
        self._install(self._names, _terminate_process_handler)
        self._install(self._forward, _forward_handler)

    def _install(self, names: str, handler: Callable[[int, FrameType | None], None]) -> None:
        logger = _logger()
        for name in filter(None, (part.strip() for part in names.split(","))):
            try:
                number = signal.Signals[name]
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    logger.info("SIGHUP stays ignored, because it was ignored when this process started (nohup)")
                    continue
                former = signal.signal(number, handler)
            except KeyError:
                logger.warning("Failed to register signal handler for %s: no such signal", name)
            except (OSError, RuntimeError, ValueError) as error:
                logger.warning("Failed to register signal handler for %s: %s", name, error)
            else:
                if former not in (_terminate_process_handler, _forward_handler):
                    self._former[number] = former
                logger.info("Registered signal handler for %s", name)

    def restore(self) -> SignalException | None:
        """Restore the previous handlers, except those that were replaced since. Idempotent.

        Returns:
            The pending signal that was never raised, if this is the outermost instance; else ``None``.
        """
        global _state
        if not self._is_installed:
            return None
        self._is_installed = False
        with _resend_lock:
            self._restore_handlers()
        if _active:
            return None
        state, _state = _state, _State()
        return None if state.first is None or state.is_raised or not state.is_pending else _exception(state.first)

    def _restore_handlers(self) -> None:
        os.getppid()  # any system call: a resent signal in flight is handled when it returns
        for number, former in self._former.items():
            if signal.getsignal(number) in (_terminate_process_handler, _forward_handler):
                # A handler that was not installed from Python cannot be restored.
                signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former.clear()
        _active.discard(self)

    def __enter__(self) -> Self:
        """Install the handlers."""
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        self.restore()


def ignore_the_rest(handled: str) -> dict[int, Any]:
    """Ignore each unhandled signal whose default action would terminate this process. The first one of each is reported.

    Installs Python handlers instead of ``SIG_IGN``, so that executed programs start with the default dispositions.

    Args:
        handled: comma-separated names of the signals that are handled, now or later.

    Returns:
        The previous dispositions of the changed signals, by number.
    """
    numbers = [getattr(signal, name) for name in _SAFE_TO_IGNORE if hasattr(signal, name)]
    numbers += range(signal.SIGRTMIN, signal.SIGRTMAX + 1)
    former = {}
    kept = {getattr(signal, name.strip(), None) for name in handled.split(",")}
    for number in filter(lambda number: number not in kept, numbers):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            former[int(number)] = signal.signal(number, _note_handler)
    return former


@contextmanager
def shielded(shorten: Callable[[], object]) -> Iterator[None]:
    """Protect a stop in a ``with`` block: no handler raises.

    Args:
        shorten: called from the signal handler at the second SIGINT or SIGQUIT. Ends the grace period.
    """
    _shorten.append(shorten)
    try:
        yield
    finally:
        _shorten.remove(shorten)


def is_impatient() -> bool:
    """Return whether SIGINT or SIGQUIT was received twice, which ends a grace period."""
    return bool(_active) and _state.interrupts >= _INTERRUPTS_THAT_KILL


def received() -> SignalException | None:
    """Return the first terminating signal, or ``None`` if none was received."""
    return None if _state.first is None or not _active else _exception(_state.first)


def was_before_signal(at_ns: int, returncode: int | None = 0) -> bool:
    """Return whether an event happened before the first terminating signal was received.

    The end of a worker by the same signal up to 100 ms before does not count: schedulers signal workers and agent at one instant.

    Args:
        at_ns: time of the event, ``CLOCK_MONOTONIC`` in nanoseconds.
        returncode: exit code of the worker if the event is its end, ``-n`` for signal n.
    """
    first = _state.first
    if first is None:
        return True
    return at_ns < _state.first_at_ns - (_ONE_INSTANT_NS if _signal_of(returncode) == first else 0)


def wait_for_same_signal(exits: Iterable[_rust.Exit]) -> None:
    """If a terminating signal has ended a worker, wait up to 100 ms after that for the same signal to this process.

    Schedulers signal all processes of a step at one instant, and the end of a worker may be seen first. It is then no failure.

    Args:
        exits: the ends of workers so far.

    Raises:
        SignalException: the signal was received.
    """
    if threading.current_thread() is not threading.main_thread() or _state.first is not None:
        return
    for ended in exits:
        number = 0 if ended.stopped else _signal_of(ended.returncode)
        if number and signal.getsignal(number) is _terminate_process_handler:
            time.sleep(max(0, ended.monotonic_ns + _ONE_INSTANT_NS - time.monotonic_ns()) / 1e9)


def _signal_of(returncode: int | None) -> int:
    """Return the signal that ended a worker, or a child of its shell (128+n); 0 for another exit code."""
    number = exit_code(returncode) - SIGNAL_BASE
    return number if 0 < number < signal.NSIG else 0


def conclude() -> None:
    """Mark the received signal as handled. From now on no handler raises, because a signal can no longer change the outcome."""
    if _active:
        _state.is_concluded, _state.is_pending = True, False


def resume() -> None:
    """Undo :func:`conclude`: the agent continues and handlers may raise again."""
    _state.is_concluded = False


def raise_pending() -> None:
    """Raise the pending terminating signal, unless a stop is in progress. Does nothing on other threads than the main thread.

    Raises:
        SignalException: a signal is pending.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and _active and _state.is_pending and not _shorten and _state.first is not None:
        _state.is_raised = True
        raise _exception(_state.first)


def forget_in_child(numbers: Iterable[int]) -> None:
    """In a forked worker: reset the signals handled by this module or by torch to their default dispositions.

    Args:
        numbers: numbers of the signals to check.
    """
    names = {"_terminate_process_handler", "_forward_handler", "_note_handler"}
    for number in numbers:
        if getattr(signal.getsignal(number), "__name__", None) in names:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
