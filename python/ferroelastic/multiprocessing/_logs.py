"""Destinations of the workers' output."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ferroelastic import _compat
from ferroelastic._checks import check_iterable, check_type
from ferroelastic.multiprocessing._std import Std, to_map
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["CONSOLE", "DefaultLogsSpecs", "LogsDest", "LogsSpecs"]

logger = get_logger(__name__)

CONSOLE = ""
"""Path of a stream that is not redirected."""


@dataclass
class LogsDest(_compat.TorchCompatible):
    """Paths of log and error files by local rank. Mirrors torch's ``LogsDest``.

    Attributes:
        stdouts: file of each worker's standard output; ``""`` inherits the agent's standard output.
        stderrs: the same for standard error.
        tee_stdouts: the entries of ``stdouts`` that are also copied to the agent's standard output.
        tee_stderrs: the same for standard error.
        error_files: error file of each worker, see :func:`ferroelastic.multiprocessing.errors.record`.
        filtered_stdout: file for the lines that match ``duplicate_stdout_filters``.
        filtered_stderr: the same for standard error.
    """

    stdouts: dict[int, str] = field(default_factory=dict)
    stderrs: dict[int, str] = field(default_factory=dict)
    tee_stdouts: dict[int, str] = field(default_factory=dict)
    tee_stderrs: dict[int, str] = field(default_factory=dict)
    error_files: dict[int, str] = field(default_factory=dict)
    filtered_stdout: str = ""
    filtered_stderr: str = ""


class LogsSpecs(_compat.TorchVirtual, ABC):
    """Chooses the destinations of the workers' output. Mirrors torch's ``LogsSpecs``.

    Args:
        log_dir: root folder of the logs.
        redirects: streams that are written to a file instead of the console, for all workers or by local rank.
        tee: streams that are written to a file and to the console, for all workers or by local rank.
        local_ranks_filter: if not empty, only these local ranks write to the console.
    """

    def __init__(
        self,
        log_dir: str | None = None,
        redirects: Std | dict[int, Std] = Std.NONE,
        tee: Std | dict[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
    ) -> None:
        self._root_log_dir = log_dir
        self._redirects = redirects
        self._tee = tee
        self._local_ranks_filter = local_ranks_filter

    @abstractmethod
    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return the paths for the next start of the workers.

        Args:
            envs: environments of the workers by local rank. This method may add variables, for instance ``TORCHELASTIC_ERROR_FILE``.

        Returns:
            The paths.
        """

    @property
    @abstractmethod
    def root_log_dir(self) -> str:
        """Root folder of the logs."""


