"""``ferrorun``, also ``python -m ferroelastic.run``: start a distributed job on this node.

Mirrors ``torch.distributed.run``, the module behind ``torchrun``: every option, ``PET_*`` variable and default.
Intended differences:

* A value that cannot work is one line on standard error, which names it and the remedy, and nothing is started. That
  includes what torch finds out late or never: a script, module or command that does not exist, unknown signals,
  handlers or backends.
* The exit code is that of the worker that failed first, 128+n if signal n ended it. It is 128+n also when ``ferrorun``
  itself was told to end by signal n, 2 for a usage error and 1 for the rest. A failure is reported once, without the
  launcher's own traceback.
* GPUs are counted by asking the driver and not through torch: with a CPU-only torch on a host with GPUs ``gpu`` and
  ``auto`` count them.
* ``--help`` and usage errors import no torch.
* ``--interactive-rank`` gives the terminal to one worker.
* When ``ferrorun`` is killed, its workers and their children end too. Helpers that have left the session of their worker end after a failure,
  before a restart and on a stop; ``--keep-detached`` and ``--end-detached`` change that.

:func:`main` called by a program raises as torch's does; :func:`cli` turns what it raises into exit codes; :func:`console` is the console
script.
"""

import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from ferroelastic._arguments import get_args_parser
from ferroelastic._usage import UsageError, named
from ferroelastic.argparse_util import check_env, env

if TYPE_CHECKING:
    from ferroelastic import _leftovers
    from ferroelastic.launcher.api import LaunchConfig
    from ferroelastic.multiprocessing import LogsSpecs

__all__ = [
    "check_env",
    "cli",
    "config_from_args",
    "console",
    "determine_local_world_size",
    "env",
    "get_args_parser",
    "get_rdzv_endpoint",
    "get_use_env",
    "main",
    "parse_args",
    "parse_min_max_nnodes",
    "run",
    "run_script_path",
]

# Names that torch's module has too, loaded when they are first used: --help and a usage error need none of them.
_LATE = {
    "DefaultLogsSpecs": "ferroelastic.multiprocessing:DefaultLogsSpecs",
    "LaunchConfig": "ferroelastic.launcher.api:LaunchConfig",
    "LogsSpecs": "ferroelastic.multiprocessing:LogsSpecs",
    "Std": "ferroelastic.multiprocessing:Std",
    "_AffinityMode": "ferroelastic.numa.binding:AffinityMode",
    "_NumaOptions": "ferroelastic.numa.binding:NumaOptions",
    "_parse_rendezvous_config": "ferroelastic.rendezvous.utils:_parse_rendezvous_config",
    "elastic_launch": "ferroelastic.launcher.api:elastic_launch",
    "get_logger": "ferroelastic.utils.logging:get_logger",
    "macros": "ferroelastic.utils:macros",
    "record": "ferroelastic.multiprocessing.errors:record",
}


def __getattr__(name: str) -> Any:
    """Load one of the late names."""
    if name == "logger":
        from ferroelastic.utils.logging import get_logger

        return get_logger("ferroelastic.run")
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, original = _LATE[name].partition(":")
    return getattr(importlib.import_module(module), original)


def _late(name: str) -> Any:
    """Return a late name, or what a program has put in its place in this module."""
    return globals()[name] if name in globals() else __getattr__(name)


def parse_args(args: Sequence[str] | None) -> Namespace:
    """Parse a command line; ``None`` is this process's.

    Raises:
        SystemExit: with code 2 after one line on standard error, if it cannot be parsed; with code 0 after ``--help``.
        ValueError: the variable of a flag holds no integer.
    """
    return get_args_parser().parse_args(args)


def parse_min_max_nnodes(nnodes: str) -> tuple[int, int]:
    """Parse ``--nnodes``: ``"2"`` is ``(2, 2)`` and ``"1:4"`` is ``(1, 4)``.

    Raises:
        UsageError: it is neither.
    """
    least, colon, most = nnodes.partition(":")
    try:
        return int(least), int(most if colon else least)
    except ValueError:
        raise UsageError(
            f'{named("nnodes", nnodes)} is neither a number nor in "MIN:MAX" format; give e.g. 2 or 1:4'
        ) from None


def determine_local_world_size(nproc_per_node: str) -> int:
    """Return the number of workers of this node.

    Args:
        nproc_per_node: a number, or what to count: ``cpu``, ``gpu``, ``xpu``, torch's name of a private backend, or
            ``auto``.

    Raises:
        UsageError: it is none of these, or there is nothing to count.
    """
    try:
        return int(nproc_per_node)
    except ValueError:
        pass
    from ferroelastic import _devices

    count = _devices.worker_count(nproc_per_node)
    if count is None:
        raise UsageError(
            f"{named('nproc_per_node', nproc_per_node)} is not a number of workers; give one, or auto, gpu, xpu or cpu"
        )
    if count.number < 1:
        raise UsageError(f"{named('nproc_per_node', nproc_per_node)}: no {count.device} is available; {count.remedy}")
    _late("logger").info(
        "nproc_per_node=%s is %d: this host has %d x %s", nproc_per_node, count.number, count.number, count.device
    )
    return count.number


