"""Failures of workers because of lines in their logs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ferroelastic import _rust

__all__ = ["LogWatch"]

logger = get_logger(__name__)

_FINISH_TIMEOUT_S = 10.0


class LogWatch:
    """Lets the engine search the log files of a group of workers for lines that match rules.

    Args:
        rules: the rules.
        streams: paths of the log files by local rank, by name of the stream. A path that is empty or the null device is not searched.
        ranks: global ranks by local rank.
        group: the workers.
    """

    def __init__(
        self,
        rules: _rust.LogRules,
        streams: Mapping[str, Mapping[int, str]],
        ranks: Mapping[int, int],
        group: _rust.Group,
    ) -> None:
        files = [
            (path, local_rank, f"{stream} of rank {ranks[local_rank]}")
            for stream, paths in streams.items()
            for local_rank, path in paths.items()
            if path and path != os.devnull
        ]
        if not files:
            logger.warning(
                "no output of the workers is written to files, so no log pattern can match; redirect or tee the output"
            )
        self._group = group
        self._ranks = ranks
        self._scan: _rust.LogScan | None = group.scan_logs(files, rules)
        self._failures: dict[int, _rust.LogFailure] = {}

    def update(self) -> dict[int, _rust.LogFailure]:
        """Return the failures so far by local rank. New ones are logged."""
        for failure in self._group.log_failures():
            if self._failures.setdefault(failure.index, failure) is failure:
                logger.error(
                    "rank %s has failed because of a log line: %s", self._ranks[failure.index], describe(failure)
                )
        return self._failures

    def finish(self, timeout_s: float = _FINISH_TIMEOUT_S) -> dict[int, _rust.LogFailure]:
        """Search the rest of the files and end the search.

        Args:
            timeout_s: timeout in seconds. At its end the rest is not searched, and a warning is logged.

        Returns:
            All failures by local rank.
        """
        scan, self._scan = self._scan, None
        if scan is not None and not scan.finish(timeout_s):
            logger.warning(
                "the search of the workers' logs for patterns was not complete after %g s and was ended",
                timeout_s,
            )
        return self.update()

    def close(self) -> None:
        """End the search. The rest of the files is not searched."""
        self._scan = None


def describe(failure: _rust.LogFailure) -> str:
    """Return the reason of a failure and its line."""
    return f"{failure.reason} ({failure.stream}: {failure.line!r})"
