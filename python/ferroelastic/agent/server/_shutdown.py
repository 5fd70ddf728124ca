"""Shutdown at the end of an agent's run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from ferroelastic.agent.server._activity import Activity

__all__ = ["shut_down"]


def shut_down(
    shutdown: Callable[..., None], death_sig: signal.Signals | None, timeout: int, activity: Activity
) -> None:
    """Call an agent's ``_shutdown``.

    Args:
        shutdown: the method.
        death_sig: first signal to the workers. ``None`` uses the default of the method.
        timeout: grace period in seconds until the workers are killed.
        activity: gets the state ``stopping``.

    Raises:
        SignalException: a signal handler has raised. Call this function again: the shutdown keeps its deadline.
    """
    activity.busy("stopping")
    with nullcontext() if death_sig is None else activity.phase("stop"):
        _call(shutdown, death_sig, timeout)


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
