"""Imports modules in the fork server of ``multiprocessing``, for function workers.

``multiprocessing`` imports the modules of ``set_forkserver_preload`` in the fork server, but an exception other than ``ImportError`` ends
it, and with it the job. This module is imported there instead. It reads the names from the environment and catches every exception.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["preload"]

_ENV = "FERROELASTIC_FORK_SERVER_IMPORTS"


def preload(imports: tuple[str, ...]) -> None:
    """Let the next fork server of this process import modules and call functions, as ``package.module:function``.

    A fork server that runs already is not changed.
    """
    import multiprocessing.forkserver as module

    server: Any = module._forkserver  # noqa: SLF001 - the public function replaces the list of the user
    modules = list(server._preload_modules)  # noqa: SLF001
    if __name__ not in modules:
        module.set_forkserver_preload([*modules, __name__])
    former = os.environ.get(_ENV)
    os.environ[_ENV] = ",".join(imports)
    try:
        module.ensure_running()
    finally:
        if former is None:
            del os.environ[_ENV]
        else:
            os.environ[_ENV] = former


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
