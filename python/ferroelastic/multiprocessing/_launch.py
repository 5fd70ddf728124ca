"""Starts a group of workers."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from ferroelastic._checks import (
    check_entrypoint,
    check_environments,
    check_iterable,
    check_logs_specs,
    check_number,
    check_signal_target,
)
from ferroelastic._compat import family
from ferroelastic._signals import SignalException
from ferroelastic.multiprocessing._logs_of_ranks import FilteredLogsSpecs, InteractiveLogsSpecs
from ferroelastic.multiprocessing._std import _validate_full_rank

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferroelastic import _rust
    from ferroelastic._stop_notice import SignalTarget
    from ferroelastic.multiprocessing._context import PContext
    from ferroelastic.multiprocessing._log_options import LogOptions
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
    grace_signal_target: SignalTarget = "group",
    interactive_rank: int | None = None,
    warm_pool: _rust.WarmPool | None = None,
    log_options: LogOptions | None = None,
    on_created: Callable[[PContext], object] | None = None,
) -> PContext:
    """Start one worker for each entry of ``args`` and ``envs``. Mirrors torch's ``start_processes``.

    Args:
        name: name of the group. The default prefix of teed lines is the name and the local rank: ``[name0]:``.
        entrypoint: a function, which runs in processes of ``multiprocessing``, or a program.
        args: arguments by local rank, from 0 without a gap. For a program they are converted to strings.
        envs: environment variables by local rank, added to the environment of this process.
        logs_specs: destinations of the workers' output.
        log_line_prefixes: prefixes of teed lines by local rank, instead of the default.
        start_method: ``spawn``, ``fork`` or ``forkserver``; for functions only.
        numa_options: NUMA binding; ``None`` does not bind the workers.
        duplicate_stdout_filters: teed lines of standard output that contain one of these strings are also written to
            ``filtered_stdout.log``. Empty or ``None`` writes none.
        duplicate_stderr_filters: the same for standard error and ``filtered_stderr.log``.
        shutdown_timeout: after a failure, the grace period in seconds between SIGTERM and SIGKILL for the other workers. After a success,
            the time in seconds for processes that the workers left in their process groups. Not in torch.
        grace_signal_target: receivers of the stop signal: ``"group"`` or ``"leader"``, see :class:`PContext`. Not in torch.
        interactive_rank: local rank that gets the terminal on standard input of this process as its controlling terminal. No stream of
            this rank is written to a file. ``None`` for no rank. Not in torch.
        warm_pool: for programs and the start method ``spawn``, parked children that become the first workers; ``None`` starts all workers
            anew. Not in torch.
        log_options: options for the lines of the workers. ``None`` for torch's behaviour. Not in torch.
        on_created: called with the context before its workers start. A signal handler that raises while this function returns prevents the
            assignment of its result. Keep the context here to close it in that case. ``None`` calls nothing. Not in torch.

    Returns:
        The running workers: a ``SubprocessContext`` or a ``MultiprocessContext``.

    Raises:
        RuntimeError: ``args`` and ``envs`` do not have the same local ranks, or the ranks have a gap.
        ValueError: ``interactive_rank`` is not a local rank, standard input is not a terminal, or ``grace_signal_target`` is unknown.
        TypeError: an argument has the wrong type.
        OSError: a worker cannot be started, or a log file cannot be created. All started workers are stopped first.
    """
    nprocs = len(args)
    _validate_full_rank(args, nprocs, "args")
    _validate_full_rank(envs, nprocs, "envs")
    check_entrypoint("entrypoint", entrypoint)
    check_logs_specs("logs_specs", logs_specs)
    check_number("shutdown_timeout", shutdown_timeout)
    check_signal_target(grace_signal_target)
    for rank, arguments in args.items():
        check_iterable(f"args[{rank}]", arguments, "a tuple of arguments")
    check_environments(envs)
    common: dict[str, Any] = {
        "name": name,
        "args": args,
        "envs": envs,
        "logs_specs": _wrapped(logs_specs, log_options, interactive_rank, nprocs),
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
    context.warm_pool = warm_pool
    context.shutdown_timeout = shutdown_timeout
    context.grace_signal_target = grace_signal_target
    context.interactive_rank = interactive_rank
    context.log_options = log_options
    if on_created is not None:
        on_created(context)
    interrupting: tuple[type[BaseException], ...] = (*family(SignalException), KeyboardInterrupt)
    try:
        context.start()
    except BaseException as error:
        interruption: BaseException | None = None
        while True:
            try:
                context.close(getattr(error, "sigval", None) or signal.SIGTERM, shutdown_timeout)
                break
            except interrupting as caught:
                # Raised by a foreign signal handler before close() deferred signals.
                interruption = interruption or caught
        if interruption is not None and not isinstance(error, interrupting):
            raise interruption from error
        raise
    return context


def _wrapped(
    logs_specs: LogsSpecs, log_options: LogOptions | None, interactive_rank: int | None, nprocs: int
) -> LogsSpecs:
    """Return the destinations of the output with the options for lines and without those of the interactive rank."""
    if log_options is not None and log_options.ranks:
        logs_specs = FilteredLogsSpecs(logs_specs, log_options)
    if interactive_rank is not None:
        if interactive_rank not in range(nprocs):
            raise ValueError(f"interactive_rank={interactive_rank} is not a local rank; give 0 to {nprocs - 1}")
        logs_specs = InteractiveLogsSpecs(logs_specs, interactive_rank)
    return logs_specs
