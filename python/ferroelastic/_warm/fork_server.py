"""Imports modules in the fork server of ``multiprocessing``, for function workers.

``multiprocessing`` imports the modules of ``set_forkserver_preload`` in the fork server, but an exception other than ``ImportError`` ends
it, and with it the job. This module is imported there instead. It reads the names from the environment and catches every exception.
"""

from __future__ import annotations

import os
from typing import Any

from ferroelastic._exec import as_worker

__all__ = ["preload"]

_ENV = "FERROELASTIC_FORK_SERVER_IMPORTS"


_preloaded: tuple[int, tuple[str, ...]] | None = None
"""Pid of the fork server that was started here, and its imports."""


def preload(imports: tuple[str, ...]) -> bool:
    """Start the fork server of this process. It imports modules and calls functions, as ``package.module:function``.

    Returns:
        Whether the fork server has these imports. One that runs already is not changed.
    """
    global _preloaded  # noqa: PLW0603 - a process has one fork server
    import multiprocessing.forkserver as module

    server: Any = module._forkserver  # noqa: SLF001 - the public function replaces the list of the user
    modules = list(server._preload_modules)  # noqa: SLF001
    if __name__ not in modules:
        options = {"on_error": server._preload_on_error} if hasattr(server, "_preload_on_error") else {}  # noqa: SLF001
        module.set_forkserver_preload([*modules, __name__], **options)
    former_server = server._forkserver_pid  # noqa: SLF001
    former = os.environ.get(_ENV)
    os.environ[_ENV] = ",".join(imports)
    try:
        with as_worker():
            module.ensure_running()
    finally:
        if former is None:
            del os.environ[_ENV]
        else:
            os.environ[_ENV] = former
    if server._forkserver_pid != former_server:  # noqa: SLF001
        _preloaded = server._forkserver_pid, imports  # noqa: SLF001
    return _preloaded == (server._forkserver_pid, imports)  # noqa: SLF001


def _import_all(names: str) -> None:
    """Import in the fork server. Report each failure in one line on its standard error, which is that of the agent."""
    import sys

    from ferroelastic._warm.zygote import describe, import_target

    for target in filter(None, names.split(",")):
        try:
            import_target(target)
        except BaseException as error:  # noqa: BLE001, PERF203 - an import may raise anything, and the fork server must live
            sys.stderr.write(f"ferroelastic: the workers start without {target}: {describe(error)}\n")


if _ENV in os.environ:
    from ferroelastic._text import ignore_fork_warning

    _import_all(os.environ.pop(_ENV))
    ignore_fork_warning()  # an import may have started a thread, and a warning that is an error would end the fork server