def get_rdzv_endpoint(args: Namespace) -> str:
    """Return the endpoint of the rendezvous; a static one has it from the master's address and port."""
    if args.rdzv_backend == "static" and not args.rdzv_endpoint:
        return f"{args.master_addr}:{args.master_port}"
    return str(args.rdzv_endpoint)


def get_use_env(args: Namespace) -> bool:
    """Return whether workers learn their rank from the environment; only the legacy ``launch`` says no."""
    return bool(getattr(args, "use_env", True))


def _get_logs_specs_class(logs_specs_name: str | None) -> type["LogsSpecs"]:
    """Return the class that decides on log files.

    Args:
        logs_specs_name: name of an entry point of the group ``torchrun.logs_specs``; ``None`` is the default.

    Raises:
        UsageError: there is no such entry point.
    """
    if logs_specs_name is None:
        default: type[LogsSpecs] = _late("DefaultLogsSpecs")
        return default
    from importlib import metadata

    plugins = metadata.entry_points(group="torchrun.logs_specs")
    if logs_specs_name not in plugins.names:
        known = f"installed are {', '.join(sorted(plugins.names))}" if plugins else "none is installed"
        raise UsageError(
            f"{named('logs_specs', logs_specs_name)}: could not find entrypoint under "
            f"'torchrun.logs_specs[{logs_specs_name}]' key; {known}"
        )
    entry = plugins[logs_specs_name]
    # torch registers its default, which this package's stands for.
    ours = entry.value == "torch.distributed.elastic.multiprocessing:DefaultLogsSpecs"
    plugin: type[LogsSpecs] = _late("DefaultLogsSpecs") if ours else entry.load()
    _late("logger").info("logs_specs %r is %s", logs_specs_name, plugin)
    return plugin


def _std_class(logs_specs_cls: type["LogsSpecs"]) -> Any:
    """Return the ``Std`` that a class understands: one derived from torch's tells streams by torch's type."""
    theirs = sys.modules.get("torch.distributed.elastic.multiprocessing.api")
    # Not issubclass: ours is a virtual subclass of torch's.
    if theirs is not None and theirs.LogsSpecs in logs_specs_cls.__mro__:
        return theirs.Std
    return _late("Std")


def config_from_args(args: Namespace) -> tuple["LaunchConfig", Callable[..., Any] | str, list[str]]:
    """Turn a parsed command line into a configuration, an entrypoint and its arguments.

    Sets ``OMP_NUM_THREADS=1`` in this process if there are several workers and it is not set, as torch does.

    Raises:
        UsageError: a value cannot work.
        OSError: the log folder cannot be made.
    """
    from ferroelastic import _usage

    logger = _late("logger")
    min_nodes, max_nodes = parse_min_max_nnodes(args.nnodes)
    if not 0 < min_nodes <= max_nodes:
        raise UsageError(f"{named('nnodes', args.nnodes)} must have 0 < MIN <= MAX; give e.g. 1:4")
    _usage.check_numbers(args)
    _usage.check_signals(args.signals_to_handle, args.signals_to_forward)
    _usage.check_rendezvous_backend(args.rdzv_backend)
    _usage.check_local_addr(args.local_addr)
    static = args.rdzv_backend == "static"
    if static and not 0 <= args.node_rank < max_nodes:
        raise UsageError(
            f"{named('node_rank', args.node_rank)} is no rank of {named('nnodes', args.nnodes)}; "
            f"give 0 to {max_nodes - 1}"
        )
    if args.no_python and args.module and not args.run_path:
        raise UsageError(
            "Don't use both the '--no-python' flag and the '--module' flag at the same time; a module needs Python"
        )
    if hasattr(args, "master_addr") and not static and not args.rdzv_endpoint:
        logger.warning("master_addr is only used by the static rdzv_backend when rdzv_endpoint is not given")
    if not static and args.node_rank != 0:
        logger.warning(
            "node_rank is only used by the static rdzv_backend; rdzv_backend=%s ignores it", args.rdzv_backend
        )

    nproc_per_node = determine_local_world_size(args.nproc_per_node)
    if nproc_per_node < 1:
        raise UsageError(f"{named('nproc_per_node', args.nproc_per_node)} must be > 0; give the number of workers")
    _usage.check_interactive_rank(args, nproc_per_node)
    rdzv_configs = _usage.parse_rendezvous_conf(args.rdzv_conf)
    if static:
        rdzv_configs["rank"] = args.node_rank
    rdzv_endpoint = get_rdzv_endpoint(args)
    _usage.check_endpoint(args, rdzv_endpoint, rdzv_configs)
    _usage.check_event_log_handler(args.event_log_handler)

    logs_specs_cls = _get_logs_specs_class(args.logs_specs)
    std = _std_class(logs_specs_cls)
    logs_specs = logs_specs_cls(
        redirects=_usage.parse_std("redirects", args.redirects, std),
        tee=_usage.parse_std("tee", args.tee, std),
        local_ranks_filter=_usage.parse_ranks(args.local_ranks_filter),
        log_dir=args.log_dir,
    )
    config: LaunchConfig = _late("LaunchConfig")(
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        nproc_per_node=nproc_per_node,
        run_id=args.rdzv_id,
        role=args.role,
        rdzv_endpoint=rdzv_endpoint,
        rdzv_backend=args.rdzv_backend,
        rdzv_configs=rdzv_configs,
        max_restarts=args.max_restarts,
        monitor_interval=args.monitor_interval,
        start_method=args.start_method,
        log_line_prefix_template=os.getenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
        local_addr=args.local_addr,
        logs_specs=logs_specs,
        event_log_handler=args.event_log_handler,
        numa_options=_numa_options(args.numa_binding),
        signals_to_handle=args.signals_to_handle,
        signals_to_forward=getattr(args, "signals_to_forward", ""),
        duplicate_stdout_filters=args.duplicate_stdout_filters,
        duplicate_stderr_filters=args.duplicate_stderr_filters,
        virtual_local_rank=args.virtual_local_rank,
        shutdown_timeout=args.shutdown_timeout,
        interactive_rank=getattr(args, "interactive_rank", None),
    )
    if nproc_per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Workers inherit it. As many threads as CPUs in each of many workers would be slower than one.
        os.environ["OMP_NUM_THREADS"] = "1"
        logger.warning("OMP_NUM_THREADS is not set; each of the %d workers gets 1, set it to tune", nproc_per_node)
    return config, *_entrypoint(args)


