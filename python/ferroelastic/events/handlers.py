"""Mirror of ``torch.distributed.elastic.events.handlers``.

Intended differences: handlers in torch's own table are found too, if torch's module is loaded. The handler ``jsonl`` writes a file.
"""

from __future__ import annotations

import logging

from ferroelastic._compat import torch_module
from ferroelastic.events._jsonl import JsonLinesHandler

__all__ = ["finish", "get_logging_handler", "use_folder"]

_log_handlers: dict[str, logging.Handler] = {
    "console": logging.StreamHandler(),
    "dynamic_rendezvous": logging.NullHandler(),
    "jsonl": JsonLinesHandler(),
    "null": logging.NullHandler(),
}
_defaults = dict(_log_handlers)


def use_folder(folder: str | None) -> None:
    """Let the handler ``jsonl`` write to this folder, the log folder of the run. ``None`` for no folder. Not in torch."""
    for handler in _log_handlers.values():
        if isinstance(handler, JsonLinesHandler):
            handler.use_folder(folder)


def finish() -> None:
    """Write the remaining events of the handler ``jsonl`` and close its file, within half a second. Not in torch."""
    for handler in _log_handlers.values():
        if isinstance(handler, JsonLinesHandler):
            handler.finish()


def get_logging_handler(destination: str = "null") -> logging.Handler:
    """Return the logging handler of a destination.

    A handler registered in this module takes precedence, then a handler in torch's table, then the default.

    Args:
        destination: ``"null"``, ``"console"``, ``"jsonl"``, ``"dynamic_rendezvous"`` or another registered name.

    Raises:
        KeyError: no handler is registered under that name.
    """
    ours = _log_handlers.get(destination)
    if ours is not None and ours is not _defaults.get(destination):
        return ours
    theirs: dict[str, logging.Handler] = getattr(torch_module(__name__), "_log_handlers", {})
    handler = theirs.get(destination, ours)
    if handler is None:
        raise KeyError(
            f"no event handler {destination!r} is registered; use one of {sorted({*_log_handlers, *theirs})}"
        )
    return handler
