"""The decorator that records exceptions of a main function."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ferroelastic._compat import family, newer
from ferroelastic.multiprocessing.errors._failures import NOT_AVAILABLE, ChildFailedError
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferroelastic.multiprocessing.errors.error_handler import ErrorHandler

P = ParamSpec("P")
R = TypeVar("R")

logger = get_logger(__name__)


def record(fn: Callable[P, R], error_handler: ErrorHandler | None = None) -> Callable[P, R | None]:
    """Decorate the main function of a process to report its exceptions to the parent process.

    ``error_handler`` writes an exception to the error file, then the exception is raised again. For a :class:`ChildFailedError` the error
    file of the child that failed first is copied instead. ``sys.exit(0)`` becomes a return of ``None``.

    A handler may lack the hooks ``set_entrypoint_fn_name`` and ``record_success``, which torch before 2.15 does not have.

    Use the decorator once per process, on the outermost function. Mirrors ``torch.distributed.elastic.multiprocessing.errors.record``.

    Args:
        fn: the main function.
        error_handler: handler that writes the error; ``get_error_handler()`` by default.

    Returns:
        The decorated function. It raises the exceptions of ``fn``.
    """
    if error_handler is None:
        # Looked up in the package, because programs replace it there.
        from ferroelastic.multiprocessing import errors

        error_handler = errors.get_error_handler()
    handler = error_handler

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
        newer(handler, "set_entrypoint_fn_name", _ignore)(getattr(fn, "__qualname__", None))
        handler.initialize()
        try:
            result = fn(*args, **kwargs)
        except SystemExit as exit_request:
            if exit_request.code == 0:
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
        # Outside of the try block: an exception of the hook is none of the function.
        newer(handler, "record_success", _ignore)()
        return result

    return wrapper


def _ignore(*_: object) -> None:
    """Stand in for a hook that the handler lacks."""
