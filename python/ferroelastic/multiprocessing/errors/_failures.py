"""The failure of one worker, and the error for all failed workers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ferroelastic._compat import TorchCompatible, newer
from ferroelastic._failure.error_file import read_error_file
from ferroelastic.utils._hostname import hostname_for_report
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ferroelastic._rust import Exit

JSON: TypeAlias = dict[str, Any]
GlobalRank: TypeAlias = int

NOT_AVAILABLE = "<N/A>"
NO_MESSAGE = "<NONE>"
_HOW_TO_GET_A_TRACEBACK = "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html"
_NS_PER_S = 1_000_000_000
_MAX_BORDER = 60

logger = get_logger(__name__)


@dataclass
class ProcessFailure(TorchCompatible):
    """A failed process and the content of its error file.

    Mirrors ``torch.distributed.elastic.multiprocessing.errors.ProcessFailure``. The constructor never raises. An error file that is not
    usable is reported in ``message``.

    Args:
        local_rank: local rank of the process.
        pid: process id.
        exitcode: exit code, or the negative number of the signal that ended the process.
        error_file: path of the process's error file. It becomes ``"<N/A>"`` if the file does not exist.
        exit: the kernel's report of the exit, if the engine observed it. Its time orders the failures. Not in torch.

    Attributes:
        error_file_data: content of the error file.
        message: description of the failure, or the ``message`` object of the error file.
        error_file_problem: why the error file is not usable, ``""`` if it is or does not exist. Not in torch.
        timestamp: time of the failure in seconds since the epoch.
    """

    local_rank: int
    pid: int
    exitcode: int
    error_file: str
    error_file_data: JSON = field(init=False)
    message: str | JSON = field(init=False)
    timestamp: int = field(init=False)
    error_file_problem: str = field(init=False, default="", compare=False, repr=False)
    exit: Exit | None = field(default=None, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Read the error file, or describe the exit."""
        self.error_file_data = {"message": NO_MESSAGE}
        self.message = ""
        self.timestamp = int(time.time()) if self.exit is None else self.exit.realtime_ns // _NS_PER_S
        self._read_error_file()
        if not self.message:
            self.message = self._describe_exit()
            if self.exitcode >= 0:
                self.error_file_data["errorTraits"] = {
                    "category": "system_terminated_error",
                    "retryability": "False",
                }

    def _read_error_file(self) -> None:
        data, reason = read_error_file(self.error_file)
        if reason:
            self.error_file_problem = f"{self.error_file}: {reason}"
            logger.warning("error file %s of pid %d is not usable: %s", self.error_file, self.pid, reason)
            self.message = (
                f"{self._describe_exit()}\nIts error file {self.error_file} is not usable ({reason}): "
                "the process may have ended while writing the file"
            )
            return
        if data is None:
            self.error_file = NOT_AVAILABLE
            return
        logger.debug("User process failed with error data: %s", data)
        self.error_file_data = data
        self.message = message = data["message"]
        stamp = data.get("timestamp") if isinstance(message, str) else _extra_info(message).get("timestamp")
        if stamp is None:
            return
        try:
            self.timestamp = int(stamp)
        except (OverflowError, TypeError, ValueError):
            logger.warning("error file %s of pid %d has no usable timestamp: %r", self.error_file, self.pid, stamp)

    def _describe_exit(self) -> str:
        if self.exitcode < 0:
            return f"Signal {-self.exitcode} ({self.signal_name()}) received by PID {self.pid}"
        return _HOW_TO_GET_A_TRACEBACK

    def signal_name(self) -> str:
        """Return the name of the signal that ended the process, or ``"<N/A>"``."""
        if self.exitcode < 0:
            import signal

            try:
                return signal.Signals(-self.exitcode).name
            except ValueError:
                pass
        return NOT_AVAILABLE

    def timestamp_isoformat(self) -> str:
        """Return the time of the failure as ``YYYY-MM-DD_HH:MM:SS``, local time."""
        from datetime import datetime

        try:
            return datetime.fromtimestamp(self.timestamp).isoformat(sep="_")  # noqa: DTZ006 - local time, as torch prints it
        except (OverflowError, ValueError, OSError):  # an error file may hold any number
            return str(self.timestamp)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle. The native ``exit`` cannot be pickled, so its time is stored instead."""
        state = dict(self.__dict__)
        if state.pop("exit", None) is not None:
            state["_failed_at_ns"] = failed_at_ns(self)
        return state


def exit_of(failure: ProcessFailure) -> Exit | None:
    """Return the kernel's report of an exit, or ``None`` if the engine did not observe it.

    Args:
        failure: a failure of this package's or of torch's class.
    """
    ended: Exit | None = newer(failure, "exit", None)
    return ended


def failed_at_ns(failure: ProcessFailure) -> int:
    """Return an upper bound for the time of a failure, in nanoseconds since the epoch.

    It is the earlier of two times: the kernel's report of the exit, and the time in the error file. torch's error files have whole
    seconds; the end of that second is used.

    Args:
        failure: a failure of this package's or of torch's class.
    """
    stored: int | None = newer(failure, "_failed_at_ns", None)
    if stored is not None:
        return stored
    written = _extra_info(failure.message).get("timestamp_ns")
    try:
        limit = int(written)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        # torch's class has 0 if the error file has no time.
        limit = time.time_ns() if failure.timestamp <= 0 else int(failure.timestamp) * _NS_PER_S + _NS_PER_S - 1
    ended = exit_of(failure)
    return limit if ended is None else min(limit, ended.realtime_ns)


def _extra_info(message: object) -> Mapping[str, Any]:
    info = message.get("extraInfo") if isinstance(message, dict) else None
    return info if isinstance(info, dict) else {}


def _enriched(message: str, error_file: str) -> str:
    """Return the text that the error handler of this process gives for a worker that a signal ended.

    Args:
        message: the text of this package, also the result if the handler lacks the hook (torch before 2.14) or fails.
        error_file: path of the worker's error file.
    """
    # Looked up in the package, because programs replace it there.
    from ferroelastic.multiprocessing import errors

    try:
        hook = newer(errors.get_error_handler(), "maybe_enrich_signal_failure_message", None)
        return message if hook is None else str(hook(message, error_file))
    except Exception:
        logger.warning("Failed to enrich signal failure message", exc_info=True)
        return message


def _time_of(failure: ProcessFailure) -> str:
    try:
        return failure.timestamp_isoformat()
    except (OverflowError, ValueError, OSError):  # torch's class does not catch an invalid time of an error file
        return str(failure.timestamp)


class ChildFailedError(TorchCompatible, Exception):
    """One or more workers failed. The first failure is the root cause.

    Mirrors ``torch.distributed.elastic.multiprocessing.errors.ChildFailedError``. In a function that is decorated with ``record``, the
    error file of the first failed worker is copied to the error file of this process.

    Args:
        name: name of the workers' entrypoint.
        failures: failures by global rank; at least one.

    Raises:
        AssertionError: ``failures`` is empty.
    """

    def __init__(self, name: str, failures: dict[GlobalRank, ProcessFailure]) -> None:
        self.name = name
        self.failures = failures
        if not failures:
            raise AssertionError(f"failures of {name!r} is empty; pass at least one failure")
        super().__init__(self.format_msg())

    def get_first_failure(self) -> tuple[GlobalRank, ProcessFailure]:
        """Return the first failure with its global rank."""
        return min(self.failures.items(), key=lambda item: failed_at_ns(item[1]))

    def format_msg(self, boarder_delim: str = "=", section_delim: str = "-") -> str:
        """Return the report of all failures.

        Args:
            boarder_delim: character of the outer lines.
            section_delim: character of the inner lines.
        """
        title = f"{self.name} FAILED"
        root_rank, _ = self.get_first_failure()
        root = ""
        others: list[str] = []
        width = len(title)
        for index, (rank, failure) in enumerate(self.failures.items()):
            text, text_width = self._format_failure(index, rank, failure)
            width = max(width, text_width)
            if rank == root_rank:
                root = text
            else:
                others.append(text)
        width = min(width, _MAX_BORDER)
        border, section = boarder_delim * width, section_delim * width
        # Start with a line break, because the text follows "...ChildFailedError: " in a traceback.
        return "\n".join(
            (
                "",
                border,
                title,
                section,
                "Failures:",
                *(others or ["  <NO_OTHER_FAILURES>"]),
                section,
                "Root Cause (first observed failure):",
                root,
                border,
            )
        )

    def _format_failure(self, idx: int, rank: int, failure: ProcessFailure) -> tuple[str, int]:
        """Return the text of one failure and the length of its longest line."""
        message: object = failure.message
        if isinstance(message, dict):
            message = _extra_info(message).get("py_callstack") or message.get("message", NOT_AVAILABLE)
        if failure.exitcode < 0:
            message = _enriched(str(message), failure.error_file)
        ended_by = failure.signal_name()
        lines = [
            f"[{idx}]:",
            f"  time      : {_time_of(failure)}",
            f"  host      : {hostname_for_report()}",
            f"  rank      : {rank} (local_rank: {failure.local_rank})",
            f"  exitcode  : {failure.exitcode} (pid: {failure.pid})"
            + (f" ({ended_by})" if ended_by != NOT_AVAILABLE else ""),
            f"  error_file: {failure.error_file}",
            "  traceback : " + str(message).replace("\n", "\n  "),
        ]
        text = "\n".join(lines)
        return text, max(map(len, text.split("\n")))
