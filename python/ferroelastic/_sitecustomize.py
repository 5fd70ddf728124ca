"""Functions of the two ``sitecustomize`` modules of this package.

They execute this file without an import, because the package may not be importable or must not be imported. So it imports nothing that a
bare interpreter has not loaded.
"""

import os
import sys

TYPE_CHECKING = False  # as in `typing`
if TYPE_CHECKING:
    from collections.abc import MutableMapping

__all__ = ["EXEC_ENV", "import_hidden", "leave_path", "remove_exec"]

EXEC_ENV = "FERROELASTIC_EXEC"
"""Environment variable: the interpreter of the ``ferrorun --exec`` that has started this process or an ancestor."""

_EXEC_FOLDERS = ("/ferroelastic/_exec/bin", "/ferroelastic/_exec/hook")


def leave_path(folder: str) -> None:
    """Remove the folder of a ``sitecustomize`` of this package from ``sys.path``. The script does not see it."""
    while folder in sys.path:
        sys.path.remove(folder)
    sys.path_importer_cache.pop(folder, None)


def import_hidden() -> bool:
    """Import the ``sitecustomize`` that the interpreter would have imported; return whether there is one."""
    sys.modules.pop("sitecustomize", None)
    try:
        __import__("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        return False
    return True


def remove_exec(environment: "MutableMapping[str, str]") -> None:
    """Remove all that ``ferrorun --exec`` has added to an environment."""
    if EXEC_ENV not in environment:
        return
    del environment[EXEC_ENV]
    for name in ("PATH", "PYTHONPATH"):
        # Of any environment: an inner `ferrorun --exec` may be that of another one.
        entries = environment.get(name, "").split(os.pathsep)
        others = [entry for entry in entries if not entry.endswith(_EXEC_FOLDERS)]
        if others:
            environment[name] = os.pathsep.join(others)
        else:
            environment.pop(name, None)
