"""Runs a zygote at the point where the interpreter imports ``sitecustomize``, before the script.

A child of the zygote leaves this module when the agent releases it, and the interpreter goes on to run the script as always. So the
interpreter itself prepares ``__main__``, reports errors and computes the exit code, and no frame of this package is on the stack.
"""

import _frozen_importlib_external as _external
import sys

TYPE_CHECKING = False  # as in `typing`, which a worker may not have loaded
if TYPE_CHECKING:
    from typing import Any

_FOLDER, _, _ = __file__.rpartition("/")
_ZYGOTE = f"{_FOLDER.rpartition('/')[0]}/zygote.py"


def _run() -> bool:
    """Run the zygote; return in a released child. The result is whether a ``sitecustomize`` of the user exists."""
    sys.path.remove(_FOLDER)
    sys.path_importer_cache.pop(_FOLDER, None)
    namespace: dict[str, Any] = {"__name__": "ferroelastic._warm.zygote", "__file__": _ZYGOTE}
    loader = _external.SourceFileLoader("ferroelastic._warm.zygote", _ZYGOTE)
    code: Any = loader.get_code(loader.name)
    exec(code, namespace)  # noqa: S102 - without a trace in sys.modules
    has_own: bool = namespace["serve"]()
    return has_own


try:
    _has_own = _run()
except BaseException:  # noqa: BLE001 - the interpreter would ignore most errors, and run the script in the zygote
    import os

    os._exit(1)
if not _has_own:
    # `site` ignores exactly this error, and the import system removes this module.
    raise ImportError("no sitecustomize of the user", name="sitecustomize")
