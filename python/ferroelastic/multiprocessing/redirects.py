"""Mirror of ``torch.distributed.elastic.multiprocessing.redirects``.

Intended differences: the C library is loaded by the first redirect, not at import, and where ``sys.stdout`` is not descriptor 1
(a notebook's, or a test's), that one is redirected nevertheless.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["redirect", "redirect_stderr", "redirect_stdout"]

_DESCRIPTORS = {"stdout": 1, "stderr": 2}


def _flush(std: str) -> None:
    """Write out what C's and Python's buffers hold."""
    import ctypes

    ctypes.CDLL(None).fflush(None)
    stream = getattr(sys, std)
    if stream is not None and not stream.closed:
        stream.flush()


def _descriptors(std: str) -> list[int]:
    """Return the descriptor that C and child processes know, and that of Python's stream, if it has another."""
    numbers = [_DESCRIPTORS[std]]
    try:
        own: int = getattr(sys, std).fileno()
    except (AttributeError, OSError, ValueError):  # closed, replaced or without a descriptor
        return numbers
    return numbers if own in numbers else [*numbers, own]


def _point(descriptor: int, target: int) -> None:
    os.dup2(target, descriptor, inheritable=os.get_inheritable(descriptor))


@contextmanager
def redirect(std: str, to_file: str) -> Iterator[None]:
    """Send a standard stream of this process, and of processes it starts, to a file for the length of a ``with`` block.

    The descriptor itself is redirected, so output of C code and of child processes goes along. Lines from different sources may
    change places, since each has its own buffer.

    Args:
        std: ``"stdout"`` or ``"stderr"``.
        to_file: path of the file, which is overwritten; its directory must exist.

    Raises:
        ValueError: ``std`` is neither.
        OSError: the file cannot be opened.
    """
    if std not in _DESCRIPTORS:
        raise ValueError(f"unknown standard stream <{std}>, must be one of {set(_DESCRIPTORS)}")
    with open(to_file, mode="w+b") as target:
        saved = {number: os.dup(number) for number in _descriptors(std)}
        try:
            _flush(std)
            for number in saved:
                _point(number, target.fileno())
            try:
                yield
            finally:
                _flush(std)
                for number, original in saved.items():
                    _point(number, original)
        finally:
            for original in saved.values():
                os.close(original)


redirect_stdout = partial(redirect, "stdout")
redirect_stderr = partial(redirect, "stderr")