def _numa_options(mode: str | None) -> Any:
    if mode is None:
        return None
    from ferroelastic.numa.binding import AffinityMode, NumaOptions

    return NumaOptions(affinity_mode=AffinityMode(mode))


def _entrypoint(args: Namespace) -> tuple[Callable[..., Any] | str, list[str]]:
    """Return what a worker runs and with which arguments."""
    from ferroelastic import _usage

    entrypoint: Callable[..., Any] | str
    if args.run_path:
        _usage.warn_of_environment("to run them in it, start {python} -m ferroelastic.run")
        entrypoint, arguments = run_script_path, [args.training_script]
    elif args.no_python:
        entrypoint, arguments = args.training_script, []
    else:
        # Unbuffered, so that a worker's last words reach the log however it ends.
        entrypoint = _interpreter()
        arguments = ["-u", *(["-m"] if args.module else []), args.training_script]
    if not get_use_env(args):
        arguments.append(f"--local-rank={_late('macros').local_rank}")
    return entrypoint, [*arguments, *args.training_script_args]


def _interpreter() -> str:
    """Return the Python that runs the workers.

    Raises:
        UsageError: ``$PYTHON_EXEC`` is empty.
    """
    from ferroelastic import _usage

    chosen = os.environ.get("PYTHON_EXEC")
    if chosen is None:
        _usage.warn_of_environment("to run them in it, set PYTHON_EXEC={python}")
        return sys.executable
    if not chosen:
        raise UsageError("PYTHON_EXEC='' names no Python interpreter; unset it, or set it to the path of one")
    return chosen


def run_script_path(training_script: str, *training_script_args: str) -> None:
    """Run a script in this interpreter, as its main module.

    Args:
        training_script: its absolute path.
        training_script_args: its arguments.
    """
    import runpy

    sys.argv = [training_script, *training_script_args]
    runpy.run_path(training_script, run_name="__main__")


def run(args: Namespace) -> None:
    """Launch a job from a parsed command line, and wait for the workers of this node.

    Args:
        args: as from :func:`parse_args`. Changed in place: a job on one node gets its rendezvous here.

    Raises:
        ChildFailedError: workers failed, and no restart was left.
        SignalException: this process was told to end; the workers were stopped.
        UsageError: a value cannot work.
    """
    _name_thread("pt_elastic")
    if args.standalone:
        _check_standalone(args)
        _rendezvous_alone(args)
        _late("logger").info(
            "rendezvous: --rdzv-backend=%s --rdzv-endpoint=%s --rdzv-id=%s",
            args.rdzv_backend,
            args.rdzv_endpoint,
            args.rdzv_id,
        )
    elif args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port is None:
        _, max_nodes = parse_min_max_nnodes(args.nnodes)
        if max_nodes == 1:
            _rendezvous_alone(args)
    if args.master_port is None:
        args.master_port = 29500
    config, entrypoint, arguments = config_from_args(args)
    _late("elastic_launch")(config=config, entrypoint=entrypoint)(*arguments)


