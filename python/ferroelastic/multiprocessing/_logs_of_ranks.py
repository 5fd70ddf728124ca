"""Log destinations that treat some ranks differently. Not in torch."""

from __future__ import annotations

import os
from copy import copy
from typing import TYPE_CHECKING

from ferroelastic.multiprocessing._line_heads import global_ranks
from ferroelastic.multiprocessing._logs import CONSOLE, LogsDest, LogsSpecs

if TYPE_CHECKING:
    from ferroelastic.multiprocessing._log_options import LogOptions

__all__ = ["FilteredLogsSpecs", "InteractiveLogsSpecs"]


class InteractiveLogsSpecs(LogsSpecs):
    """Wraps other specs and sends both streams of one local rank to the console instead of a file.

    Args:
        specs: specs for all other output.
        local_rank: rank that uses the terminal.
    """

    def __init__(self, specs: LogsSpecs, local_rank: int) -> None:
        self._specs = specs
        self._local_rank = local_rank

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """See :meth:`LogsSpecs.reify`."""
        dest = copy(self._specs.reify(envs))
        console = {self._local_rank: CONSOLE}
        dest.stdouts, dest.stderrs = {**dest.stdouts, **console}, {**dest.stderrs, **console}
        dest.tee_stdouts, dest.tee_stderrs = map(self._without_rank, (dest.tee_stdouts, dest.tee_stderrs))
        return dest

    def _without_rank(self, paths: dict[int, str]) -> dict[int, str]:
        return {local_rank: path for local_rank, path in paths.items() if local_rank != self._local_rank}

    @property
    def root_log_dir(self) -> str:
        """Root folder of the logs."""
        return self._specs.root_log_dir


class FilteredLogsSpecs(LogsSpecs):
    """Wraps other specs and shows only some global ranks on the console. Log files contain the output of all ranks.

    Args:
        specs: specs for all output.
        options: the shown ranks.
    """

    def __init__(self, specs: LogsSpecs, options: LogOptions) -> None:
        self._specs = specs
        self._options = options

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """See :meth:`LogsSpecs.reify`."""
        dest = copy(self._specs.reify(envs))
        hidden = {local_rank for local_rank, rank in global_ranks(envs).items() if not self._options.shows(rank)}
        dest.stdouts, dest.stderrs = (
            {rank: os.devnull if rank in hidden and path == CONSOLE else path for rank, path in paths.items()}
            for paths in (dest.stdouts, dest.stderrs)
        )
        dest.tee_stdouts, dest.tee_stderrs = (
            {rank: path for rank, path in paths.items() if rank not in hidden}
            for paths in (dest.tee_stdouts, dest.tee_stderrs)
        )
        return dest

    @property
    def root_log_dir(self) -> str:
        """Root folder of the logs."""
        return self._specs.root_log_dir
