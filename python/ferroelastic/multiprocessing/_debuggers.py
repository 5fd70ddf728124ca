"""Debuggers that follow into new processes: pydevd, which debugpy (Visual Studio Code), PyCharm and PyDev are made of.

pydevd hooks the functions of ``os`` and ``subprocess`` that start a process, and adds itself to the arguments there. The engine starts
workers with system calls of its own, so its argument vectors get the same addition here.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["followed"]

_HOOKS = "_pydev_bundle.pydev_monkey"


def followed(argv: Sequence[str]) -> Sequence[str]:
    """Return the arguments with which a debugger of this process follows into a worker.

    Args:
        argv: program and arguments of the worker.

    Returns:
        ``argv`` itself where no debugger is attached, where it is set not to follow (``"subProcess": false``), and where the
        program is not Python.
    """
    hooks = sys.modules.get(_HOOKS)
    if hooks is None or not _follows(hooks):
        return argv
    patched: Sequence[str] = hooks.patch_args(list(argv))
    # As its hooks do: it tells the debugger's window that another process will connect.
    getattr(hooks, "send_process_created_message", lambda: None)()
    return tuple(patched)


def _follows(hooks: Any) -> bool:
    """Whether the hooks are in place: a debugger that is not to follow sets none, or some that only warn."""
    hook = os.execv
    in_place = getattr(hook, "__module__", "") == _HOOKS and "warn" not in getattr(hook, "__name__", "")
    # pydevd switches them off for processes of its own.
    return in_place and bool(getattr(hooks, "_get_apply_arg_patching", lambda: True)())
