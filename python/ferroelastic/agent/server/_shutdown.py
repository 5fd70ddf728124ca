"""Shutdown at the end of an agent's run. Signals cannot skip it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ferroelastic._compat import family
from ferroelastic._signals import SignalException
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from ferroelastic.agent.server._activity import Activity

__all__ = ["shut_down"]

logger = get_logger(__name__)


def shut_down(
    shutdown: Callable[..., None], death_sig: signal.Signals | None, timeout: int, activity: Activity
) -> BaseException | None:
    """Call an agent's ``_shutdown`` until it completes.

    The agent's own signal handlers do not raise here. Other handlers may raise; the shutdown is then called again and keeps its deadline.

    Args:
        shutdown: the method.
        death_sig: first signal to the workers. ``None`` uses the default of the method.
        timeout: grace period in seconds until the workers are killed.
        activity: gets the state ``stopping``.

    Returns:
        The last :class:`SignalException` that interrupted the shutdown, or ``None``.
    """
    interruption: BaseException | None = None
    while True:
        try:
            activity.busy("stopping")
            with nullcontext() if death_sig is None else activity.phase("stop"):
                _call(shutdown, death_sig, timeout)
        except family(SignalException) as error:  # noqa: PERF203 - a loop over interruptions
            logger.warning("Received %s death signal while shutting down", error.sigval)
            interruption = error
        else:
            return interruption


def _call(shutdown: Callable[..., None], death_sig: signal.Signals | None, timeout: int) -> None:
    """Call ``_shutdown`` with the arguments that it accepts: subclasses for torch before 2.12 have no ``timeout``."""
    import inspect

    signature = inspect.signature(shutdown)
    positional: tuple[Any, ...] = () if death_sig is None else (death_sig,)
    forms: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        (positional, {"timeout": timeout}),
        (positional, {}),
        ((), {}),
    ]
    for args, kwargs in forms:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            continue
        break
    shutdown(*args, **kwargs)
