"""Workers of this host. Mirrors ``torch.distributed.elastic.multiprocessing.api``.

Differences:

* ``wait`` returns at the exit of a worker and does not poll. The engine signals the peers of a failed worker immediately.
* ``RunProcsResult.failures`` holds workers that failed by themselves. Workers that the agent stopped are in ``RunProcsResult.stopped``.
* All workers are stopped in parallel with one deadline: stop signal, grace period (``PContext.shutdown_timeout`` after a failure), SIGKILL.
  The signals go to each worker's process group. A stop ends when all process groups are empty.
* Workers end when the agent ends, even if the agent is killed with SIGKILL.
* ``DefaultLogsSpecs`` never deletes the logs of an earlier attempt. Rank numbers may have more than one digit.
* Function workers return values through files. A ``KeyboardInterrupt`` in a function worker is not a success.
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
