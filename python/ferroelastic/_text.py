"""Texts for messages. Those about objects of other people's code never fail: an exception, its traceback, the name of a function.

Whoever reports an error must not lose it for another one: a ``__str__`` that raises, or a warning that is turned into an error (CPython
3.15 warns while it formats the traceback of a process that ``multiprocessing`` has started).
"""

from __future__ import annotations

import functools
import os
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["describe_error", "endpoint_text", "entrypoint_name", "format_traceback", "message_of", "origin_of", "warn"]

_MOST_FRAMES = 200


def endpoint_text(host: str, port: int) -> str:
    """Return an endpoint as ``host:port``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def message_of(error: object) -> str:
    """Return ``str(error)``, or what stands for it where that raises."""
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
    """Return the traceback of an exception as Python prints it, or as much of it as can be had."""
    import traceback

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "".join(traceback.format_exception(error))
    except Exception as failure:  # noqa: BLE001 - of another exception in the chain, of a source file, of a loader
        lines = ["Traceback (most recent call last):\n", *_frames(error), f"{describe_error(error)}\n"]
        return "".join([*lines, f"(the rest of the traceback could not be formatted: {describe_error(failure)})\n"])


def _frames(error: BaseException) -> Iterator[str]:
    """Lines that say where an exception has passed: without the source, which is what can fail."""
    place = error.__traceback__
    for _ in range(_MOST_FRAMES):
        if place is None:
            return
        code = place.tb_frame.f_code
        yield f'  File "{code.co_filename}", line {place.tb_lineno}, in {code.co_name}\n'
        place = place.tb_next
    yield "  ...\n"


def warn(text: str) -> None:
    """Warn; where warnings are errors, log it instead: the caller has something more important to do than to fail."""
    try:
        warnings.warn(text, stacklevel=3)
    except Warning:
        from ferroelastic.utils.logging import get_logger

        get_logger(__name__).warning("%s", text)


def origin_of(entrypoint: Callable[..., object]) -> object:
    """Return what has a name in a callable: the function of a ``functools.partial``, the class of an instance, else the callable."""
    origin: object = entrypoint
    while isinstance(origin, functools.partial):
        origin = origin.func
    return origin if isinstance(getattr(origin, "__qualname__", None), str) else type(origin)


def entrypoint_name(entrypoint: Callable[..., object] | str) -> str:
    """Return the name of what workers run, for reports.

    Args:
        entrypoint: a function, a method, a ``functools.partial``, an instance with ``__call__``, or the path of a program.

    Returns:
        The qualified name of the function or of the class; the file name of the program.
    """
    if isinstance(entrypoint, str):
        return os.path.basename(entrypoint)
    name: str = getattr(origin_of(entrypoint), "__qualname__")  # noqa: B009 - any object
    return name
