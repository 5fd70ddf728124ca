"""Checks of the types of what a program passes: an error names the value here, and not where it is used first."""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "check_entrypoint",
    "check_environments",
    "check_iterable",
    "check_logs_specs",
    "check_number",
    "check_strings",
    "check_type",
    "check_whole_number",
]


def check_type(what: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Check that a value is of a type.

    Args:
        what: its name, for people.
        value: the value.
        kinds: the types that will do.
        expected: these types, for people.

    Raises:
        TypeError: it is not; the text names it.
    """
    if not isinstance(value, kinds):
        raise _error(what, value, expected)


def check_number(what: str, value: Any, expected: str = "a number of seconds") -> None:
    """Check that a value is a number, of whatever type (those of numpy as well).

    Raises:
        TypeError: it is not.
    """
    try:
        value >= 0, value + 0
    except TypeError:
        raise _error(what, value, expected) from None


def check_whole_number(what: str, value: Any) -> None:
    """Check that a value is a whole number, of whatever type.

    Raises:
        TypeError: it is not.
    """
    try:
        operator.index(value)
    except TypeError:
        raise _error(what, value, "a whole number") from None


def check_iterable(what: str, value: Any, expected: str) -> None:
    """Check that a value has elements, and is no text.

    Raises:
        TypeError: it has none.
    """
    if isinstance(value, str | bytes) or not hasattr(type(value), "__iter__"):
        raise _error(what, value, expected)


def check_strings(what: str, value: Iterable[object] | None) -> None:
    """Check that a value is ``None`` or a list of strings.

    Raises:
        TypeError: it is not.
    """
    if value is not None:
        check_iterable(what, value, "a list of strings")
        for element in value:
            check_type(f"an element of {what}", element, str, "a string")


def check_entrypoint(what: str, value: object) -> None:
    """Check that a value can be what workers run.

    Raises:
        TypeError: it cannot.
    """
    if not isinstance(value, str) and not callable(value):
        raise _error(what, value, "a function, or the path of a program as a string")


def check_logs_specs(what: str, value: object) -> None:
    """Check that a value decides where the output of workers goes.

    Raises:
        TypeError: it does not.
    """
    if not callable(getattr(value, "reify", None)):
        raise _error(what, value, "a LogsSpecs, such as DefaultLogsSpecs(log_dir)")


def check_environments(envs: Mapping[int, Any]) -> None:
    """Check the environment variables of workers, by local rank.

    Raises:
        TypeError: a value is no text; the error names the variable.
    """
    for rank, env in envs.items():
        if not hasattr(env, "items"):
            raise _error(f"envs[{rank}]", env, "a dictionary of environment variables")
        for name, value in env.items():
            check_type(f"envs[{rank}][{name!r}]", value, (str, bytes, os.PathLike), "a string")


def _error(what: str, value: object, expected: str) -> TypeError:
    return TypeError(f"{what} must be {expected}, got {value!r} ({type(value).__name__})")
