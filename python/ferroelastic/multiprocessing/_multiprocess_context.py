"""Workers that run a function."""

from __future__ import annotations

import os
import signal
import warnings
from types import MethodType
from typing import TYPE_CHECKING, Any

from ferroelastic._engine import get_engine
from ferroelastic._exec import as_worker
from ferroelastic._install import workers_inherit
from ferroelastic._process import open_files_of_workers
from ferroelastic._text import describe_error, entrypoint_name, ignore_fork_warning, origin_of
from ferroelastic.multiprocessing._context import PContext, RunProcsResult
from ferroelastic.multiprocessing._entry import Task, _wrap, load_return_value
from ferroelastic.multiprocessing._hold import Hold
from ferroelastic.multiprocessing._processes import cpus_for, exit_code, lost_status
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

    from ferroelastic import _rust
    from ferroelastic._stop_notice import StopReason
    from ferroelastic.multiprocessing._logs import LogsSpecs
    from ferroelastic.multiprocessing._stderr import ConsoleStreams
    from ferroelastic.numa.binding import NumaOptions

__all__ = ["MultiprocessContext"]

logger = get_logger(__name__)

_PARALLEL_START_ENV = "TORCH_MP_PARALLEL_START"
_REAP_TIMEOUT_S = 5.0


class _ProcessSet:
    """The processes of a context, with the interface of torch's ``ProcessContext``."""

    def __init__(self, processes: list[BaseProcess]) -> None:
        self.processes = processes

    def pids(self) -> list[int]:
        return [int(process.pid or 0) for process in self.processes]


