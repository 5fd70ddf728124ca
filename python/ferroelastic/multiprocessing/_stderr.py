"""The last bytes of each worker's standard error, and the streams of workers that use the console.

A stream that is redirected has a file. Otherwise the worker writes to a pipe, or to a pseudo-terminal if the console is a terminal, and the
native relay copies the bytes to the console.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from functools import cache
from typing import TYPE_CHECKING

from ferroelastic._engine import get_engine
from ferroelastic.utils import _threads
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ferroelastic import _rust

__all__ = ["KEPT_BYTES", "ConsoleStreams", "end_of_file"]

logger = get_logger(__name__)

KEPT_BYTES = 64 * 1024
"""Maximum number of bytes that are kept of each worker."""

_FLUSH_TIMEOUT_S = 0.05
_READ_TIMEOUT_S = 1.0
_COPY = "import os\ntry:\n while data := os.read(0, 4096): os.write(2, data)\nexcept OSError: pass"


class ConsoleStreams:
    """The relay of the workers whose standard error is not redirected.

    On a terminal, standard output and standard error of a worker share a pseudo-terminal, so their order stays, and the kept bytes are
    those of both.

    Args:
        stdouts: log file of each worker's standard output by local rank, ``""`` if it is not redirected.
        stderrs: the same for standard error.
        interactive_rank: local rank that has the terminal of standard input; ``None`` for no rank.
    """

    def __init__(self, stdouts: Mapping[int, str], stderrs: Mapping[int, str], interactive_rank: int | None) -> None:
        ranks = [rank for rank in sorted(stderrs) if not stderrs[rank] and rank != interactive_rank]
        self._index = {rank: index for index, rank in enumerate(ranks)}
        self._stdouts = stdouts
        self._relay: _rust.Relay | None = None
        self._shares_stdout = False
        self._is_finished = False
        if not ranks or _is_discarded(2):
            return
        try:
            self._relay = get_engine().relay(len(ranks), console_fd=2, successor=_successor())
        except OSError as error:
            logger.info("workers write to standard error directly, and its last lines are not kept: %s", error)
            return
        self._shares_stdout = self._relay.is_terminal and _is_same_device(1, 2)

    def of(self, local_rank: int) -> tuple[_rust.WorkerEnd | None, _rust.WorkerEnd | None]:
        """Return the worker's ends for standard output and standard error; ``None`` for streams without a relay."""
        index = self._index.get(local_rank)
        if self._relay is None or index is None:
            return None, None
        end = self._relay.worker_end(index)
        return end if self._shares_stdout and not self._stdouts[local_rank] else None, end

    def path_of(self, local_rank: int) -> tuple[str, list[int]]:
        """Return the path of the worker's end, and the standard streams to open on it. Without a relay, both are empty.

        Processes that this process does not start itself open the path. It is valid until :meth:`finish`.
        """
        stdout, stderr = self.of(local_rank)
        if stderr is None:
            return "", []
        return f"/proc/{os.getpid()}/fd/{stderr.fileno()}", [2] if stdout is None else [1, 2]

    def last(self, local_rank: int) -> bytes:
        """Return the last bytes of a worker's standard error, ``b""`` if they are not kept."""
        index = self._index.get(local_rank)
        return b"" if self._relay is None or index is None else self._relay.last(index)

    def flush(self) -> None:
        """Copy the bytes that the workers have written, so that later lines of this process follow them."""
        if self._relay is not None:
            self._relay.flush(_FLUSH_TIMEOUT_S)

    def finish(self, timeout_s: float) -> None:
        """Copy the rest of the streams. Call this when the workers have ended. Idempotent.

        Args:
            timeout_s: give up if the console accepts nothing for this many seconds.
        """
        if self._relay is None or self._is_finished:
            return
        self._is_finished = True
        report = self._relay.finish(timeout_s)
        if report.console_error is not None:
            logger.warning(
                "standard error failed (%s): %s bytes of the workers were not written",
                report.console_error,
                report.dropped_bytes,
            )
        elif report.dropped_bytes:
            logger.warning(
                "standard error accepted nothing for %g s: %s bytes of the workers were not written",
                timeout_s,
                report.dropped_bytes,
            )


_blocked_read: threading.Thread | None = None


def end_of_file(path: str) -> bytes:
    """Return the last bytes of a log file, ``b""`` if it cannot be read within a second.

    A thread reads the file, because the disk may hang. While a read hangs, further calls return ``b""`` at once.
    """
    global _blocked_read  # noqa: PLW0603 - the disks belong to the host, not to a caller
    if _blocked_read is not None and _blocked_read.is_alive():
        return b""
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(_read_end(path)), name="ferro-read", daemon=True)
    try:
        _threads.start(reader)
    except RuntimeError:  # the limit of threads is reached
        return b""
    reader.join(_READ_TIMEOUT_S)
    _blocked_read = reader if reader.is_alive() else None
    return found[0] if found else b""


def _read_end(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return b""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return b""
        return os.pread(descriptor, KEPT_BYTES, max(0, status.st_size - KEPT_BYTES))
    except OSError:
        return b""
    finally:
        os.close(descriptor)


@cache
def _successor() -> _rust.Command:
    """Return a program that copies standard input to standard error, for processes that outlive this one."""
    from ferroelastic import _rust

    # With the mark of the run, the guard process would end the program.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FERROELASTIC_")}
    return _rust.Command([sys.executable, "-I", "-S", "-c", _COPY], environment, stdout=os.devnull)


def _is_discarded(descriptor: int) -> bool:
    """Whether a standard stream is closed, or the null device."""
    try:
        # After a start with a closed stream, another file of this process may have its number. Such a file is closed on exec.
        if not os.get_inheritable(descriptor):
            return True
        status = os.fstat(descriptor)
        return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev
    except OSError:
        return True


def _is_same_device(first: int, second: int) -> bool:
    try:
        return os.fstat(first).st_rdev == os.fstat(second).st_rdev
    except OSError:
        return False
