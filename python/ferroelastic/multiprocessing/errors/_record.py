"""The decorator that records what a main function raises."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ferroelastic._compat import family
from ferroelastic.multiprocessing.errors._failures import NOT_AVAILABLE, ChildFailedError
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferroelastic.multiprocessing.errors.error_handler import ErrorHandler

P = ParamSpec("P")
R = TypeVar("R")

logger = get_logger(__name__)


def record(fn: Callable[P, R], error_handler: ErrorHandler | None = None) -> Callable[P, R | None]:
    """Decorate the main function of a process so that its errors reach the process that started it.

    An exception is written by ``error_handler`` and raised again. Of a :class:`ChildFailedError` the error of the child that failed
    first is handed on instead. ``sys.exit(0)`` becomes a return of ``None``.

    Use it once per process, on the outermost function. Mirrors ``torch.distributed.elastic.multiprocessing.errors.record``.

    Args:
        fn: the main function.
        error_handler: how to write; by default what ``get_error_handler()`` returns.
    """
    if error_handler is None:
        # Looked up on the package, because that is where programs replace it.
        from ferroelastic.multiprocessing import errors

        error_handler = errors.get_error_handler()
    handler = error_handler

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
        handler.initialize()
        try:
            return fn(*args, **kwargs)
        except SystemExit as ending:
            if ending.code == 0:
                return None
            raise
        except family(ChildFailedError) as error:
            rank, failure = error.get_first_failure()
            if failure.error_file == NOT_AVAILABLE:
                logger.info(
                    "rank %s FAILED with no error file. Decorate your entrypoint fn with @record for traceback info. "
                    "See: https://pytorch.org/docs/stable/elastic/errors.html",
                    rank,
                )
            else:
                handler.dump_error_file(failure.error_file, failure.exitcode)
            raise
        except Exception as error:
            handler.record_exception(error)
            raise

    return wrapper
