"""Mirror of ``torch.distributed.elastic.multiprocessing.errors.handlers``; no intended differences."""

from __future__ import annotations

from ferroelastic.multiprocessing.errors.error_handler import ErrorHandler

__all__ = ["get_error_handler"]


def get_error_handler() -> ErrorHandler:
    """Return a handler that records the errors of this process. Mirrors torch's ``get_error_handler``."""
    return ErrorHandler()
