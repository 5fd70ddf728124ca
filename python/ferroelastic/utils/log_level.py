"""Mirror of ``torch.distributed.elastic.utils.log_level``.

Intended difference: ``LOGLEVEL`` may be in lower case or a number. The error for an invalid value names the variable.
"""

from __future__ import annotations

import os

__all__ = ["chosen_log_level", "get_log_level"]

_VARIABLE = "LOGLEVEL"


def get_log_level() -> str:
    """Return the default level of this package's loggers. ``LOGLEVEL`` overrides it."""
    return "WARNING"


def chosen_log_level(default: str) -> int | str:
    """Return the level in the environment variable ``LOGLEVEL``: a name in any case, or a number. Not in torch.

    Args:
        default: level if the variable is empty or not set.

    Raises:
        ValueError: the value is not a level.
    """
    text = os.environ.get(_VARIABLE, "").strip()
    if not text:
        return default
    if text.isdecimal():
        return int(text)
    import logging

    if not isinstance(logging.getLevelName(text.upper()), int):
        raise ValueError(  # noqa: TRY004 - the value is wrong, not its type
            f"{_VARIABLE}={text!r} is not a level; use DEBUG, INFO, WARNING or ERROR"
        )
    return text.upper()
