"""Mirror of ``torch.distributed.elastic.utils.logging``.

Intended difference: the name of the calling module is read from its frame. torch builds the whole stack with source lines.
"""

from __future__ import annotations

import logging
import sys

from ferroelastic.utils.log_level import chosen_log_level, get_log_level

__all__ = ["get_logger"]


def get_logger(name: str | None = None) -> logging.Logger:
    """Return a logger with the level of the environment variable ``LOGLEVEL``, or WARNING. Mirrors torch's ``get_logger``.

    Args:
        name: name of the logger; the name of the calling module by default.

    Raises:
        ValueError: ``LOGLEVEL`` is not a level.
    """
    return _setup_logger(name or _derive_module_name(depth=2))


def _setup_logger(name: str | None = None) -> logging.Logger:
    logger = logging.getLogger(name)
    logger.setLevel(chosen_log_level(get_log_level()))
    return logger


def _derive_module_name(depth: int = 1) -> str | None:
    try:
        frame = sys._getframe(depth)  # noqa: SLF001 - the only way that does not read source files
    except ValueError:
        return None
    name = frame.f_globals.get("__name__")
    return name if isinstance(name, str) else None
