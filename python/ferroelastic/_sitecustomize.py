"""Functions of the two ``sitecustomize`` modules of this package.

They execute this file without an import, because the package may not be importable or must not be imported. So it imports nothing that a
bare interpreter has not loaded.
"""

import sys

__all__ = ["import_hidden", "leave_path"]


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
