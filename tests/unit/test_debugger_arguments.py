"""The arguments of workers while a debugger is attached, with a stand-in for pydevd."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ferroelastic.multiprocessing._debuggers import with_debugger

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

HOOKS = "_pydev_bundle.pydev_monkey"
ARGV = ("python", "-u", "train.py")


def attach(monkeypatch: pytest.MonkeyPatch, hook_name: str = "new_execv") -> ModuleType:
    """Attach a debugger that adds ``pydevd.py`` to all arguments."""
    hooks: Any = ModuleType(HOOKS)
    hooks.patch_args = lambda argv: [*argv[:-1], "pydevd.py", "--file", argv[-1]]
    hooks.told = 0

    def tell() -> None:
        hooks.told += 1

    hooks.send_process_created_message = tell
    monkeypatch.setitem(sys.modules, HOOKS, hooks)
    monkeypatch.setattr(os, "execv", _hook(hook_name))
    return hooks  # type: ignore[no-any-return]


def _hook(name: str) -> Callable[..., None]:
    def hook(*_arguments: object) -> None:
        raise AssertionError("nothing is executed here")

    hook.__name__, hook.__module__ = name, HOOKS
    return hook


def test_without_a_debugger_nothing_changes() -> None:
    assert with_debugger(ARGV) is ARGV
    assert HOOKS not in sys.modules


def test_a_debugger_gets_its_arguments_in(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = attach(monkeypatch)
    assert with_debugger(ARGV) == ("python", "-u", "pydevd.py", "--file", "train.py")
    assert hooks.told == 1


def test_a_debugger_that_only_warns_of_new_processes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    attach(monkeypatch, "new_warn_multiproc")
    assert with_debugger(ARGV) is ARGV


def test_a_debugger_without_hooks_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HOOKS, ModuleType(HOOKS))
    assert with_debugger(ARGV) is ARGV


def test_hooks_that_are_switched_off_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    attach(monkeypatch)._get_apply_arg_patching = lambda: False  # type: ignore[attr-defined]
    assert with_debugger(ARGV) is ARGV
