"""``ferroelastic-torchrun``: writes a ``torchrun`` that runs ``ferrorun``, for launchers that start ``torchrun`` as a process.

A package cannot bring a ``torchrun`` of its own: torch's package owns the file of that name in the same folder.
"""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

__all__ = ["find_torchrun", "interpreter_of", "main"]

_NAME = "torchrun"
_PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "torchrun.py")
_MARK = "# Written by ferroelastic-torchrun."
_SCRIPT = f"""#!/bin/sh
{_MARK} 'ferroelastic-torchrun --remove' removes it.
python={{python}}
program={{program}}
if [ ! -x "$python" ] || [ ! -e "$program" ]; then
  echo "torchrun: error: $0 runs $program with $python, and one of them does not exist; delete $0, or write it again with\\
 ferroelastic-torchrun of another environment" >&2
  exit 127
fi
exec "$python" "$program" "$@"
"""
_HEAD_BYTES = 4096


class _ScriptError(Exception):
    """The command cannot be carried out. The text is for the user."""


def main(args: Sequence[str] | None = None) -> int:
    """Run ``ferroelastic-torchrun``.

    Args:
        args: the command line without the program; ``None`` takes that of this process.

    Returns:
        The exit code: 0, or 1 if the script cannot be written or removed. The reason is on standard error.

    Raises:
        SystemExit: the command line cannot be parsed (code 2), or it has ``--help`` (code 0).
    """
    parsed = _parse(args)
    try:
        for line in _remove(parsed.folder) if parsed.remove else _write(parsed.folder):
            sys.stdout.write(f"{line}\n")
    except _ScriptError as failure:
        sys.stderr.write(f"ferroelastic-torchrun: error: {failure}\n")
        return 1
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        sys.stderr.write(
            f"ferroelastic-torchrun: error: {error.filename or parsed.folder}: {reason}; choose another folder\n"
        )
        return 1
    return 0


def _parse(args: Sequence[str] | None) -> Namespace:
    from argparse import ArgumentParser

    parser = ArgumentParser(
        prog="ferroelastic-torchrun",
        description="Write a torchrun that runs ferrorun of this environment into a folder, to put the folder first in PATH.",
    )
    parser.add_argument("folder", metavar="DIR", help="The folder. It is created if it does not exist.")
    parser.add_argument("--remove", action="store_true", help="Remove the torchrun that this command has written.")
    return parser.parse_args(args)


def _write(folder: str) -> list[str]:
    path = os.path.join(os.path.abspath(folder), _NAME)
    if os.path.lexists(path) and not _is_own(path):
        raise _ScriptError(
            f"{path} is not a file of ferroelastic-torchrun and is not overwritten; choose another folder"
        )
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(_SCRIPT.format(python=shlex.quote(sys.executable), program=shlex.quote(_PROGRAM)))
        os.fchmod(file.fileno(), 0o755)
    os.replace(temporary, path)
    return [f"{path} runs ferrorun of {sys.executable}", _describe_path(path)]


def _remove(folder: str) -> list[str]:
    path = os.path.join(os.path.abspath(folder), _NAME)
    if not os.path.lexists(path):
        raise _ScriptError(f"{path} does not exist")
    if not _is_own(path):
        raise _ScriptError(f"{path} is not a file of ferroelastic-torchrun and is not removed")
    os.remove(path)
    return [f"removed {path}", _describe_path(path)]


def _is_own(path: str) -> bool:
    return not os.path.islink(path) and os.path.isfile(path) and _MARK in _head(path)


def _head(path: str) -> str:
    with open(path, "rb") as file:
        return os.fsdecode(file.read(_HEAD_BYTES))


def _describe_path(path: str) -> str:
    """Return which ``torchrun`` a shell runs now, and whether it is ``path``."""
    found = find_torchrun(os.environ.get("PATH", os.defpath))
    remedy = f"put the folder first: export PATH={shlex.quote(os.path.dirname(path))}:$PATH"
    written = os.path.lexists(path)
    if found is None:
        return f"PATH has no torchrun; {remedy}" if written else "PATH has no torchrun"
    if written and os.path.samefile(found, path):
        return f"PATH has {os.path.dirname(path)} before any other torchrun"
    text = f"PATH has {found}{_describe_owner(found)}"
    return f"{text}; {remedy}" if written else text


def _describe_owner(path: str) -> str:
    """Return the environment of a ``torchrun`` as an addition to its path. Empty for that of this environment."""
    python = interpreter_of(path)
    if python is None:
        return " first"
    if not os.path.exists(python):
        return f" first, whose interpreter {python} does not exist"
    if os.path.dirname(python) != os.path.dirname(sys.executable):
        return f" first, of another environment ({python})"
    return " first"


def find_torchrun(path: str) -> str | None:
    """Return the ``torchrun`` that a shell with this ``PATH`` runs; ``None`` if there is none."""
    for folder in path.split(os.pathsep):
        file = os.path.join(folder or ".", _NAME)
        if os.path.isfile(file) and os.access(file, os.X_OK):
            return file
    return None


def interpreter_of(path: str) -> str | None:
    """Return the absolute path of the Python of a script; ``None`` for a program or a script of another kind."""
    try:
        lines = _head(path).splitlines()
    except OSError:
        return None
    for line in lines[:4]:
        # The first line of a script; the second one, if the path is too long for the first; a line of this module.
        words = line.removeprefix("#!").removeprefix("'''exec'").removeprefix("python=").strip()
        try:
            word = shlex.split(words)[:1]
        except ValueError:
            continue
        if word and word[0].startswith("/") and "python" in os.path.basename(word[0]):
            return word[0]
    return None
