"""Workers that run a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferroelastic.multiprocessing._context import PContext, RunProcsResult
from ferroelastic.multiprocessing._processes import exit_code, make_command, spawn
from ferroelastic.multiprocessing.subprocess_handler import SubprocessHandler
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    import signal

    from ferroelastic import _rust
    from ferroelastic.multiprocessing._logs import LogsSpecs
    from ferroelastic.numa.binding import NumaOptions

__all__ = ["SubprocessContext"]

logger = get_logger(__name__)


class SubprocessContext(PContext):
    """Workers that run a command, as one native group. Mirrors torch's ``SubprocessContext``.

    Args:
        name: see :class:`PContext`.
        entrypoint: program.
        args: arguments by local rank, converted to strings.
        envs: see :class:`PContext`.
        logs_specs: see :class:`PContext`.
        log_line_prefixes: see :class:`PContext`.
        numa_options: NUMA binding; ``None`` does not bind the workers.
        duplicate_stdout_filters: see :class:`PContext`.
        duplicate_stderr_filters: see :class:`PContext`.

    Raises:
        RuntimeError: see :class:`PContext`.
        OSError: see :class:`PContext`.

    Attributes:
        subprocess_handlers: handlers of the workers by local rank; empty before the start.
    """

    entrypoint: str

    def __init__(
        self,
        name: str,
        entrypoint: str,
        args: dict[int, tuple[Any, ...]],
        envs: dict[int, dict[str, str]],
        logs_specs: LogsSpecs,
        log_line_prefixes: dict[int, str] | None = None,
        numa_options: NumaOptions | None = None,
        duplicate_stdout_filters: list[str] | None = None,
        duplicate_stderr_filters: list[str] | None = None,
    ) -> None:
        super().__init__(
            name,
            entrypoint,
            args,
            envs,
            logs_specs,
            log_line_prefixes,
            duplicate_stdout_filters,
            duplicate_stderr_filters,
        )
        self.subprocess_handlers: dict[int, SubprocessHandler] = {}
        self._numa_options = numa_options

    def _start(self) -> None:
        if self._groups:
            raise ValueError(
                "The subprocess handlers already initialized. Most likely the start method got called twice."
            )
        if not self.nprocs:
            return
        ranks = range(self.nprocs)
        streams = self._open_console_streams()
        argvs, commands = zip(*(self._make_command(rank, *streams.of(rank)) for rank in ranks), strict=True)
        # The context outlives the workers, and the pool has descriptors.
        pool, self.warm_pool = self.warm_pool, None
        spawn(commands, self._groups, pool, self._stop_file)
        group = self._groups[0]
        self._arm(group)
        self.subprocess_handlers = {rank: SubprocessHandler.of_group(group, rank, argvs[rank]) for rank in ranks}

    def _make_command(
        self, rank: int, stdout: _rust.WorkerEnd | None, stderr: _rust.WorkerEnd | None
    ) -> tuple[tuple[str, ...], _rust.Command]:
        return make_command(
            self.entrypoint,
            self.args[rank],
            self._env_of(rank),
            stdout or self.stdouts[rank],
            stderr or self.stderrs[rank],
            rank,
            self._numa_options,
            self._terminal_of(rank),
        )

    def _capture_process_failures(self, done_local_ranks: set[int]) -> None:
        if self.native_group is not None:
            for ended in self.native_group.exits():
                if ended.index in self._running_local_ranks:
                    done_local_ranks.add(ended.index)
                    self._record_exit(ended.index, ended.pid, exit_code(ended), ended)

    def _poll(self) -> RunProcsResult | None:
        done: set[int] = set()
        self._capture_process_failures(done)
        self._record_log_failures()
        if self._running_local_ranks and not self._failures:
            return None
        self._notify_first_failure()
        self._close_after_exits()
        self._capture_process_failures(done)
        if self._failures:
            first = self._first_failure()
            logger.error(
                "failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s",
                first.exitcode,
                first.local_rank,
                first.pid,
                self.entrypoint,
            )
            return self._result({})
        # A command has no return value. The keys are those of function workers.
        return self._result({rank: None for rank in range(self.nprocs) if rank not in self._stopped})

    def pids(self) -> dict[int, int]:
        """Return the process ids by local rank; empty before the start."""
        return {} if self.native_group is None else dict(enumerate(self.native_group.pids))

    def _close(self, death_sig: signal.Signals, timeout: float = 30) -> None:
        if self.native_group is not None:
            self._stop_group(self.native_group, death_sig, timeout)
