"""Calls ``ferroelastic.install()`` in each Python of a program that ``ferrorun --exec`` has started, before its script.

The interpreter imports this module by its name, because its folder is in ``PYTHONPATH``.
"""

import _frozen_importlib_external as _external
import os
import sys

TYPE_CHECKING = False  # as in `typing`, which a program may not have loaded
if TYPE_CHECKING:
    from typing import Any

_FOLDER, _, _ = __file__.rpartition("/")
_PACKAGE = _FOLDER[: -len("/_exec/hook")]  # a program may run an old Python
_ENV = "FERROELASTIC_EXEC"
_COMMANDS = {"torch.distributed.run": "ferroelastic.run", "torch.distributed.launch": "ferroelastic.launch"}
"""Torch's launchers as commands (``python -m``), with the commands of this package. ``runpy`` executes their source, not their names."""


def _load_shared() -> "dict[str, Any]":
    name, path = "ferroelastic._sitecustomize", f"{_PACKAGE}/_sitecustomize.py"
    namespace: dict[str, Any] = {"__name__": name, "__file__": path}
    code: Any = _external.SourceFileLoader(name, path).get_code(name)
    exec(code, namespace)  # noqa: S102 - without a trace in sys.modules
    return namespace


def _install() -> None:
    try:
        import ferroelastic

        ferroelastic.install()
        _replace_command()
    except Exception as error:  # noqa: BLE001 - the program must run
        _give_up(error)


def _replace_command() -> None:
    """Run the launcher of this package if this process is a launcher of torch, with the same options of the interpreter."""
    if sys.argv[:1] != ["-m"]:
        return
    words = list(sys.orig_argv)
    place = len(words) - len(sys.argv)  # of the module's name
    if words[place] in _COMMANDS:
        words[place] = _COMMANDS[words[place]]
        os.execv(sys.executable, [sys.executable, *words[1:]])  # noqa: S606 - no shell is wanted


def _give_up(error: Exception) -> None:
    """Run this process and its children without the hook. Report the error if this interpreter has torch."""
    _shared["remove_exec"](os.environ)
    torch = _external.PathFinder.find_spec("torch", sys.path)
    if torch is not None and torch.origin is not None and sys.stderr is not None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        sys.stderr.write(
            f"ferrorun --exec: {sys.executable} runs without ferroelastic ({text}); install ferroelastic in its environment\n"
        )


_shared = _load_shared()
_shared["leave_path"](_FOLDER)
if _ENV in os.environ:
    _install()
if not _shared["import_hidden"]():
    # `site` ignores exactly this error, and the import system removes this module.
    raise ImportError("no sitecustomize of the user", name="sitecustomize")
