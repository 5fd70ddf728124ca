"""Signals that end an agent, as exceptions.

Mirrors the part of ``torch.distributed.elastic.multiprocessing.api`` that has ``SignalException``. Intended differences: a SIGHUP that
was ignored when the agent started stays ignored, so that ``nohup`` works, and a name that is no signal is a warning whatever it is.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

from ferroelastic._compat import TorchCompatible
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["SignalException", "install_signal_handlers"]

logger = get_logger(__name__)

_AGAIN_S = 0.001
_sent_again: set[int] = set()


class SignalException(TorchCompatible, Exception):  # noqa: N818 - torch's name
    """The agent's process got a signal that ends it.

    Mirrors ``torch.distributed.elastic.multiprocessing.SignalException``. It is raised on the main thread by the handlers of
    :func:`install_signal_handlers`, anywhere; who swallows it makes the process deaf to the signal.

    Args:
        msg: what happened.
        sigval: the signal.
    """

    def __init__(self, msg: str, sigval: signal.Signals) -> None:
        super().__init__(msg)
        self.sigval = sigval


def _terminate_process_handler(signum: int, frame: FrameType | None) -> None:
    """Raise :class:`SignalException` for ``signum``.

    Not where ``logging`` is at work: it takes any exception for a failure to write the record, and the signal would be lost. It is
    sent again until it finds the main thread elsewhere.
    """
    if _is_in_logging(frame):
        if signum not in _sent_again:  # one stands for all that come meanwhile, as in the kernel
            _sent_again.add(signum)
            again = threading.Timer(_AGAIN_S, _send_again, (signum,))
            again.daemon = True
            again.start()
        return
    sigval = signal.Signals(signum)
    raise SignalException(f"Process {os.getpid()} got signal: {sigval}", sigval=sigval)


def _send_again(signum: int) -> None:
    _sent_again.discard(signum)
    os.kill(os.getpid(), signum)


def _is_in_logging(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "logging":
            return True
        frame = frame.f_back
    return False


def install_signal_handlers(names: str) -> None:
    """Let the named signals raise :class:`SignalException` on the main thread.

    Only the main thread can do that; on another one this warns and changes nothing.

    Args:
        names: comma-separated names of signals, ``"SIGTERM,SIGINT"``.
    """
    if threading.current_thread() is not threading.main_thread():
        logger.warning(
            "Failed to register signal handlers since torchelastic is running on a child thread. "
            "This could lead to orphaned worker processes if the torchrun is terminated."
        )
        return
    for name in filter(None, (part.strip() for part in names.split(","))):
        try:
            number = signal.Signals[name]
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                logger.info("Left SIGHUP ignored, as this process was started with it (nohup)")
                continue
            signal.signal(number, _terminate_process_handler)
        except KeyError:
            logger.warning("Failed to register signal handler for %s: no such signal", name)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("Failed to register signal handler for %s: %s", name, error)
        else:
            logger.info("Registered signal handler for %s", name)
