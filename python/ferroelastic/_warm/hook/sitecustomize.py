"""Runs a zygote at the point where the interpreter imports ``sitecustomize``, before the script.

A child of the zygote leaves this module when the agent releases it, and the interpreter goes on to run the script as always. So the
interpreter itself prepares ``__main__``, reports errors and computes the exit code, and no frame of this package is on the stack.
"""

import _frozen_importlib_external as _external

TYPE_CHECKING = False  # as in `typing`, which a worker may not have loaded
if TYPE_CHECKING:
    from typing import Any

_FOLDER, _, _ = __file__.rpartition("/")
_PACKAGE = _FOLDER.removesuffix("/_warm/hook")


def _load(name: str) -> "dict[str, Any]":
    """Execute a file of the package without a trace in ``sys.modules``, and return its names."""
    path = f"{_PACKAGE}/{name.replace('.', '/')}.py"
    full_name = f"ferroelastic.{name}"
    namespace: dict[str, Any] = {"__name__": full_name, "__file__": path}
    code: Any = _external.SourceFileLoader(full_name, path).get_code(full_name)
    exec(code, namespace)  # noqa: S102 - see above
    return namespace


def _run() -> bool:
    """Run the zygote; return in a released child. The result is whether a ``sitecustomize`` of the user exists."""
    shared = _load("_sitecustomize")
    shared["leave_path"](_FOLDER)
    has_own: bool = _load("_warm.zygote")["serve"](shared["import_hidden"])
    return has_own


try:
    _has_own = _run()
except BaseException:  # noqa: BLE001 - the interpreter would ignore most errors, and run the script in the zygote
    import os

    os._exit(1)
if not _has_own:
    # `site` ignores exactly this error, and the import system removes this module.
    raise ImportError("no sitecustomize of the user", name="sitecustomize")