class DefaultLogsSpecs(LogsSpecs):
    """One folder per attempt and rank. Mirrors torch's ``DefaultLogsSpecs``.

    The files are ``<log_dir>/<run id>_<random>/attempt_<n>/<local rank>/{stdout.log,stderr.log,error.json}`` and
    ``.../attempt_<n>/filtered_{stdout,stderr}.log``. A second start with the same restart count, for instance after a membership change,
    writes to ``attempt_<n>.1``, then ``attempt_<n>.2``. torch deletes the logs of the earlier start.

    Args:
        log_dir: root folder of the logs, created if it does not exist. ``None`` creates a temporary folder, ``os.devnull`` writes no logs.
        redirects: see :class:`LogsSpecs`.
        tee: see :class:`LogsSpecs`.
        local_ranks_filter: see :class:`LogsSpecs`.

    Raises:
        NotADirectoryError: ``log_dir`` is a file.
        TypeError: an argument has the wrong type.
        OSError: the folder cannot be created.

    Attributes:
        link_latest: whether ``<log_dir>/latest`` becomes a symbolic link to the folder of this run. Set it before :meth:`reify`. Not in
            torch.
    """

    link_latest: bool = False

    def __init__(
        self,
        log_dir: str | None = None,
        redirects: Std | dict[int, Std] = Std.NONE,
        tee: Std | dict[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
    ) -> None:
        for name, streams in (("redirects", redirects), ("tee", tee)):
            check_type(name, streams, (int, dict), "a Std, or a dictionary of them by local rank")
        if local_ranks_filter is not None:
            check_iterable("local_ranks_filter", local_ranks_filter, "a set of local ranks")
        check_type("log_dir", log_dir, (str, os.PathLike, type(None)), "a path or None")
        if log_dir != os.devnull:
            if not log_dir:
                log_dir = _make_temporary("torchelastic_", None)
            elif os.path.isfile(log_dir):
                raise NotADirectoryError(f"log_dir: {log_dir} is a file")
            else:
                _make(log_dir, exist_ok=True)
        super().__init__(log_dir, redirects, tee, local_ranks_filter)
        self._run_log_dir: str | None = None

    @property
    def root_log_dir(self) -> str:
        """Root folder of the logs."""
        return str(self._root_log_dir)

    def _make_log_dir(self, log_dir: str | None, rdzv_run_id: str) -> str:
        base_log_dir = log_dir or _make_temporary("torchelastic_", None)
        _make(base_log_dir, exist_ok=True)
        # A run id may contain a path separator.
        run_log_dir = _make_temporary(f"{rdzv_run_id.replace(os.sep, '_')}_", base_log_dir)
        logger.info("log directory set to: %s", run_log_dir)
        if self.link_latest:
            _link_latest(run_log_dir)
        return run_log_dir

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Create the folders of one attempt and set ``TORCHELASTIC_ERROR_FILE`` in ``envs``.

        Args:
            envs: environments of the workers by local rank, from 0 without a gap.

        Returns:
            The paths of this attempt.

        Raises:
            OSError: a folder cannot be created.
        """
        nprocs = len(envs)
        if not envs:
            logger.warning("Empty envs map provided when defining logging destinations.")
        if self._root_log_dir == os.devnull:
            return self._discard(envs)
        # The run id and the restart count are the same for all ranks.
        common_env = envs.get(0, {})
        if not self._run_log_dir:
            run_id = common_env.get("TORCHELASTIC_RUN_ID", "test_run_id")
            self._run_log_dir = self._make_log_dir(self._root_log_dir, run_id)
        restart_count = common_env.get("TORCHELASTIC_RESTART_COUNT", "0")
        attempt_log_dir = _make_first_free(_attempt_names(os.path.join(self._run_log_dir, f"attempt_{restart_count}")))

        tees = to_map(self._tee, nprocs)
        redirects = {rank: mask | tees[rank] for rank, mask in to_map(self._redirects, nprocs).items()}
        dest = LogsDest(
            filtered_stdout=os.path.join(attempt_log_dir, "filtered_stdout.log"),
            filtered_stderr=os.path.join(attempt_log_dir, "filtered_stderr.log"),
        )
        for local_rank in range(nprocs):
            folder = os.path.join(attempt_log_dir, str(local_rank))
            _make(folder)
            for stream, paths, tee_paths, name in (
                (Std.OUT, dest.stdouts, dest.tee_stdouts, "stdout.log"),
                (Std.ERR, dest.stderrs, dest.tee_stderrs, "stderr.log"),
            ):
                shown = not self._local_ranks_filter or local_rank in self._local_ranks_filter
                if redirects[local_rank] & stream:
                    paths[local_rank] = os.path.join(folder, name)
                    if tees[local_rank] & stream and shown:
                        tee_paths[local_rank] = paths[local_rank]
                else:
                    paths[local_rank] = CONSOLE if shown else os.devnull
            error_file = os.path.join(folder, "error.json")
            dest.error_files[local_rank] = error_file
            envs[local_rank]["TORCHELASTIC_ERROR_FILE"] = error_file
            logger.info("Setting worker%s reply file to: %s", local_rank, error_file)
        return dest

    @staticmethod
    def _discard(envs: Mapping[int, dict[str, str]]) -> LogsDest:
        ranks = range(len(envs))
        for env in envs.values():
            env["TORCHELASTIC_ERROR_FILE"] = ""
        return LogsDest(
            stdouts=dict.fromkeys(ranks, CONSOLE),
            stderrs=dict.fromkeys(ranks, CONSOLE),
            tee_stdouts=dict.fromkeys(ranks, os.devnull),
            tee_stderrs=dict.fromkeys(ranks, os.devnull),
            error_files=dict.fromkeys(ranks, os.devnull),
            filtered_stdout=os.devnull,
            filtered_stderr=os.devnull,
        )

    def __repr__(self) -> str:
        return (
            f"DefaultLogsSpecs(root_log_dir={self._root_log_dir}, redirects={self._redirects}, "
            f"tee={self._tee}, local_ranks_filter={self._local_ranks_filter})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DefaultLogsSpecs):
            return False
        return (
            self._root_log_dir == other._root_log_dir
            and self._redirects == other._redirects
            and self._tee == other._tee
            and self._local_ranks_filter == other._local_ranks_filter
        )

    __hash__ = None  # type: ignore[assignment]  # mutable and compared by value, as in torch


def _link_latest(run_log_dir: str) -> None:
    """Let the link ``latest`` next to the folder of a run point to the folder. A failure is logged.

    The link is replaced atomically: other jobs may use the same root folder.
    """
    root, name = os.path.split(run_log_dir)
    link, new = os.path.join(root, "latest"), f"{run_log_dir}.latest"
    try:
        if os.path.lexists(link) and not os.path.islink(link):
            raise FileExistsError(errno.EEXIST, "it exists and is not a symbolic link")
        os.symlink(name, new)
        try:
            os.replace(new, link)
        except OSError:
            os.unlink(new)
            raise
    except OSError as error:
        logger.warning("failed to link %s to the log folder of this run, %s: %s", link, run_log_dir, error.strerror)


def _attempt_names(name: str) -> Iterator[str]:
    yield name
    suffix = 1
    while True:
        yield f"{name}.{suffix}"
        suffix += 1


def _make_first_free(names: Iterator[str]) -> str:
    """Create the first folder that does not exist. ``mkdir`` is atomic, so two callers never get the same folder."""
    for name in names:
        try:
            _make(name)
        except FileExistsError:
            continue
        return name
    raise AssertionError("the iterator of names must be infinite")


def _make(path: str, *, exist_ok: bool = False) -> None:
    try:
        os.makedirs(path, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise _with_path(error, path) from error


def _make_temporary(prefix: str, folder: str | None) -> str:
    import tempfile

    try:
        return tempfile.mkdtemp(prefix=prefix, dir=folder)
    except OSError as error:
        raise _with_path(error, folder or tempfile.gettempdir()) from error


def _with_path(error: OSError, path: str) -> OSError:
    # With an errno, OSError creates the matching subclass.
    return OSError(
        error.errno,
        f"failed to create log folder {path!r}: {error.strerror}; choose a writable log_dir",
    )
