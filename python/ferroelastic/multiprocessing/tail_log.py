"""Copying workers' log files to the console while they grow; mirrors ``torch.distributed.elastic.multiprocessing.tail_log``.

Differences: files are followed natively and without polling (``interval_sec`` is accepted and not used). Lines are written whole. A line
that has no end is shown after 100 ms, with its prefix, and goes on in place if nothing else was written meanwhile (not with a filter, nor
to a stream without descriptor). All that a file held when ``stop`` was called is written before it returns. A log file that does not
exist is created.
"""

from __future__ import annotations

import io
import os
import threading
from typing import TYPE_CHECKING, TextIO

from ferroelastic._compat import family
from ferroelastic._engine import get_engine
from ferroelastic._signals import SignalException
from ferroelastic.utils import _threads
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ferroelastic import _rust

__all__ = ["TailLog", "tail_logfile"]

logger = get_logger(__name__)

_FINISH_TIMEOUT_S = 5.0
_CHUNK = 1 << 16


def _keep_all(_line: str) -> bool:
    return True


def tail_logfile(
    header: str,
    file: str,
    dst: TextIO,
    finished: threading.Event,
    interval_sec: float,
    log_line_filter: Callable[[str], bool] | None = None,
) -> None:
    """Copy the lines of one file to ``dst`` until ``finished`` is set and the file's end is reached. Mirrors torch's.

    Args:
        header: written before each line.
        file: path of the log file.
        dst: where the lines go.
        finished: set by the caller when nothing more will be written to the file.
        interval_sec: not used.
        log_line_filter: if given, only lines for which it is true (torch writes nothing without it).
    """
    if finished.is_set() and not os.path.exists(file):
        return
    tail = TailLog(
        "", {0: file}, dst, {0: header}, interval_sec, _keep_all if log_line_filter is None else log_line_filter
    )
    tail.start()
    finished.wait()
    tail.stop()


class TailLog:
    """Copies the lines of growing log files to one text stream. Mirrors torch's ``TailLog``.

    Lines go natively to the stream's descriptor, without Python, where it is an ordinary file, pipe or terminal. Any other
    stream (a ``StringIO``, a notebook's), or one with a ``log_line_filter``, is written to by one thread of this object.

    Args:
        name: with the local rank, the default header of each line: ``[name0]:``.
        log_files: paths by local rank.
        dst: where the lines go; ``None`` (no console) writes none.
        log_line_prefixes: headers by local rank, instead of the default.
        interval_sec: not used.
        log_line_filter: only lines (header not included) for which it is true.
        only_lines_with: if not empty, only lines that contain one of these strings; applied natively.
    """

    def __init__(
        self,
        name: str,
        log_files: Mapping[int, str],
        dst: TextIO | None,
        log_line_prefixes: Mapping[int, str] | None = None,
        interval_sec: float = 0.1,
        log_line_filter: Callable[[str], bool] = _keep_all,
        *,
        only_lines_with: Sequence[str] = (),
    ) -> None:
        self._name = name
        self._dst = dst
        self._log_files = log_files
        self._log_line_prefixes = log_line_prefixes
        self._log_line_filter = log_line_filter
        self._only_lines_with = only_lines_with
        self._interval_sec = interval_sec
        self._threadpool = _LineWriter() if log_files else None
        self._tail: _rust.Tail | None = None
        self._stopped = False

    def start(self) -> TailLog:
        """Begin to copy. What goes wrong is logged and does not raise, as in torch.

        Returns:
            This object.
        """
        # The null device has no lines and changes all the time.
        files = {rank: path for rank, path in self._log_files.items() if path != os.devnull}
        if not files or self._dst is None or self._threadpool is None or self._tail is not None:
            return self
        try:
            console_fd = _descriptor(self._dst) if self._log_line_filter is _keep_all else None
            if console_fd is None:
                self._tail = self._threadpool.start(
                    {rank: (path, self._header(rank)) for rank, path in files.items()},
                    self._dst,
                    self._log_line_filter,
                    self._only_lines_with,
                )
            else:
                self._dst.flush()
                self._tail = get_engine().tail(
                    [(path, self._header(rank)) for rank, path in files.items()],
                    console_fd=console_fd,
                    only_lines_with=self._only_lines_with,
                )
        except OSError as error:
            logger.warning("The logs of %s are not shown, they are in the log files: %s", self._name, error)
        return self

    def _header(self, local_rank: int) -> str:
        default = f"[{self._name}{local_rank}]:"
        return self._log_line_prefixes.get(local_rank, default) if self._log_line_prefixes else default

    def stop(self, patience_s: float = _FINISH_TIMEOUT_S) -> None:
        """Write what the files still hold, and end.

        Args:
            patience_s: a console that takes nothing for so many seconds is given up. Not in torch.
        """
        tail, self._tail = self._tail, None
        try:
            if tail is not None:
                report = tail.finish(patience_s)
                self._tell_what_was_not_shown(report, patience_s)
                if self._threadpool is not None:
                    self._threadpool.expect(report.bytes)
        except family(SignalException):
            raise
        except Exception as error:
            logger.exception("error in log tailer for %s. %s", self._name, type(error).__qualname__)
        finally:
            if self._threadpool is not None:
                self._threadpool.shutdown(wait=True)
            self._stopped = True

    def _tell_what_was_not_shown(self, report: _rust.TailReport, patience_s: float) -> None:
        if report.dropped_bytes:
            reason = f"took nothing for {patience_s:g} s"
            if report.console_error is not None:
                reason = f"cannot be written to any more ({report.console_error})"
            logger.warning(
                "%s bytes of the logs of %s were not shown, because the console %s; they are in the log files",
                *(report.dropped_bytes, self._name, reason),
            )
        for path, reason in report.unread:
            logger.warning("The log file %s of %s was not shown: %s", path, self._name, reason)

    def stopped(self) -> bool:
        """Whether :meth:`stop` has finished."""
        return self._stopped


