"""Attaches debuggers to new workers: pydevd, the base of debugpy (Visual Studio Code), PyCharm and PyDev.

pydevd hooks the functions of ``os`` and ``subprocess`` that start a process, and adds itself to their arguments. The engine starts
workers with its own system calls, so this module changes the argument vectors in the same way.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["is_attached", "with_debugger"]

_HOOKS = "_pydev_bundle.pydev_monkey"


def with_debugger(argv: Sequence[str]) -> Sequence[str]:
    """Return the arguments that attach the debugger of this process to a worker.

    Args:
        argv: program and arguments of the worker.

    Returns:
        The new arguments. ``argv`` itself if no debugger is attached, if it does not follow subprocesses (``"subProcess": false``), or if
        the program is not Python.
    """
    if not is_attached():
        return argv
    hooks: Any = sys.modules[_HOOKS]
    patched: Sequence[str] = hooks.patch_args(list(argv))
    # As pydevd's own hooks do: the debugger's user interface expects another connection.
    getattr(hooks, "send_process_created_message", lambda: None)()
    return tuple(patched)


def is_attached() -> bool:
    """Return whether a debugger of this process follows its subprocesses."""
    hooks = sys.modules.get(_HOOKS)
    return hooks is not None and _follows(hooks)


def _follows(hooks: Any) -> bool:
    """Return whether the hooks are in place. A debugger that does not follow subprocesses sets none, or hooks that only warn."""
    hook = os.execv
    in_place = getattr(hook, "__module__", "") == _HOOKS and "warn" not in getattr(hook, "__name__", "")
    # pydevd disables its hooks while it starts its own processes.
    return in_place and bool(getattr(hooks, "_get_apply_arg_patching", lambda: True)())
