"""Reports failures of workers. Mirrors ``torch.distributed.elastic.multiprocessing.errors``.

A worker decorates its main function with :func:`record`. An uncaught exception is then written to the file in the environment variable
``TORCHELASTIC_ERROR_FILE``. The agent reads the file into a :class:`ProcessFailure` and raises one :class:`ChildFailedError` for all
failed workers.

Intended differences:

* A damaged or incomplete error file is reported in the message and does not raise.
* Error files are written atomically.
* Failures are ordered by the kernel's time of each exit in nanoseconds, if it is known. torch compares whole seconds.
* The host name is resolved once per process.
"""

from ferroelastic.multiprocessing.errors._failures import ChildFailedError, ProcessFailure
from ferroelastic.multiprocessing.errors._record import record
from ferroelastic.multiprocessing.errors.error_handler import ErrorHandler
from ferroelastic.multiprocessing.errors.handlers import get_error_handler
from ferroelastic.utils.logging import get_logger

__all__ = ["ChildFailedError", "ErrorHandler", "ProcessFailure", "get_error_handler", "get_logger", "record"]