def _descriptor(dst: TextIO) -> int | None:
    """The descriptor that ``dst`` writes to without changing the bytes, or ``None``.

    A ``fileno`` alone does not say so: a notebook's stream gives the terminal's, a compressed file's the archive's.
    """
    if isinstance(dst, io.TextIOWrapper) and isinstance(getattr(dst.buffer, "raw", dst.buffer), io.FileIO):
        try:
            return dst.fileno()
        except (OSError, ValueError):  # closed or detached
            return None
    return None


class _LineWriter:
    """Takes a native tail's lines through a pipe and writes them to a text stream from one thread."""

    def __init__(self) -> None:
        self._shutdown = False  # torch's thread pool has it, and torch's tests look at it
        self._thread: threading.Thread | None = None
        self._read_fd = self._write_fd = -1
        self._expected: int | None = None

    def start(
        self,
        files: Mapping[int, tuple[str, str]],
        dst: TextIO,
        keep: Callable[[str], bool],
        only_lines_with: Sequence[str],
    ) -> _rust.Tail:
        self._read_fd, self._write_fd = os.pipe()
        try:
            # The filter sees the line without its header, so natively each line gets the position of its file instead.
            tail = get_engine().tail(
                [(path, f"{position}:") for position, (path, _) in enumerate(files.values())],
                console_fd=self._write_fd,
                only_lines_with=only_lines_with,
                whole_lines_only=True,  # each line carries the position of its file
            )
        except BaseException:
            self._close()
            raise
        headers = [header for _, header in files.values()]
        self._thread = threading.Thread(target=self._run, args=(headers, dst, keep), name="ferro-tail", daemon=True)
        _threads.start(self._thread)
        return tail

    def expect(self, total: int) -> None:
        """End after ``total`` bytes.

        End of file would not do: a process forked meanwhile holds the pipe's other end, too. So the count says when to
        stop, and one byte more wakes the reader to look at it.
        """
        self._expected = total

    def shutdown(self, *, wait: bool) -> None:
        self._shutdown = True
        if self._thread is None:
            return
        if self._expected is None:
            self._expected = 0
        if _has_room(self._write_fd, _FINISH_TIMEOUT_S):
            os.write(self._write_fd, b"\n")
        if wait:
            self._thread.join(_FINISH_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("the stream that logs are copied to is stuck; its thread is left behind")
        else:
            self._close()
        self._thread = None

    def _close(self) -> None:
        os.close(self._read_fd)
        os.close(self._write_fd)
        self._read_fd = self._write_fd = -1

    def _run(self, headers: Sequence[str], dst: TextIO, keep: Callable[[str], bool]) -> None:
        read, rest, failed = 0, b"", False
        while self._expected is None or read <= self._expected:
            chunk = os.read(self._read_fd, _CHUNK)
            if self._expected is not None and read + len(chunk) > self._expected:
                chunk = chunk[: max(0, self._expected - read)]
                read = self._expected + 1
            else:
                read += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            if failed:
                continue  # read on, so that the tail does not wait for us
            try:
                _write_lines(lines, headers, dst, keep)
            except Exception:
                failed = True
                logger.exception("failed to copy log lines to %r", dst)


def _has_room(fd: int, timeout_s: float) -> bool:
    import select

    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    return bool(poller.poll(timeout_s * 1000))


def _write_lines(lines: Sequence[bytes], headers: Sequence[str], dst: TextIO, keep: Callable[[str], bool]) -> None:
    kept = []
    for raw in lines:
        position, _, content = raw.partition(b":")
        line = content.decode(errors="replace") + "\n"
        if keep(line):
            kept.append(headers[int(position)] + line)
    if kept:
        dst.write("".join(kept))
        if hasattr(dst, "flush"):  # what people pass as a text stream has not always more than `write`
            dst.flush()
