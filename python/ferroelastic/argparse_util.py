"""argparse actions that take their default from a ``PET_*`` environment variable.

Mirrors ``torch.distributed.argparse_util``. Intended difference: the error for a flag variable without an integer
(``PET_STANDALONE=yes``) names the variable, its value and the remedy.
"""

import os
from argparse import Action, ArgumentParser, Namespace
from typing import Any

__all__ = ["check_env", "env"]


class env(Action):  # noqa: N801 - torch's name
    """Option with a value. The default is ``$PET_<DEST>`` if the variable is set, else ``default``.

    The command line takes precedence over the variable. Mirrors ``torch.distributed.argparse_util.env``.

    Args:
        dest: attribute of the namespace. The variable is ``PET_`` followed by ``dest`` in upper case.
        default: value if neither the option nor the variable is set.
        required: whether the option must be given if the variable is not set.
        kwargs: passed to ``argparse.Action``.
    """

    def __init__(self, dest: str, default: Any = None, required: bool = False, **kwargs: Any) -> None:
        default = os.environ.get(f"PET_{dest.upper()}", default)
        super().__init__(dest=dest, default=default, required=required and not default, **kwargs)

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Store the value."""
        del parser, option_string
        setattr(namespace, self.dest, values)


class check_env(Action):  # noqa: N801 - torch's name
    """Flag that a non-zero ``$PET_<DEST>`` also sets. ``0`` clears a default of ``True``.

    Mirrors ``torch.distributed.argparse_util.check_env``.

    Args:
        dest: attribute of the namespace. The variable is ``PET_`` followed by ``dest`` in upper case.
        default: value if neither the flag nor the variable is set.
        kwargs: passed to ``argparse.Action``.

    Raises:
        ValueError: the value of the variable is not an integer.
    """

    def __init__(self, dest: str, default: bool = False, **kwargs: Any) -> None:
        name = f"PET_{dest.upper()}"
        text = os.environ.get(name, "1" if default else "0")
        try:
            value = bool(int(text))
        except ValueError:
            raise ValueError(f"{name}={text!r} is not an integer; set it to 1 or 0, or unset it") from None
        super().__init__(dest=dest, const=True, default=value, nargs=0, **kwargs)

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Set the flag."""
        del parser, values, option_string
        setattr(namespace, self.dest, self.const)
