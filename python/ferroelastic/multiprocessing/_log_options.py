"""Options for the lines that workers write to log files. Not in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferroelastic import _rust

__all__ = ["LOG_FORMATS", "MIN_LOG_SIZE", "LogOptions"]

LOG_FORMATS = ("text", "json")
MIN_LOG_SIZE = 1 << 16


@dataclass(frozen=True)
class LogOptions:
    """Options for the lines of workers.

    Args:
        ranks: the global ranks whose output is shown on the console, as ranges. Empty for all ranks.
        format: format of teed lines on the console: ``"text"``, or ``"json"`` for one JSON object per line.
        fail_on: pairs of a pattern and a reason. A worker whose log has a line with the pattern has failed.
        warn_on: pairs of a pattern and a reason. A line with the pattern causes a warning.
        max_size: size in bytes from which the lines of a log file move to a numbered file, at least 64 KiB. ``None`` for no limit.
        max_files: number of numbered files of each log file that are kept, at least 1.

    Raises:
        ValueError: the format is unknown, a limit is too small, or a pattern is invalid. In the last case, the second argument of the
            exception is the pattern.
    """

    ranks: tuple[range, ...] = ()
    format: str = "text"
    fail_on: Sequence[tuple[str, str]] = ()
    warn_on: Sequence[tuple[str, str]] = ()
    max_size: int | None = None
    max_files: int = 5

    def __post_init__(self) -> None:
        """Check the values."""
        if self.format not in LOG_FORMATS:
            raise ValueError(
                f"format={self.format!r} is not a format of log lines; use one of {', '.join(LOG_FORMATS)}"
            )
        if self.max_size is not None and self.max_size < MIN_LOG_SIZE:
            raise ValueError(f"max_size={self.max_size} is too small for a log file; give at least {MIN_LOG_SIZE}")
        if self.max_files < 1:
            raise ValueError(f"max_files={self.max_files} is too small; give at least 1")
        self.rules()

    def shows(self, rank: int) -> bool:
        """Return whether the output of a global rank is shown on the console."""
        return not self.ranks or any(rank in ranks for ranks in self.ranks)

    def rules(self) -> _rust.LogRules | None:
        """Return the compiled rules; ``None`` if there are none."""
        if not self.fail_on and not self.warn_on:
            return None
        from ferroelastic import _rust

        return _rust.LogRules(fail=self.fail_on, warn=self.warn_on)

    def needs_files(self) -> bool:
        """Return whether the options need streams that are written to files."""
        return self.format != "text" or bool(self.fail_on or self.warn_on)
