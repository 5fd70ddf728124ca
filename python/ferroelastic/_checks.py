"""Type checks of arguments from a program. They fail early, with the name of the argument and its value."""

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
    "check_signal_target",
    "check_strings",
    "check_type",
    "check_warm_workers",
    "check_whole_number",
]


def check_type(what: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Check that a value is of a type.

    Args:
        what: name of the value, for the error message.
        value: the value.
        kinds: the accepted types.
        expected: the accepted types as text, for the error message.

    Raises:
        TypeError: the value has another type.
    """
    if not isinstance(value, kinds):
        raise _error(what, value, expected)


def check_number(what: str, value: Any, expected: str = "a number of seconds") -> None:
    """Check that a value is a number of any type, including those of numpy.

    Args:
        what: name of the value, for the error message.
        value: the value.
        expected: description of the expected value, for the error message.

    Raises:
        TypeError: the value is not a number.
    """
    try:
        value >= 0, value + 0
    except TypeError:
        raise _error(what, value, expected) from None


def check_signal_target(value: object) -> None:
    """Check the receivers of the signal that starts the grace period.

    Raises:
        ValueError: the value is neither ``"group"`` nor ``"leader"``.
    """
    if value not in ("group", "leader"):
        raise ValueError(f"grace_signal_target={value!r} is unknown; give 'group' or 'leader'")


def check_whole_number(what: str, value: Any) -> None:
    """Check that a value is a whole number of any type.

    Raises:
        TypeError: the value is not a whole number.
    """
    try:
        operator.index(value)
    except TypeError:
        raise _error(what, value, "a whole number") from None


def check_iterable(what: str, value: Any, expected: str) -> None:
    """Check that a value is iterable, and neither ``str`` nor ``bytes``.

    Raises:
        TypeError: it is not.
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
    """Check that a value is an entrypoint for workers.

    Raises:
        TypeError: the value is neither a function nor the path of a program.
    """
    if not isinstance(value, str) and not callable(value):
        raise _error(what, value, "a function, or the path of a program as a string")


def check_logs_specs(what: str, value: object) -> None:
    """Check that a value is a ``LogsSpecs``, of this package, of torch or of a plugin.

    Raises:
        TypeError: the value has no method ``reify``.
    """
    if not callable(getattr(value, "reify", None)):
        raise _error(what, value, "a LogsSpecs, such as DefaultLogsSpecs(log_dir)")


def check_environments(envs: Mapping[int, Any]) -> None:
    """Check the environment variables of workers, by local rank.

    Raises:
        TypeError: a value is not a string. The text names the variable.
    """
    for rank, env in envs.items():
        if not hasattr(env, "items"):
            raise _error(f"envs[{rank}]", env, "a dictionary of environment variables")
        for name, value in env.items():
            check_type(f"envs[{rank}][{name!r}]", value, (str, bytes, os.PathLike), "a string")


def check_warm_workers(warm_workers: Any, warm_imports: Any) -> None:
    """Check the settings of warm workers.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: the number is negative, or a module has no name.
    """
    check_whole_number("warm_workers", warm_workers)
    if warm_workers < 0:
        raise ValueError(f"warm_workers must not be negative, got {warm_workers}; give 0 for no warm workers")
    check_strings("warm_imports", warm_imports)
    for target in warm_imports:
        module, colon, function = target.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), *(function.split(".") if colon else ()))):
            raise ValueError(
                f"warm_imports: {target!r} is not the name of a module; give e.g. torch or package.module:function"
            )


def _error(what: str, value: object, expected: str) -> TypeError:
    return TypeError(f"{what} must be {expected}, got {value!r} ({type(value).__name__})")
