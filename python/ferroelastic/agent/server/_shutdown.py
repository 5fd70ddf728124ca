"""The shutdown at the end of an agent's run: no signal skips it."""

from __future__ import annotations

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
    """Call an agent's ``_shutdown`` until it comes to its end.

    The agent's own handlers do not raise here. Those of others may, and a shutdown that has begun keeps its deadline.

    Args:
        shutdown: the method.
        death_sig: what to send the workers first; by default what the method chooses.
        timeout: seconds until they are killed.
        activity: is told that the agent is busy with it.

    Returns:
        The last :class:`SignalException` that interrupted it, if one did.
    """
    interruption: BaseException | None = None
    while True:
        try:
            activity.busy("stopping")
            _call(shutdown, death_sig, timeout)
        except family(SignalException) as error:  # noqa: PERF203 - a loop over interruptions
            logger.warning("Received %s death signal while shutting down", error.sigval)
            interruption = error
        else:
            return interruption


def _call(shutdown: Callable[..., None], death_sig: signal.Signals | None, timeout: int) -> None:
    """Call ``_shutdown`` with as many arguments as it takes: before torch 2.9 subclasses had none for the timeout."""
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
