"""Timeouts of an agent that an argument or an environment variable sets. The argument wins."""

from __future__ import annotations

import math
import os

from ferroelastic._checks import check_number

__all__ = ["exit_barrier_timeout_s", "shutdown_timeout_s"]

_SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_DEFAULT_SHUTDOWN_S = 30
_EXIT_BARRIER_VARIABLE = "TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT"
_DEFAULT_EXIT_BARRIER_S = 300.0


def shutdown_timeout_s(argument_s: int | None) -> int:
    """Return the grace period in whole seconds: the argument, else ``$TORCH_ELASTIC_SHUTDOWN_TIMEOUT``, else 30.

    Raises:
        ValueError: the value is negative, or the variable is not a whole number.
        TypeError: the argument is not a number.
    """
    if argument_s is not None:
        check_number("shutdown_timeout", argument_s)
        if argument_s < 0:
            raise ValueError(f"shutdown_timeout must be non-negative, got {argument_s}; give whole seconds >= 0")
        return argument_s
    text = os.environ.get(_SHUTDOWN_VARIABLE, str(_DEFAULT_SHUTDOWN_S))
    try:
        timeout_s = int(text)
    except ValueError:
        timeout_s = -1
    if timeout_s < 0:
        raise ValueError(f"{_SHUTDOWN_VARIABLE}={text!r} is not a timeout; give whole seconds >= 0, or unset it")
    return timeout_s


def exit_barrier_timeout_s(argument_s: float | None) -> float:
    """Return the timeout of the exit barrier in seconds: the argument, else ``$TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT``, else 300.

    Raises:
        ValueError: the value is negative or not finite, or the variable is not a number.
        TypeError: the argument is not a number.
    """
    if argument_s is not None:
        check_number("exit_barrier_timeout", argument_s)
        if not 0 <= argument_s < math.inf:
            raise ValueError(f"exit_barrier_timeout must be non-negative, got {argument_s}; give seconds >= 0")
        return float(argument_s)
    text = os.environ.get(_EXIT_BARRIER_VARIABLE, str(_DEFAULT_EXIT_BARRIER_S))
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 <= timeout_s < math.inf:
        raise ValueError(f"{_EXIT_BARRIER_VARIABLE}={text!r} is not a timeout; give seconds >= 0, or unset it")
    return timeout_s
