"""Workers on this host; mirrors ``torch.distributed.elastic.multiprocessing.api``.

Differences:

* An exit is noticed when it happens; ``wait`` does not poll. The peers of a failed worker are signalled by the engine at once.
* ``RunProcsResult.failures`` holds real failures only; workers that the agent stopped are in ``RunProcsResult.stopped``.
* One deadline for the whole group: the stop signal, a grace (``PContext.shutdown_timeout`` where a worker has failed), SIGKILL, to
  each worker's process group, until it is verified empty.
* Commands end when the agent does, however it ends; so do function workers.
* ``DefaultLogsSpecs`` never deletes an earlier attempt's logs; rank numbers may have more than one digit.
* Function workers return through files, and a ``KeyboardInterrupt`` in one is not a success.
"""

from ferroelastic._signals import SignalException, _terminate_process_handler
from ferroelastic.multiprocessing._context import PContext, RunProcsResult
from ferroelastic.multiprocessing._entry import _wrap
from ferroelastic.multiprocessing._logs import DefaultLogsSpecs, LogsDest, LogsSpecs
from ferroelastic.multiprocessing._multiprocess_context import MultiprocessContext
from ferroelastic.multiprocessing._std import Std, _validate_full_rank, get_std_cm, to_map
from ferroelastic.multiprocessing._subprocess_context import SubprocessContext
from ferroelastic.multiprocessing.errors import ProcessFailure, record
from ferroelastic.multiprocessing.subprocess_handler import SubprocessHandler, get_subprocess_handler
from ferroelastic.multiprocessing.tail_log import TailLog
from ferroelastic.numa.binding import NumaOptions

__all__ = [
    "DefaultLogsSpecs",
    "LogsDest",
    "LogsSpecs",
    "MultiprocessContext",
    "NumaOptions",
    "PContext",
    "ProcessFailure",
    "RunProcsResult",
    "SignalException",
    "Std",
    "SubprocessContext",
    "SubprocessHandler",
    "TailLog",
    "_terminate_process_handler",
    "_validate_full_rank",
    "_wrap",
    "get_std_cm",
    "get_subprocess_handler",
    "record",
    "to_map",
]