class MultiprocessContext(PContext):
    """Workers that run a function in processes of ``multiprocessing``. Mirrors torch's ``MultiprocessContext``.

    Python starts and reaps the processes. The engine observes and stops them. Each worker writes its return value to a file and then waits
    until all workers have returned or one has failed. The result holds all failed ranks; torch's holds one.

    Args:
        name: see :class:`PContext`.
        entrypoint: function. Unless the start method is ``fork``, it must be importable by name.
        args: see :class:`PContext`.
        envs: see :class:`PContext`.
        start_method: ``spawn``, ``fork`` or ``forkserver``.
        logs_specs: see :class:`PContext`.
        log_line_prefixes: see :class:`PContext`.
        numa_options: NUMA binding; ``None`` does not bind the workers.
        duplicate_stdout_filters: see :class:`PContext`.
        duplicate_stderr_filters: see :class:`PContext`.

    Raises:
        RuntimeError: see :class:`PContext`.
        OSError: see :class:`PContext`.
    """

    entrypoint: Callable[..., Any]

    def __init__(
        self,
        name: str,
        entrypoint: Callable[..., Any],
        args: dict[int, tuple[Any, ...]],
        envs: dict[int, dict[str, str]],
        start_method: str,
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
        self.start_method = start_method
        self._numa_options = numa_options
        self._return_values: dict[int, Any] = {}
        self._pc: _ProcessSet | None = None
        self._return_folder: str | None = None
        self._observed_ranks: list[int] = []
        self._hold: Hold | None = None

    def _start(self) -> None:
        if self._pc:
            raise ValueError("The process context already initialized. Most likely the start method got called twice.")
        import multiprocessing
        import tempfile

        if self.start_method != "fork":
            _check_importable(self.entrypoint, self.start_method)
        context = multiprocessing.get_context(self.start_method)
        self._return_folder = tempfile.mkdtemp(prefix="ferroelastic_")
        self._hold = hold = Hold(self.nprocs)
        streams = self._open_console_streams()
        self._pc = _ProcessSet([self._make_process(context, rank, hold, streams) for rank in range(self.nprocs)])
        with as_worker():
            self._start_processes(self._pc.processes)
        self._observe(self._pc.processes)

    def _make_process(self, context: BaseContext, rank: int, hold: Hold, streams: ConsoleStreams) -> BaseProcess:
        terminal = self._terminal_of(rank)
        task = Task(
            fn=self.entrypoint,
            args=self.args[rank],
            env=self._env_of(rank),
            stdout=self.stdouts[rank],
            stderr=self.stderrs[rank],
            return_file=os.path.join(str(self._return_folder), f"{rank}.pickle"),
            hold=hold,
            terminal=None if terminal is None else (terminal.path, terminal.descriptors),
            console=streams.path_of(rank),
            parent_pid=None if self.start_method == "forkserver" else os.getpid(),
            cpus=cpus_for(rank, self._numa_options),
            forked=self.start_method == "fork",
            open_files=open_files_of_workers(),
            keeps_install=workers_inherit(),
        )
        if self.warm_pool is not None and self.start_method == "spawn":
            from ferroelastic.multiprocessing._warm_process import WarmProcess

            return WarmProcess(self.warm_pool, target=_wrap, args=(task,), daemon=False)
        process: BaseProcess = context.Process(target=_wrap, args=(task,), daemon=False)  # type: ignore[attr-defined]
        return process

    def _start_processes(self, processes: list[BaseProcess]) -> None:
        if self.start_method == "forkserver" and os.environ.get(_PARALLEL_START_ENV, "0") == "1" and processes:
            from concurrent.futures import ThreadPoolExecutor

            logger.info("Starting processes in parallel.")
            with ThreadPoolExecutor(len(processes)) as executor:
                list(executor.map(lambda process: process.start(), processes))
            return
        with warnings.catch_warnings():
            # Python 3.12+ warns that a fork of a multi-threaded process may deadlock in the child. The threads of this package are safe:
            # the engine's thread holds no Python lock, the watchdog's thread only logs, and `logging` holds its locks during a fork.
            ignore_fork_warning()
            # Block signals until the child has replaced the agent's signal handlers. Python ignores exceptions of handlers that run
            # during fork hooks, so an early signal would be lost.
            blocked = signal.valid_signals() if self.start_method == "fork" else set()
            previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
            try:
                for process in processes:
                    process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)

    def _observe(self, processes: list[BaseProcess]) -> None:
        """Register the processes with the engine.

        Each start in ``multiprocessing`` reaps children that have ended. A process that was reaped during the start of its peers is not
        registered: Python has its exit code.
        """
        while True:
            self._observed_ranks = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            if not self._observed_ranks:
                return
            observed = [processes[rank] for rank in self._observed_ranks]
            pids = [int(process.pid or 0) for process in observed]
            sentinels = [process.sentinel for process in observed]
            try:
                # One call into C, see `_processes.spawn`.
                self._groups.extend(map(get_engine().observe, (pids,), (sentinels,), (self._stop_file,)))
            except OSError:
                if all(processes[rank].exitcode is None for rank in self._observed_ranks):
                    raise
                continue
            self._arm(self._groups[0])
            return

    def _is_done(self) -> bool:
        return len(self._return_values) == self.nprocs

    def _capture_exits(self) -> None:
        if self._pc is None:
            return
        exits = (
            {}
            if self.native_group is None
            else {self._observed_ranks[ended.index]: ended for ended in self.native_group.exits()}
        )
        for rank in sorted(self._running_local_ranks):
            process = self._pc.processes[rank]
            if rank in exits or (rank not in self._observed_ranks and process.exitcode is not None):
                code = self._reap(process, exits.get(rank))
                if self._hold is not None and code == 0:
                    self._hold.arrive()  # the worker may have ended without arriving
                self._record_exit(rank, int(process.pid or 0), code, exits.get(rank))

    def _reap(self, process: BaseProcess, ended: _rust.Exit | None) -> int:
        # The process has ended. Only a fork server needs a timeout, because it reports the exit code later. With a timeout, `join` of an
        # own child waits for the end of a pipe that the child's children may hold open.
        process.join(_REAP_TIMEOUT_S if self.start_method == "forkserver" else None)
        if process.exitcode is not None:
            return process.exitcode
        # Other code has reaped the process. The kernel may still know its exit code.
        return lost_status(int(process.pid or 0)) if ended is None else exit_code(ended)

    def _poll(self) -> RunProcsResult | None:
        if self._pc is None:
            raise AssertionError("the workers were not started; call start() first")
        self._capture_exits()
        self._record_log_failures()
        if self._running_local_ranks and not self._failures:
            return None
        self._notify_first_failure()
        if not self._failures:
            self._load_return_values()
        self._close_after_exits()
        self._capture_exits()
        if self._failures:
            first = self._first_failure()
            logger.error(
                "failed (exitcode: %s) local_rank: %s (pid: %s) of fn: %s (start_method: %s)",
                first.exitcode,
                first.local_rank,
                first.pid,
                entrypoint_name(self.entrypoint),
                self.start_method,
            )
            return self._result({})
        return self._result(self._return_values)

    def _load_return_values(self) -> None:
        for rank in range(self.nprocs):
            if rank in self._return_values or rank in self._stopped:
                continue
            try:
                self._return_values[rank] = load_return_value(os.path.join(str(self._return_folder), f"{rank}.pickle"))
            except Exception as error:
                self.close(timeout=self.shutdown_timeout)
                raise RuntimeError(
                    f"failed to read the return value of worker {rank}: {describe_error(error)};"
                    " return something that this process can unpickle"
                ) from error

    def pids(self) -> dict[int, int]:
        """Return the process ids by local rank.

        Raises:
            AssertionError: the workers were not started.
        """
        if self._pc is None:
            raise AssertionError("the workers were not started; call start() first")
        return dict(enumerate(self._pc.pids()))

    def begin_stop(self, death_sig: signal.Signals, timeout: float, reason: StopReason = "shutdown") -> None:
        """Send the stop signal, release waiting workers and return without waiting; see :meth:`PContext.begin_stop`."""
        super().begin_stop(death_sig, timeout, reason)
        if self._hold is not None:
            self._hold.release()

    def _close(self, death_sig: signal.Signals, timeout: float = 30) -> None:
        try:
            if self._hold is not None:
                # A worker whose function handles the stop signal would otherwise wait here for the whole grace period.
                self._hold.release()
            if self.native_group is not None:
                self._stop_group(self.native_group, death_sig, timeout)
            elif self._pc is not None and any(process.exitcode is None for process in self._pc.processes):
                # The start has failed: the processes are not registered with the engine.
                _kill(self._pc.processes)
                self._pc = None
        finally:
            self._capture_exits()
            if self._hold is not None:
                self._hold.close()
            if self._return_folder is not None:
                import shutil

                shutil.rmtree(self._return_folder, ignore_errors=True)


