"""Mirror of ``torch.distributed.elastic.multiprocessing.errors``: how the failure of a worker reaches the user.

A worker whose main function is decorated with :func:`record` writes an exception that nobody caught to the file that the environment
variable ``TORCHELASTIC_ERROR_FILE`` names. Its agent reads the file into a :class:`ProcessFailure` and raises one
:class:`ChildFailedError` for all workers that failed.

Intended differences: an error file that is damaged or half written is reported in the message and does not raise; files are
written whole or not at all; which failure came first is told from the kernel's notice of the exits where there is one (torch compares
whole seconds); the host name is looked up once per process.
"""

from ferroelastic.multiprocessing.errors._failures import ChildFailedError, ProcessFailure
from ferroelastic.multiprocessing.errors._record import record
from ferroelastic.multiprocessing.errors.error_handler import ErrorHandler
from ferroelastic.multiprocessing.errors.handlers import get_error_handler
from ferroelastic.utils.logging import get_logger

__all__ = ["ChildFailedError", "ErrorHandler", "ProcessFailure", "get_error_handler", "get_logger", "record"]
