"""Mirror of ``torch.distributed.elastic.utils.log_level``.

Intended difference: ``LOGLEVEL`` may be in lower case or a number, and an error about it names it.
"""

from __future__ import annotations

import os

__all__ = ["chosen_log_level", "get_log_level"]

_VARIABLE = "LOGLEVEL"


def get_log_level() -> str:
    """Return the level that loggers of this package have unless ``LOGLEVEL`` is set."""
    return "WARNING"


def chosen_log_level(default: str) -> int | str:
    """Return the level that the environment variable ``LOGLEVEL`` chooses: a name in any case, or a number.

    Args:
        default: the level if the variable is not set, or empty.

    Raises:
        ValueError: it is not a level.
    """
    text = os.environ.get(_VARIABLE, "").strip()
    if not text:
        return default
    if text.isdecimal():
        return int(text)
    import logging

    if not isinstance(logging.getLevelName(text.upper()), int):
        raise ValueError(  # noqa: TRY004 - of a variable, which is text
            f"{_VARIABLE}={text!r} is not a level; use DEBUG, INFO, WARNING or ERROR"
        )
    return text.upper()