def _check_importable(entrypoint: Callable[..., Any], start_method: str) -> None:
    """Check that a new interpreter can import a function by its name.

    Raises:
        PicklingError: the function cannot be imported.
    """
    import copyreg
    import pickle
    import sys
    from multiprocessing.reduction import ForkingPickler

    origin = origin_of(entrypoint)
    reducers = {*copyreg.dispatch_table, *getattr(ForkingPickler, "_extra_reducers", ())}
    # For a callable instance, `origin` is its class.
    pickled: type = type(origin) if not isinstance(origin, type) else origin
    if not isinstance(origin, MethodType) and (pickled in reducers or _pickles_itself(pickled)):
        return
    owner: Any = origin
    name: str = owner.__qualname__
    main: Any = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if "<lambda>" in name or "<locals>" in name:
        reason = "is not defined at the top level of a module"
    elif (
        owner.__module__ == "__main__"
        and getattr(main, "__spec__", None) is None
        and not (isinstance(file, str) and os.path.exists(file))
    ):
        reason = "is defined in an interactive session"
    else:
        return
    raise pickle.PicklingError(
        f"cannot pickle {name!r}: it {reason}, and workers with start_method={start_method!r} must import it; "
        "move it to the top level of a module, or use start_method='fork'"
    )


def _pickles_itself(cls: type) -> bool:
    return any("__reduce_ex__" in vars(base) or "__reduce__" in vars(base) for base in cls.__mro__[:-1])


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None:
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join(_REAP_TIMEOUT_S)
