"""Replaces names of torch's launcher by those of this package, in programs that call the launcher in their process.

Only attributes of torch's modules are replaced. The modules themselves stay in ``sys.modules`` with their own ``__spec__`` and
``__loader__``, so :mod:`runpy`, :func:`importlib.reload` and plug-ins see nothing else.

A finder in ``sys.meta_path`` notices the import of a module that is not loaded yet. It wraps ``exec_module`` of that module's loader once.
This module is imported by programs that may never load torch, so it imports nothing that a bare interpreter has not loaded.
"""

from __future__ import annotations

import _thread
import os
import sys

TYPE_CHECKING = False  # as in `typing`
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["install", "is_installed", "leave_worker", "uninstall", "workers_inherit"]


class _Change:
    """A replaced name of a module."""

    def __init__(self, module: ModuleType, theirs: Any, ours: object) -> None:
        self.module = module
        self.theirs = theirs
        self.ours = ours


_AGENT = "torch.distributed.elastic.agent.server"
_LAUNCHER = "torch.distributed.launcher"
_RUN = "torch.distributed.run"
_PROCESSES = "torch.distributed.elastic.multiprocessing"

_CLASSES = ("ElasticAgent", "RunResult", "SimpleElasticAgent", "Worker", "WorkerGroup", "WorkerSpec", "WorkerState")
_NAMES = {
    "start_processes": (_PROCESSES, "ferroelastic.multiprocessing"),
    **dict.fromkeys(_CLASSES, (f"{_AGENT}.api", "ferroelastic.agent.server.api")),
    "LocalElasticAgent": (f"{_AGENT}.local_elastic_agent", "ferroelastic.agent.server.local_elastic_agent"),
    "elastic_launch": (f"{_LAUNCHER}.api", "ferroelastic.launcher.api"),
    "launch_agent": (f"{_LAUNCHER}.api", "ferroelastic.launcher.api"),
    "main": (_RUN, "ferroelastic.run"),
    "run": (_RUN, "ferroelastic.run"),
}
"""The replaced names, with the module of torch that defines the name and the module of this package that has the other object."""

_MODULES = (
    _PROCESSES,
    f"{_AGENT}.api",
    f"{_AGENT}.local_elastic_agent",
    _AGENT,
    f"{_LAUNCHER}.api",
    _LAUNCHER,
    _RUN,
    "torch.distributed.launch",
)
"""The modules that define or import these names. A module follows those that it imports the names from."""

# A class of torch that is defined while the names of its bases are replaced would have bases of this package. So the names of these
# modules are replaced after the package, which imports both, has been executed.
_PACKAGES = {f"{_AGENT}.api": _AGENT, f"{_AGENT}.local_elastic_agent": _AGENT}


class _State:
    """The installation of this process."""

    def __init__(self) -> None:
        self.lock = _thread.RLock()
        self.is_installed = False
        self.workers = False
        self.changes: dict[tuple[str, str], _Change] = {}
        self.reported: set[str] = set()


_state = _State()


class _Finder:
    """Finds the modules of ``_MODULES`` as the other finders do, and hooks their execution."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of the first other finder that has one. The next execution by its loader calls :func:`_execute`."""
        if name not in _MODULES:
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None or finder is _finder else find(name, path, target)
            if spec is not None:
                _hook(spec.loader)
                return spec
        return None


_finder: Any = _Finder()


def _hook(loader: Any) -> None:
    if loader is None or isinstance(loader, type):
        return  # a namespace, or a class that loads modules of the interpreter

    def execute(module: ModuleType) -> None:
        del loader.exec_module  # its own method is visible again
        _execute(loader, module)

    try:
        loader.exec_module = execute
    except AttributeError:
        _report(f"install() cannot observe imports by {type(loader).__name__}; call it after the import of torch")


def _execute(loader: Any, module: ModuleType) -> None:
    """Execute a module of torch with its own loader, and replace the names afterwards."""
    if any(name == module.__name__ for name, _ in list(_state.changes)):
        # A reload. The classes that it defines must have bases of torch.
        with _state.lock:
            _restore()
    loader.exec_module(module)
    _replace(executed=module.__name__)


def install(*, workers: bool = False) -> None:
    """Let programs that call torch's launcher in this process use the agent of this package. Not in torch.

    Replaces these names, in the modules of torch that define or import them: ``elastic_launch`` and ``launch_agent`` of
    ``torch.distributed.launcher``; ``run`` and ``main`` of ``torch.distributed.run``; ``LocalElasticAgent`` and the other classes of
    ``torch.distributed.elastic.agent.server``; ``start_processes`` of ``torch.distributed.elastic.multiprocessing``. Torch is not
    imported: modules that are not loaded yet are changed at their import. Names that a program has imported before the call keep torch's
    objects, so call it before these imports.

    Idempotent and thread-safe. :func:`uninstall` is the way back. An agent of torch that runs already goes on, and the log has a warning.

    Args:
        workers: whether workers inherit the installation, for jobs that start jobs. The last call decides.
    """
    with _state.lock:
        _state.workers = workers
        is_first, _state.is_installed = not _state.is_installed, True
        if is_first:
            sys.meta_path.insert(0, _finder)
    if is_first:
        _wait_for_imports()
        _report_running_agent()
    # Also at later calls: a second thread must not return before the names are replaced.
    _replace()


