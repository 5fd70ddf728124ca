"""Starts and supervises the workers of one host. Mirrors ``torch.distributed.elastic.multiprocessing``.

:mod:`ferroelastic.multiprocessing.api` lists the differences.
"""

from ferroelastic.multiprocessing._launch import start_processes
from ferroelastic.multiprocessing._log_options import LogOptions
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
from ferroelastic.numa.binding import NumaOptions
from ferroelastic.utils.logging import get_logger

__all__ = [
    "DefaultLogsSpecs",
    "LogOptions",
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
    "_validate_full_rank",
    "get_logger",
    "start_processes",
    "to_map",
]
