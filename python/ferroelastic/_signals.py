"""Signals to the agent: the one that ends the job, impatience, and those that end nothing.

Mirrors the part of ``torch.distributed.elastic.multiprocessing.api`` that has ``SignalException``. The rules:

* The first ending signal raises :class:`SignalException` on the main thread, once. From then on no handler raises.
* While a stop is under way (:func:`shielded`) no handler raises either. The signal stays pending, and the agent asks for it when the
  stop is over.
* Machines send signals twice. So SIGTERM and SIGHUP never shorten a grace period. The second SIGINT or SIGQUIT does: a person sends it.
* A pending signal that something swallowed (``logging``, a destructor) is raised again by the next wait.

Intended differences from torch: the handlers are restored; a SIGHUP that was ignored when the agent started stays ignored, so that
``nohup`` works; a name that is no signal is a warning whatever it is.
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

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from typing_extensions import Self

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
    "was_before_signal",
]

DEFAULT_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
"""The signals that end an agent by default."""
SIGNALS_ENV = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""Environment variable: names of the signals that end an agent, separated by commas."""

_IMPATIENT = frozenset({signal.SIGINT, signal.SIGQUIT})
_IMPATIENCE = 2
_AGAIN_S = 0.001

# Not SIGCHLD, SIGCONT, SIGURG and SIGWINCH, which end nothing; not the stop signals of a terminal; not the signals of a fault in the
# process itself, after which it cannot go on; not SIGPIPE and SIGXFSZ, which the interpreter ignores.
_HARMLESS_IF_IGNORED = [
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
    """The agent's process got a signal that ends it.

    Mirrors ``torch.distributed.elastic.multiprocessing.SignalException``. It is raised on the main thread by the handlers of
    :class:`Handling`, anywhere, once.

    Args:
        msg: what happened.
        sigval: the signal.
    """

    __torch_class__ = ("torch.distributed.elastic.multiprocessing.api", "SignalException")

    def __init__(self, msg: str, sigval: signal.Signals) -> None:
        super().__init__(msg)
        self.sigval = sigval


class _State:
    """What has come since the outermost :class:`Handling` was installed."""

    def __init__(self) -> None:
        self.first: int | None = None  # not the exception: its traceback holds on to all that was at work
        self.first_at_ns = 0
        self.is_pending = False  # nobody has dealt with the first signal yet
        self.is_raised = False  # somebody may have seen it, or swallowed it
        self.is_concluded = False  # the agent ends, so that there is nothing left to interrupt
        self.interrupts = 0
        self.sent_again: set[int] = set()


_state = _State()
_active: weakref.WeakSet[Handling] = weakref.WeakSet()
_shorten: list[Callable[[], object]] = []  # one for each stop that is under way
_remarks: list[str] = []
_noted: set[int] = set()
_again_lock = threading.Lock()


def _terminate_process_handler(signum: int, frame: FrameType | None) -> None:
    """Take note of an ending signal, and raise :class:`SignalException` if it is the first and nothing is being stopped."""
    if not _active:
        raise _exception(signum)
    state = _state
    is_again = signum in state.sent_again
    state.sent_again.discard(signum)
    if signum in _IMPATIENT and not is_again:
        state.interrupts += 1
    is_first = state.first is None
    if state.first is None:
        state.first, state.first_at_ns = signum, time.monotonic_ns()
        state.is_pending = not state.is_concluded
    if state.interrupts == _IMPATIENCE and not is_again and signum in _IMPATIENT:  # once: a storm is to cost little
        for shorten in _shorten:
            with suppress(OSError, RuntimeError):  # the engine is closed; where a handler runs, nothing catches
                shorten()
    if state.is_concluded or _shorten or not state.is_pending or not (is_first or is_again):
        return
    if _is_in_logging(frame):
        _send_again_soon(signum)
        return
    state.is_raised = True
    raise _exception(state.first)


def _exception(signum: int) -> SignalException:
    sigval = signal.Signals(signum)
    return SignalException(f"Process {os.getpid()} got signal: {sigval}", sigval=sigval)


def _is_in_logging(frame: FrameType | None) -> bool:
    """Whether ``logging`` is at work. It takes any exception for a failure to write the record, and the signal would be lost."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "logging":
            return True
        frame = frame.f_back
    return False


def _send_again_soon(signum: int) -> None:
    state = _state

    def send() -> None:
        with _again_lock:
            # Not if a wait has raised it meanwhile, and never once the handlers of before are back.
            if _active and state is _state and state.is_pending and not state.is_raised:
                state.sent_again.add(signum)
                signal.pthread_kill(threading.main_thread().ident or 0, signum)

    again = threading.Timer(_AGAIN_S, send)
    again.daemon = True
    again.start()


def _note_handler(signum: int, _frame: FrameType | None) -> None:
    """Take note of a signal that ends nothing."""
    if signum not in _noted:
        _noted.add(signum)
        name = _name(signum)
        _remarks.append(
            f"Ignored {name}: its default action would end this process and the workers. To end the job with it, use "
            f"--signals-to-handle={name}; to forward it to the workers, use --signals-to-forward={name}"
        )


def _forward_handler(signum: int, _frame: FrameType | None) -> None:
    """Forward a signal to the workers."""
    reached = 0
    for handling in _active:
        if handling.receiver is not None:
            with suppress(OSError, RuntimeError):  # as above
                reached += handling.receiver(signum)
    if reached == 0:
        _remarks.append(f"{_name(signum)} was not forwarded: no worker is running")


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
    """Log what the handlers had to say. They do not log themselves: they may have interrupted a log record."""
    while _remarks:
        _logger().warning("%s", _remarks.pop(0))


class Handling:
    """Handlers that are installed for a time; those of before come back.

    Only the main thread can install handlers; on another one this changes nothing. May be nested: an agent's run, and each
    group of workers in it. The outermost one begins with nothing received.

    Args:
        names: comma-separated names of the signals that raise :class:`SignalException`: ``"SIGTERM,SIGINT"``.
        forward: comma-separated names of signals that are forwarded to the workers.
        receiver: called with each forwarded signal; returns the number of workers that it reached.
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
            _state = _State()  # of one that was never restored something may be left
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
                    logger.info("Left SIGHUP ignored, as this process was started with it (nohup)")
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
        """Let the handlers of before come back, where nobody has changed them since. Does nothing the second time.

        Returns:
            The signal that came and was never raised, if this was the outermost one and nobody has dealt with it.
        """
        global _state
        if not self._is_installed:
            return None
        self._is_installed = False
        with _again_lock:
            self._restore_handlers()
        if _active:
            return None
        state, _state = _state, _State()
        return None if state.first is None or state.is_raised or not state.is_pending else _exception(state.first)

    def _restore_handlers(self) -> None:
        os.getppid()  # any system call: a signal that was sent again, and is on its way, is handled when it returns
        for number, former in self._former.items():
            if signal.getsignal(number) in (_terminate_process_handler, _forward_handler):
                # A handler that was not installed from Python cannot be put back.
                signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former.clear()
        _active.discard(self)

    def __enter__(self) -> Self:
        """Install the handlers."""
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        """Let the handlers of before come back."""
        self.restore()


def ignore_the_rest(handled: str) -> dict[int, Any]:
    """Ignore each signal that would end this process, is not handled and can be ignored; each is reported once.

    Python handlers, not ``SIG_IGN``: programs that this process executes have the default dispositions.

    Args:
        handled: comma-separated names of the signals that are handled, now or later.

    Returns:
        The former dispositions of the signals that were changed.
    """
    numbers = [getattr(signal, name) for name in _HARMLESS_IF_IGNORED if hasattr(signal, name)]
    numbers += range(signal.SIGRTMIN, signal.SIGRTMAX + 1)
    former = {}
    kept = {getattr(signal, name.strip(), None) for name in handled.split(",")}
    for number in filter(lambda number: number not in kept, numbers):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            former[int(number)] = signal.signal(number, _note_handler)
    return former


@contextmanager
def shielded(shorten: Callable[[], object]) -> Iterator[None]:
    """A stop is under way for the length of the ``with`` block: no handler raises.

    Args:
        shorten: called when a person becomes impatient, from within a signal handler.
    """
    _shorten.append(shorten)
    try:
        yield
    finally:
        _shorten.remove(shorten)


def is_impatient() -> bool:
    """Whether a person has sent a second SIGINT or SIGQUIT, which ends a grace."""
    return bool(_active) and _state.interrupts >= _IMPATIENCE


def received() -> SignalException | None:
    """Return the ending signal that has come, if one has."""
    return None if _state.first is None or not _active else _exception(_state.first)


def was_before_signal(at_ns: int) -> bool:
    """Whether something happened before the first ending signal came.

    Args:
        at_ns: when it happened, ``CLOCK_MONOTONIC`` in nanoseconds.
    """
    return _state.first is None or at_ns < _state.first_at_ns


def conclude() -> None:
    """From here on no handler raises: a signal that has come was dealt with, and one that comes changes nothing any more."""
    if _active:
        _state.is_concluded, _state.is_pending = True, False


def resume() -> None:
    """Handlers may raise again: the agent goes on after all."""
    _state.is_concluded = False


def raise_pending() -> None:
    """Raise the ending signal that has come, unless it was dealt with or something is being stopped. On the main thread only.

    Raises:
        SignalException: it has come.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and _active and _state.is_pending and not _shorten and _state.first is not None:
        _state.is_raised = True
        raise _exception(_state.first)


def forget_in_child(numbers: Iterable[int]) -> None:
    """In a forked worker: give signals with a handler of this module, or of torch's, their default disposition."""
    names = {"_terminate_process_handler", "_forward_handler", "_note_handler"}
    for number in numbers:
        if getattr(signal.getsignal(number), "__name__", None) in names:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
