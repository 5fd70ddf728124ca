"""Copies growing log files of workers to the console. Mirrors ``torch.distributed.elastic.multiprocessing.tail_log``.

Differences:

* The engine follows the files without polling. ``interval_sec`` is accepted and ignored.
* Lines are written whole. An unfinished line is shown with its prefix after 100 ms. The rest of the line continues in place if no other
  output came in between. This does not apply with a filter, or to a stream without a descriptor.
* ``stop`` writes the whole content of the files before it returns.
* A log file that does not exist is created.
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
    """Copy the lines of one file until ``finished`` is set and the end of the file is reached. Mirrors torch's ``tail_logfile``.

    Args:
        header: prefix of each line.
        file: path of the log file.
        dst: destination of the lines.
        finished: event that the caller sets after the last write to the file.
        interval_sec: ignored. torch's polling interval in seconds.
        log_line_filter: predicate for the lines to copy. ``None`` copies all lines; torch copies none.
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

    If the stream is an ordinary file, pipe or terminal, the engine writes to its descriptor without Python. For another stream (a
    ``StringIO``, the stream of a notebook), or with a ``log_line_filter``, a thread of this object writes the lines.

    Args:
        name: name of the group. The default prefix of each line is the name and the local rank: ``[name0]:``.
        log_files: paths of the log files by local rank.
        dst: destination of the lines; ``None`` (no console) writes none.
        log_line_prefixes: prefixes by local rank, instead of the default.
        interval_sec: ignored. torch's polling interval in seconds.
        log_line_filter: predicate for the lines to copy. It gets the line without its prefix.
        only_lines_with: if not empty, copy only lines that contain one of these strings. The engine applies this filter. Not in torch.
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
        self._is_json = False
        self._threadpool = _LineWriter() if log_files else None
        self._tail: _rust.Tail | None = None
        self._stopped = False

    def set_headers(self, headers: Mapping[int, str], *, is_json: bool = False) -> None:
        """Set the text before each line by local rank. Call it before :meth:`start`. Not in torch.

        Args:
            headers: the texts. The time of the line replaces ``${time}``.
            is_json: each text is the beginning of a JSON object whose last string is the content of the line.
        """
        self._log_line_prefixes = headers
        self._is_json = is_json

    def start(self) -> TailLog:
        """Start to copy. An ``OSError`` is logged and not raised, as in torch.

        Returns:
            This object.
        """
        # The null device reports changes and never has lines.
        files = {rank: path for rank, path in self._log_files.items() if path != os.devnull}
        if not files or self._dst is None or self._threadpool is None or self._tail is not None:
            return self
        try:
            console_fd = _descriptor(self._dst) if self._log_line_filter is _keep_all else None
            if console_fd is None:
                self._tail = self._threadpool.start(
                    {rank: (path, self._header(rank)) for rank, path in files.items()},
                    self._dst,
                    None if self._log_line_filter is _keep_all else self._log_line_filter,
                    self._only_lines_with,
                    is_json=self._is_json,
                )
            else:
                self._dst.flush()
                self._tail = get_engine().tail(
                    [(path, self._header(rank)) for rank, path in files.items()],
                    console_fd=console_fd,
                    only_lines_with=self._only_lines_with,
                    is_json=self._is_json,
                )
        except OSError as error:
            logger.warning(
                "failed to show the logs of %s on the console: %s; the output is in the log files", self._name, error
            )
        return self

    def _header(self, local_rank: int) -> str:
        default = f"[{self._name}{local_rank}]:"
        return self._log_line_prefixes.get(local_rank, default) if self._log_line_prefixes else default

    def stop(self, stall_timeout_s: float = _FINISH_TIMEOUT_S) -> None:
        """Copy the rest of the files and stop.

        Args:
            stall_timeout_s: timeout in seconds for a console that accepts no output. The rest is dropped then. Not in torch.
        """
        tail, self._tail = self._tail, None
        try:
            if tail is not None:
                report = tail.finish(stall_timeout_s)
                self._report_missing_output(report, stall_timeout_s)
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

    def _report_missing_output(self, report: _rust.TailReport, stall_timeout_s: float) -> None:
        if report.dropped_bytes:
            reason = f"accepted no output for {stall_timeout_s:g} s"
            if report.console_error is not None:
                reason = f"failed ({report.console_error})"
            logger.warning(
                "%s bytes of the logs of %s were not shown, because the console %s; they are in the log files",
                *(report.dropped_bytes, self._name, reason),
            )
        for path, reason in report.unread:
            logger.warning(
                "failed to read the log file %s of %s, so the console does not show all of it: %s",
                *(path, self._name, reason),
            )

    def stopped(self) -> bool:
        """Return whether :meth:`stop` has finished."""
        return self._stopped


