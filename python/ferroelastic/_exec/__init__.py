"""``ferrorun --exec``: runs a program in whose Python processes :func:`ferroelastic.install` is in effect.

The program inherits a variable and two folders: ``hook`` in ``PYTHONPATH`` has a ``sitecustomize`` that calls ``install()``, and ``bin`` in
``PATH`` has a ``torchrun``. Agents of this package remove all three from the environment of their workers.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from ferroelastic import _install
from ferroelastic._sitecustomize import EXEC_ENV, remove_exec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping, Sequence

__all__ = ["as_worker", "execute", "worker_environment"]

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126


def execute(words: list[str]) -> NoReturn:
    """Replace this process by a program with the hook.

    Args:
        words: the program and its arguments.

    Raises:
        SystemExit: there is no program (code 2), it does not exist (127) or it cannot be executed (126). One line is on standard error.
    """
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        _fail(2, "--exec needs a program, for example: ferrorun --exec accelerate launch train.py")
    program = words[0]
    if program.startswith("-"):
        _fail(2, f"--exec: {program!r} is an option; write the program right after --exec, and its options after it")
    environment = dict(os.environ)
    _warn_of_other_torchrun(environment.get("PATH", os.defpath))
    _add(environment)
    _restore_signals()
    try:
        os.execvpe(program, words, environment)  # noqa: S606 - no shell is wanted
    except FileNotFoundError:
        if "/" in program:
            _fail(
                _NOT_FOUND,
                f"--exec: program {program!r} does not exist, or the interpreter of its first line is missing",
            )
        _fail(
            _NOT_FOUND, f"--exec: program {program!r} is not in PATH, or the interpreter of its first line is missing"
        )
    except OSError as error:
        _fail(
            _NOT_EXECUTABLE, f"--exec: program {program!r} cannot be executed: {os.strerror(error.errno or 0).lower()}"
        )


def _warn_of_other_torchrun(path: str) -> None:
    from ferroelastic._exec.script import find_torchrun, interpreter_of

    found = find_torchrun(path)
    python = None if found is None else interpreter_of(found)
    if python is not None and os.path.dirname(python) != os.path.dirname(sys.executable):
        _write(
            f"ferrorun: warning: --exec: torchrun runs {sys.executable} instead of {python}, the interpreter of {found}"
        )


def worker_environment() -> dict[str, str]:
    """Return the environment of this process for a worker: with the hook only if workers inherit the installation."""
    environment = dict(os.environ)
    if _install.workers_inherit():
        _add(environment)
    else:
        remove_exec(environment)
    return environment


@contextmanager
def as_worker() -> Iterator[None]:
    """Give this process the environment of :func:`worker_environment` for a ``with`` block that starts processes of ``multiprocessing``."""
    names = (EXEC_ENV, "PATH", "PYTHONPATH")
    former = {name: os.environ.get(name) for name in names}
    _set(os.environ, worker_environment(), names)
    try:
        yield
    finally:
        _set(os.environ, former, names)


def _set(environment: MutableMapping[str, str], values: Mapping[str, str | None], names: Sequence[str]) -> None:
    for name in names:
        value = values.get(name)
        if value == environment.get(name):
            continue
        if value is None:
            del environment[name]
        else:
            environment[name] = value


def _add(environment: dict[str, str]) -> None:
    remove_exec(environment)
    environment[EXEC_ENV] = sys.executable
    environment["PATH"] = _prepend("bin", environment.get("PATH") or os.defpath)
    environment["PYTHONPATH"] = _prepend("hook", environment.get("PYTHONPATH", ""))


def _prepend(folder: str, path: str) -> str:
    own = os.path.join(_FOLDER, folder)
    return f"{own}{os.pathsep}{path}" if path else own


def _restore_signals() -> None:
    """Give the signals that the interpreter ignores their default actions, as ``subprocess`` does for its children."""
    import signal

    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def _fail(code: int, text: str) -> NoReturn:
    _write(f"ferrorun: error: {text}")
    sys.exit(code)


def _write(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")
