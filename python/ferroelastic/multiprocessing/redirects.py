"""Mirror of ``torch.distributed.elastic.multiprocessing.redirects``.

Intended differences:

* The first redirect loads the C library, not the import of this module.
* If ``sys.stdout`` does not use descriptor 1 (in a notebook or a test), its own descriptor is redirected too.
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
    """Flush the buffers of C and of Python."""
    import ctypes

    ctypes.CDLL(None).fflush(None)
    stream = getattr(sys, std)
    if stream is not None and not stream.closed:
        stream.flush()


def _descriptors(std: str) -> list[int]:
    """Return the standard descriptor, which C and child processes use, and the descriptor of Python's stream if it differs."""
    numbers = [_DESCRIPTORS[std]]
    try:
        stream_fd: int = getattr(sys, std).fileno()
    except (AttributeError, OSError, ValueError):  # closed, replaced or without a descriptor
        return numbers
    return numbers if stream_fd in numbers else [*numbers, stream_fd]


def _redirect_descriptor(descriptor: int, target: int) -> None:
    os.dup2(target, descriptor, inheritable=os.get_inheritable(descriptor))


@contextmanager
def redirect(std: str, to_file: str) -> Iterator[None]:
    """Redirect a standard stream to a file inside a ``with`` block. Mirrors torch's ``redirect``.

    The descriptor is redirected, so the output of C code and of child processes is included. Python and C buffer separately, so their
    lines may be reordered.

    Args:
        std: ``"stdout"`` or ``"stderr"``.
        to_file: path of the file, which is overwritten. Its directory must exist.

    Raises:
        ValueError: ``std`` is neither ``"stdout"`` nor ``"stderr"``.
        OSError: the file cannot be opened.
    """
    if std not in _DESCRIPTORS:
        raise ValueError(f"unknown standard stream <{std}>, must be one of {set(_DESCRIPTORS)}")
    # As the files of script workers: the agent may remove the beginning of a log file.
    with open(to_file, mode="w+b", opener=lambda path, flags: os.open(path, flags | os.O_APPEND, 0o666)) as target:
        saved = {number: os.dup(number) for number in _descriptors(std)}
        try:
            _flush(std)
            for number in saved:
                _redirect_descriptor(number, target.fileno())
            try:
                yield
            finally:
                _flush(std)
                for number, original in saved.items():
                    _redirect_descriptor(number, original)
        finally:
            for original in saved.values():
                os.close(original)


redirect_stdout = partial(redirect, "stdout")
redirect_stderr = partial(redirect, "stderr")
