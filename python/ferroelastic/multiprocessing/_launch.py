"""Starting a group of workers."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from ferroelastic._checks import check_entrypoint, check_environments, check_iterable, check_logs_specs, check_number
from ferroelastic._compat import family
from ferroelastic._signals import SignalException
from ferroelastic.multiprocessing._logs import InteractiveLogsSpecs
from ferroelastic.multiprocessing._std import _validate_full_rank

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferroelastic.multiprocessing._context import PContext
    from ferroelastic.multiprocessing._logs import LogsSpecs
    from ferroelastic.numa.binding import NumaOptions

__all__ = ["start_processes"]


def start_processes(
    name: str,
    entrypoint: Callable[..., Any] | str,
    args: dict[int, tuple[Any, ...]],
    envs: dict[int, dict[str, str]],
    logs_specs: LogsSpecs,
    log_line_prefixes: dict[int, str] | None = None,
    start_method: str = "spawn",
    numa_options: NumaOptions | None = None,
    duplicate_stdout_filters: list[str] | None = None,
    duplicate_stderr_filters: list[str] | None = None,
    *,
    shutdown_timeout: float = 30,
    interactive_rank: int | None = None,
) -> PContext:
    """Start one worker for each entry of ``args`` and ``envs``. Mirrors torch's ``start_processes``.

    Args:
        name: with the local rank, the header of teed lines: ``[name0]:``.
        entrypoint: a function, run in processes of ``multiprocessing``, or a program.
        args: arguments by local rank, without a gap from 0; a program gets them as strings.
        envs: environment variables by local rank, added to this process's.
        logs_specs: decides where the output goes.
        log_line_prefixes: headers of teed lines by local rank.
        start_method: ``spawn``, ``fork`` or ``forkserver``; for functions only.
        numa_options: CPUs to bind the workers to; ``None`` binds to none.
        duplicate_stdout_filters: if not empty, teed lines of standard output with one of these strings also go to
            ``filtered_stdout.log``.
        duplicate_stderr_filters: likewise for standard error.
        shutdown_timeout: when one worker fails, seconds that the others have after SIGTERM before SIGKILL; when all succeed, seconds
            that processes have to finish which the workers left in their groups.
        interactive_rank: local rank that gets the terminal on standard input of this process: it is the worker's controlling terminal,
            and none of its streams goes to a file. ``None`` gives it to nobody.

    Returns:
        The running workers: a ``SubprocessContext`` or a ``MultiprocessContext``.

    Raises:
        RuntimeError: ``args`` and ``envs`` do not have the same local ranks, without a gap.
        ValueError: ``interactive_rank`` is no local rank, or standard input is no terminal.
        TypeError: a value has a type that cannot work.
        OSError: a worker or a log file cannot be started or made; nothing is left behind.
    """
    nprocs = len(args)
    _validate_full_rank(args, nprocs, "args")
    _validate_full_rank(envs, nprocs, "envs")
    check_entrypoint("entrypoint", entrypoint)
    check_logs_specs("logs_specs", logs_specs)
    check_number("shutdown_timeout", shutdown_timeout)
    for rank, arguments in args.items():
        check_iterable(f"args[{rank}]", arguments, "a tuple of arguments")
    check_environments(envs)
    if interactive_rank is not None:
        if interactive_rank not in args:
            raise ValueError(f"interactive_rank={interactive_rank} is no local rank; give 0 to {nprocs - 1}")
        logs_specs = InteractiveLogsSpecs(logs_specs, interactive_rank)
    common: dict[str, Any] = {
        "name": name,
        "args": args,
        "envs": envs,
        "logs_specs": logs_specs,
        "log_line_prefixes": log_line_prefixes,
        "numa_options": numa_options,
        "duplicate_stdout_filters": duplicate_stdout_filters,
        "duplicate_stderr_filters": duplicate_stderr_filters,
    }
    context: PContext
    if isinstance(entrypoint, str):
        from ferroelastic.multiprocessing._subprocess_context import SubprocessContext

        context = SubprocessContext(entrypoint=entrypoint, **common)
    else:
        from ferroelastic.multiprocessing._multiprocess_context import MultiprocessContext

        context = MultiprocessContext(entrypoint=entrypoint, start_method=start_method, **common)
    context.shutdown_timeout = shutdown_timeout
    context.interactive_rank = interactive_rank
    interrupting: tuple[type[BaseException], ...] = (*family(SignalException), KeyboardInterrupt)
    try:
        context.start()
    except BaseException as error:
        another: BaseException | None = None
        while True:
            try:
                context.close(getattr(error, "sigval", None) or signal.SIGTERM, shutdown_timeout)
                break
            except interrupting as caught:
                # Of a handler that is not ours, before close() could take it.
                another = another or caught
        if another is not None and not isinstance(error, interrupting):
            raise another from error
        raise
    return context
