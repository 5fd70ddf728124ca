"""A fork of the test process."""

from __future__ import annotations

import os
import warnings

__all__ = ["fork"]


def fork() -> int:
    """``os.fork`` without the warning that CPython 3.12 and later issue in a process with threads.

    Warnings are errors in tests. CPython 3.15 would raise this one in the parent after the fork, and the child would run on.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()
