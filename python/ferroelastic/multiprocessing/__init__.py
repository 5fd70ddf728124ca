"""Launching and supervising the workers of one host; mirrors ``torch.distributed.elastic.multiprocessing``.

The differences are those of :mod:`ferroelastic.multiprocessing.api`.
"""

from ferroelastic.multiprocessing._launch import start_processes
from ferroelastic.multiprocessing.api import (
    DefaultLogsSpecs,
    LogsDest,
    LogsSpecs,
    MultiprocessContext,
    PContext,
    RunProcsResult,
    SignalException,
    Std,
    SubprocessContext,
    _validate_full_rank,
    to_map,
)
from ferroelastic.multiprocessing.errors import ProcessFailure

__all__ = [
    "DefaultLogsSpecs",
    "LogsDest",
    "LogsSpecs",
    "MultiprocessContext",
    "PContext",
    "ProcessFailure",
    "RunProcsResult",
    "SignalException",
    "Std",
    "SubprocessContext",
    "_validate_full_rank",
    "start_processes",
    "to_map",
]
