"""The option ``--print-completion``. The optional package shtab writes the script for the shell."""

from __future__ import annotations

import importlib
from argparse import Action
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator, Sequence

__all__ = ["PrintCompletion"]


class Shells(Collection[str]):
    """Names of the shells that shtab supports. shtab is imported when the names are read, because a launch does not need them."""

    def _names(self) -> Sequence[str]:
        try:
            names: Sequence[str] = importlib.import_module("shtab").SUPPORTED_SHELLS
        except ImportError:
            return ("bash", "zsh", "tcsh")
        return names

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


class PrintCompletion(Action):
    """Print a completion script for ``ferrorun`` and end the process: with code 0, or with 1 if shtab is not installed."""

    # A property, because argparse reads the choices among the attributes for --help, which would import shtab.
    @property
    def choices(self) -> Shells:
        """The supported shells."""
        return Shells()

    @choices.setter
    def choices(self, _: object) -> None:
        """Ignore the value of ``add_argument``."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Print the script."""
        del namespace
        try:
            shtab = importlib.import_module("shtab")
        except ImportError:
            parser.exit(1, f"{option_string} needs the package shtab, which is not installed: pip install shtab\n")
        # The script completes the console script, also if this process is `python -m ferroelastic.run`.
        parser.prog = "ferrorun"
        print(shtab.complete(parser, shell=values))  # noqa: T201 - the output of the option
        parser.exit()