def _check_standalone(args: Namespace) -> None:
    """Refuse a job on this node alone that waits for other nodes.

    Raises:
        UsageError: it would.
    """
    min_nodes, _ = parse_min_max_nnodes(args.nnodes)
    if min_nodes > 1:
        raise UsageError(
            f"--standalone runs the job on this node alone, and {named('nnodes', args.nnodes)} waits for others; leave one of them out"
        )


def _rendezvous_alone(args: Namespace) -> None:
    """Let a job on one node meet itself on a free port, so that it collides with no other job."""
    from ferroelastic.utils._ids import random_uuid

    args.rdzv_backend = "c10d"
    args.rdzv_endpoint = "localhost:0"
    args.rdzv_id = random_uuid()


def _name_thread(name: str) -> None:
    """Name the calling thread as torch names its launcher's, for ``ps`` and ``top``."""
    try:
        with open("/proc/thread-self/comm", "w") as comm:
            comm.write(name)
    except OSError:  # only a name
        pass


def main(args: Sequence[str] | None = None) -> None:
    """Launch a job from a command line, and wait for the workers of this node.

    Mirrors ``torch.distributed.run.main``: what goes wrong is raised, and recorded in ``$TORCHELASTIC_ERROR_FILE`` if
    that is set.

    Args:
        args: the command line without program; ``None`` is this process's.

    Raises:
        ChildFailedError: workers failed, and no restart was left.
        SignalException: this process was told to end; the workers were stopped.
        SystemExit: the command line cannot be parsed (code 2).
        UsageError: a value cannot work.
    """
    _late("record")(_parse_and_run)(args)


def _parse_and_run(args: Sequence[str] | None) -> None:
    run(parse_args(args))


def cli(args: Sequence[str] | None = None) -> int:
    """Do what :func:`main` does, for the console: report what goes wrong on standard error.

    Args:
        args: the command line without program; ``None`` is this process's.

    Returns:
        The exit code: 0, that of the worker that failed first (128+n for signal n), 128+n when signal n ended
        ``ferrorun`` itself, 2 for a usage error, 1 for the rest.

    Raises:
        SystemExit: the command line cannot be parsed (code 2), or ``--help`` was asked for (code 0).
    """
    from ferroelastic import _process

    with ExitStack() as cleanup:
        _process.prepare(cleanup)
        return _cli(args, cleanup)


def console(parse: Callable[[Sequence[str] | None], Namespace] | None = None) -> NoReturn:
    """Do what :func:`cli` does, and end this process with its exit code.

    Args:
        parse: parses the command line; by default :func:`parse_args`.
    """
    from ferroelastic import _process

    # Never closed: up to the end no signal changes the exit code.
    cleanup = ExitStack()
    _process.prepare(cleanup)
    _process.leave(_cli(None, cleanup, parse or parse_args))


def _cli(
    args: Sequence[str] | None, cleanup: ExitStack, parse: Callable[[Sequence[str] | None], Namespace] | None = None
) -> int:
    from ferroelastic import _process, _signals, _usage

    parsed: Namespace | None = None
    this_run: _leftovers.Run | None = None
    try:
        parsed = (parse or parse_args)(args)
        _usage.check_target(parsed)
        _usage.check_log_dir(parsed.log_dir)
        _usage.check_signals(parsed.signals_to_handle, parsed.signals_to_forward)
        _usage.check_detached(parsed)
        _show_logs()
        _process.take_signals(parsed.signals_to_handle, parsed.signals_to_forward, cleanup)
        from ferroelastic import _leftovers as leftovers

        this_run = leftovers.begin(keep_detached=parsed.keep_detached, end_detached=parsed.end_detached)
        _late("record")(run)(parsed)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - each has an exit code
        _signals.conclude()
        from ferroelastic import _report

        return _report.report(error, parsed)
    finally:
        _signals.report()
        if this_run is not None:
            this_run.finish()
    return 0


def _show_logs() -> None:
    """Write the launcher's log to standard error in one line a record; ``$LOGLEVEL`` sets how much.

    Raises:
        UsageError: ``$LOGLEVEL`` is not a level.
    """
    import logging

    from ferroelastic.utils.log_level import chosen_log_level

    logger = logging.getLogger("ferroelastic")
    try:
        logger.setLevel(chosen_log_level("WARNING"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not logger.hasHandlers():
        from ferroelastic._console import ConsoleHandler

        handler = ConsoleHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s ferrorun[%(process)d] %(levelname)s: %(message)s"))
        logger.addHandler(handler)


if __name__ == "__main__":
    console()
