"""Texts for messages. Functions that describe objects of user code never raise.

While an error is reported, a second error must not replace it: a ``__str__`` that raises, or a warning that is turned into an error
(CPython 3.15 warns while it formats the traceback of a process that ``multiprocessing`` started).
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "describe_error",
    "endpoint_text",
    "entrypoint_name",
    "format_current_traceback",
    "format_traceback",
    "ignore_fork_warning",
    "launched_name",
    "message_of",
    "origin_of",
    "warn",
]

_MAX_FRAMES = 200


def endpoint_text(host: str, port: int) -> str:
    """Return an endpoint as ``host:port``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def message_of(error: object) -> str:
    """Return ``str(error)``, or a placeholder if it raises."""
    with suppress(Exception):  # a user's __str__ may do anything
        return str(error)
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(error)
    return "<no text: its __str__ raised>"


def describe_error(error: BaseException) -> str:
    """Return the type and the text of an exception: ``ValueError: it is wrong``."""
    return f"{type(error).__name__}: {message_of(error)}"


def format_traceback(error: BaseException) -> str:
    """Return the traceback of an exception as Python prints it, or only its frames if formatting fails."""
    import traceback

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "".join(traceback.format_exception(error))
    except Exception as failure:  # noqa: BLE001 - any code: exceptions of the chain, source files, loaders
        lines = ["Traceback (most recent call last):\n", *_frames(error), f"{describe_error(error)}\n"]
        return "".join([*lines, f"(the rest of the traceback could not be formatted: {describe_error(failure)})\n"])


def format_current_traceback() -> str:
    """Return the traceback of the exception that is being handled, as ``traceback.format_exc`` does."""
    error = sys.exc_info()[1]
    return "NoneType: None\n" if error is None else format_traceback(error)


def _frames(error: BaseException) -> Iterator[str]:
    """Yield the lines of the traceback's frames, without source lines, whose loading can fail."""
    entry = error.__traceback__
    for _ in range(_MAX_FRAMES):
        if entry is None:
            return
        code = entry.tb_frame.f_code
        yield f'  File "{code.co_filename}", line {entry.tb_lineno}, in {code.co_name}\n'
        entry = entry.tb_next
    yield "  ...\n"


def warn(text: str) -> None:
    """Issue a warning. If warnings are errors, log it instead: the caller must not fail because of a warning."""
    try:
        warnings.warn(text, stacklevel=3)
    except Warning:
        from ferroelastic.utils.logging import get_logger

        get_logger(__name__).warning("%s", text)


def ignore_fork_warning() -> None:
    """Let ``os.fork`` not warn of other threads, in the current warning filters.

    Where warnings are errors, CPython 3.15 raises this warning in the parent after the fork, and the child runs on unknown to the parent.
    """
    text = r"This process \(pid=\d+\) is multi-threaded, use of fork\(\)"
    warnings.filterwarnings("ignore", text, DeprecationWarning)


def origin_of(entrypoint: Callable[..., object]) -> object:
    """Return the named object of a callable: the function of a ``functools.partial``, the class of an instance, else the callable."""
    origin: object = entrypoint
    while isinstance(origin, functools.partial):
        origin = origin.func
    return origin if isinstance(getattr(origin, "__qualname__", None), str) else type(origin)


def entrypoint_name(entrypoint: Callable[..., object] | str) -> str:
    """Return the name of an entrypoint, for reports.

    Args:
        entrypoint: a function, a method, a ``functools.partial``, an instance with ``__call__``, or the path of a program.

    Returns:
        The qualified name of the function or of the class; the file name of the program.
    """
    if isinstance(entrypoint, str):
        return os.path.basename(entrypoint)
    name: str = getattr(origin_of(entrypoint), "__qualname__")  # noqa: B009 - any object
    return name


def launched_name(entrypoint: Callable[..., object] | str | None, args: Sequence[object]) -> str:
    """Return the name of a launched entrypoint for reports: of the function, of the script that this interpreter runs, or of the program.

    Args:
        entrypoint: a function, or the path of a program.
        args: arguments of the entrypoint.
    """
    if callable(entrypoint):
        return str(getattr(entrypoint, "__name__", None) or entrypoint_name(entrypoint))
    if entrypoint == sys.executable:
        return next((str(arg) for arg in args if str(arg)[:1] not in ("", "-")), "")
    return entrypoint or ""
