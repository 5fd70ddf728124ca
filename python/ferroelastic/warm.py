"""For code that warm workers import in advance (``--warm-workers``, ``--preload``).

The imports run once per node, in a *zygote* that does not know the rank of any worker. Warm workers are forked from it. Code that needs
the rank, or a resource of its own in each worker, registers a function with :func:`at_release`.

To prepare an object in advance, name a cached function in ``--warm-imports``. The worker's own call then returns the prepared object, and a
worker that starts without warm imports makes it itself::

    @functools.cache
    def tokenizer():
        return AutoTokenizer.from_pretrained("gpt2")

    # ferrorun --warm-workers --warm-imports torch,mymodule:tokenizer train.py

Not in torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["at_release", "in_zygote", "is_warm"]

_ATTRIBUTE = "_ferroelastic_warm"  # of `sys`, set by zygote.py

_functions: list[Callable[[], object]] = []


def in_zygote() -> bool:
    """Return whether this process imports modules for warm workers and runs no script itself."""
    return getattr(sys, _ATTRIBUTE, None) == "zygote"


def is_warm() -> bool:
    """Return whether this process is a worker that was forked from a zygote."""
    return getattr(sys, _ATTRIBUTE, None) == "worker"


def at_release(function: Callable[[], object]) -> Callable[[], object]:
    """Call a function in each warm worker, after its environment is set and before its script runs.

    The functions run in the order of their registration. If one raises an exception, the worker prints one line and starts again without
    warm imports. In a process that is no zygote, the function is called at once. Can be used as a decorator.

    Args:
        function: the function, without arguments.

    Returns:
        ``function``.
    """
    if in_zygote():
        _functions.append(function)
    else:
        function()
    return function


def _call_all() -> None:
    """Call the functions of :func:`at_release`, in a released worker."""
    for function in _functions:
        function()