def uninstall() -> None:
    """Give the modules of torch their own names back. Running agents of this package go on. Not in torch.

    A name that the program has replaced after :func:`install` keeps the program's object, and the log has a warning. Without
    :func:`install` the call has no effect but a warning.
    """
    was_installed, kept = _withdraw()
    if not was_installed:
        _report("uninstall() has no effect: install() was not called, or uninstall() was called before")
    for name in kept:
        _report(f"uninstall() does not change {name}: the program has replaced it after install()")


def leave_worker() -> None:
    """Undo an installation that a worker has inherited from its agent, or made when it imported the agent's main module."""
    _withdraw()


def is_installed() -> bool:
    """Return whether :func:`install` is in effect."""
    return _state.is_installed


def workers_inherit() -> bool:
    """Return whether workers inherit the installation."""
    return _state.is_installed and _state.workers


def _withdraw() -> tuple[bool, list[str]]:
    """Undo :func:`install`. Return whether it was in effect, and the names that the program has replaced after it."""
    with _state.lock:
        was_installed, _state.is_installed = _state.is_installed, False
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        return was_installed, _restore()


def _restore() -> list[str]:
    """Restore the names; return those that the program has replaced."""
    kept = []
    for (_, name), change in _state.changes.items():
        if vars(change.module).get(name) is change.ours:
            setattr(change.module, name, change.theirs)
        else:
            kept.append(f"{change.module.__name__}.{name}")
    if _state.changes:
        _compat().replaced.clear()
        _state.changes.clear()
    return kept


def _wait_for_imports() -> None:
    """Wait for the imports of torch's modules that other threads have begun before the finder was in place."""
    for name in _MODULES:
        module = _loaded(name)
        if module is not None and _is_importing(module):
            try:  # noqa: SIM105 - contextlib may not be loaded
                __import__(name)
            except Exception:  # noqa: BLE001, S110 - the other thread gets this error
                pass


def _loaded(name: str) -> ModuleType | None:
    module = sys.modules.get(name)
    return module if isinstance(module, type(sys)) else None  # not an object that stands in for a module


def _is_importing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _is_ready(name: str, executed: str | None) -> bool:
    module = _loaded(name)
    return module is not None and (name == executed or not _is_importing(module))


def _replace(executed: str | None = None) -> None:
    """Replace the names in all modules that are ready.

    Args:
        executed: a module that was just executed. Its import has not ended yet.
    """
    ready = [
        module
        for name in _MODULES
        if (module := _loaded(name)) is not None and _is_ready(_PACKAGES.get(name, name), executed)
    ]
    if not ready:
        return
    # Before the lock is taken: its owner must not wait for an import lock.
    ours = _import_ours({module.__name__ for module in ready})
    missing = []
    with _state.lock:
        if not _state.is_installed:
            return
        for module in ready:
            for name, new in ours.items():
                if not _replace_name(module, name, new) and module.__name__ == _NAMES[name][0]:
                    missing.append(f"{module.__name__}.{name}")
    for name in missing:
        _report(f"install() skips {name}, which this version of torch does not have")


def _replace_name(module: ModuleType, name: str, new: object) -> bool:
    """Replace one name; return whether the module has it."""
    old = vars(module).get(name, _state)
    if old is _state:
        return False
    known = _state.changes.get((module.__name__, name))
    if known is not None and known.module is module:
        return True  # the program may have replaced it in the meantime
    definition = _NAMES[name][0]
    if old is new:  # imported from the other module after its name was replaced
        old = _state.changes[definition, name].theirs
    elif module.__name__ != definition and getattr(old, "__module__", None) != definition:
        return True  # another object of the same name
    setattr(module, name, new)
    _state.changes[module.__name__, name] = _Change(module, old, new)
    if isinstance(new, type):
        _compat().replaced[new] = old
    return True


def _import_ours(modules: set[str]) -> dict[str, object]:
    """Return the objects of this package for the names that these modules of torch define, by name."""
    ours = {}
    for name, (definition, target) in _NAMES.items():
        if definition in modules:
            try:
                __import__(target)
                ours[name] = getattr(sys.modules[target], name)
            except Exception as error:  # noqa: BLE001 - an import of torch must not fail because of this package
                _report(f"install() leaves torch's launcher in place: {type(error).__name__}: {error}")
                return {}
    return ours


def _compat() -> Any:
    from ferroelastic import _compat

    return _compat


def _report_running_agent() -> None:
    api = _loaded(f"{_AGENT}.api")
    for frame in sys._current_frames().values() if api is not None else ():  # noqa: SLF001 - the only way to see other threads
        caller: Any = frame
        while caller is not None:
            if caller.f_globals is vars(api) and caller.f_code.co_name == "_invoke_run":
                _report("install() does not change an agent of torch that runs already; it takes effect for later ones")
            caller = caller.f_back


def _report(text: str) -> None:
    """Log a warning, once per process."""
    if text not in _state.reported:
        _state.reported.add(text)
        import logging

        logging.getLogger("ferroelastic").warning("%s", text)


def _renew_lock() -> None:
    """In a forked child: the thread that holds the lock may not exist here."""
    _state.lock = _thread.RLock()


os.register_at_fork(after_in_child=_renew_lock)