def _descriptor(dst: TextIO) -> int | None:
    """Return the descriptor that ``dst`` writes unchanged bytes to, or ``None``.

    ``fileno`` alone is not sufficient: a notebook's stream returns the terminal, a compressed stream returns the archive.
    """
    if isinstance(dst, io.TextIOWrapper) and isinstance(getattr(dst.buffer, "raw", dst.buffer), io.FileIO):
        try:
            return dst.fileno()
        except (OSError, ValueError):  # closed or detached
            return None
    return None


class _LineWriter:
    """Reads the lines of a native tail from a pipe and writes them to a text stream, in its own thread."""

    def __init__(self) -> None:
        self._shutdown = False  # attribute of torch's thread pool, which torch's tests read
        self._thread: threading.Thread | None = None
        self._read_fd = self._write_fd = -1
        self._expected: int | None = None

    def start(
        self,
        files: Mapping[int, tuple[str, str]],
        dst: TextIO,
        keep: Callable[[str], bool] | None,
        only_lines_with: Sequence[str],
        *,
        is_json: bool,
    ) -> _rust.Tail:
        self._read_fd, self._write_fd = os.pipe()
        try:
            # A filter gets the line without its prefix. The native prefix is then the position of the file.
            prefixes = [str(position) + ":" if keep else header for position, (_, header) in enumerate(files.values())]
            tail = get_engine().tail(
                [(path, prefix) for (path, _), prefix in zip(files.values(), prefixes, strict=True)],
                console_fd=self._write_fd,
                only_lines_with=only_lines_with,
                whole_lines_only=True,  # the rest of an unfinished line would have no prefix
                is_json=is_json,
            )
        except BaseException:
            self._close()
            raise
        headers = [header for _, header in files.values()]
        self._thread = threading.Thread(target=self._run, args=(headers, dst, keep), name="ferro-tail", daemon=True)
        _threads.start(self._thread)
        return tail

    def expect(self, total: int) -> None:
        """End the thread after ``total`` bytes.

        The thread cannot wait for end of file, because a forked process may hold the write end of the pipe. :meth:`shutdown` writes
        one more byte to wake the thread.
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
            logger.warning(
                "the stream for log lines accepted no output for %g s: its writer thread is abandoned",
                _FINISH_TIMEOUT_S,
            )
        else:
            self._close()
        self._thread = None

    def _close(self) -> None:
        os.close(self._read_fd)
        os.close(self._write_fd)
        self._read_fd = self._write_fd = -1

    def _run(self, headers: Sequence[str], dst: TextIO, keep: Callable[[str], bool] | None) -> None:
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
                continue  # keep the pipe empty, because the tail would block on a full pipe
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


def _write_lines(
    lines: Sequence[bytes], headers: Sequence[str], dst: TextIO, keep: Callable[[str], bool] | None
) -> None:
    kept = [line.decode(errors="replace") + "\n" for line in lines] if keep is None else []
    for raw in lines if keep is not None else ():
        position, _, content = raw.partition(b":")
        line = content.decode(errors="replace") + "\n"
        if keep is not None and keep(line):
            kept.append(headers[int(position)] + line)
    if kept:
        dst.write("".join(kept))
        if hasattr(dst, "flush"):  # some callers pass an object that only has `write`
            dst.flush()
