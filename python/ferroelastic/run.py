"""``ferrorun``, also ``python -m ferroelastic.run``: start a distributed job on this node.

Mirrors ``torch.distributed.run``, the module behind ``torchrun``: every option, ``PET_*`` variable and default.
Intended differences:

* An invalid value is reported before any process is started, in one line on standard error with the value and the remedy. This includes
  values that torch detects late or never: a missing script, module or command, and unknown signals, handlers or backends.
* The exit code is that of the worker that failed first, 128+n if signal n ended the worker or ``ferrorun``, 2 for a usage
  error, else 1. A failure is reported once, without the launcher's own traceback.
* GPUs are counted through the driver, not through torch: ``gpu`` and ``auto`` count them even with a CPU-only torch.
* ``--help`` and usage errors do not import torch.
* ``--warm-workers`` and ``--preload`` start workers from processes that have imported torch.
* ``--interactive-rank`` connects one worker to the terminal.
* Without options of the rendezvous, the variables of a scheduler set them: ``srun ferrorun train.py``. ``--no-scheduler`` ignores them.
* ``--exec`` runs a program that calls torch's launcher, with :func:`ferroelastic.install` in effect.
* If ``ferrorun`` is killed, its workers and their children end too. Helpers that left the session of their worker are ended after a
  failure, before a restart and on a stop. ``--keep-detached`` and ``--end-detached`` change that.

:func:`main` is for programs and raises as torch's does. :func:`cli` returns an exit code instead. :func:`console` is the console script.
"""

import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from ferroelastic._arguments import EXEC, get_args_parser
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

# Names of torch's module, loaded at their first use, because --help and usage errors need none of them.
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
    """Load a name of ``_LATE`` at its first use."""
    if name == "logger":
        from ferroelastic.utils.logging import get_logger

        return get_logger("ferroelastic.run")
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, original = _LATE[name].partition(":")
    return getattr(importlib.import_module(module), original)


def _late(name: str) -> Any:
    """Return a name of ``_LATE``, or the object with which a program replaced it in this module."""
    return globals()[name] if name in globals() else __getattr__(name)


def parse_args(args: Sequence[str] | None) -> Namespace:
    """Parse a command line. Mirrors ``torch.distributed.run.parse_args``.

    Args:
        args: the command line without the program; ``None`` parses that of this process.

    Raises:
        SystemExit: the command line cannot be parsed (code 2, after one line on standard error), or it has ``--help`` (code 0).
        ValueError: the value of a flag's ``PET_*`` variable is not an integer.
    """
    return get_args_parser().parse_args(args)


def parse_min_max_nnodes(nnodes: str) -> tuple[int, int]:
    """Parse ``--nnodes``: ``"2"`` is ``(2, 2)`` and ``"1:4"`` is ``(1, 4)``.

    Raises:
        UsageError: the value has another format.
    """
    least, colon, most = nnodes.partition(":")
    try:
        return int(least), int(most if colon else least)
    except ValueError:
        raise UsageError(
            f'{named("nnodes", nnodes)} is neither a number nor in "MIN:MAX" format; give e.g. 2 or 1:4'
        ) from None


def determine_local_world_size(nproc_per_node: str) -> int:
    """Return the number of workers of this node. Mirrors ``torch.distributed.run.determine_local_world_size``.

    Args:
        nproc_per_node: a number, or the devices to count: ``cpu``, ``gpu``, ``xpu``, the name of torch's private backend, or
            ``auto``.

    Raises:
        UsageError: the value is none of these, or there are no such devices.
    """
    try:
        return int(nproc_per_node)
    except ValueError:
        pass
    from ferroelastic import _devices

    count = _devices.worker_count(nproc_per_node)
    if count is None:
        raise UsageError(
            f"{named('nproc_per_node', nproc_per_node)} is not a number of workers; give a number, or auto, gpu, xpu or cpu"
        )
    if count.number < 1:
        raise UsageError(f"{named('nproc_per_node', nproc_per_node)}: no {count.device} is available; {count.remedy}")
    _late("logger").info(
        "nproc_per_node=%s starts %d workers: this host has %d x %s",
        *(nproc_per_node, count.number, count.number, count.device),
    )
    return count.number


def get_rdzv_endpoint(args: Namespace) -> str:
    """Return the endpoint of the rendezvous. The default of a static rendezvous is the master's address and port."""
    if args.rdzv_backend == "static" and not args.rdzv_endpoint:
        return f"{args.master_addr}:{args.master_port}"
    return str(args.rdzv_endpoint)


def get_use_env(args: Namespace) -> bool:
    """Return whether workers read their local rank from the environment. False only for the legacy ``launch`` without ``--use-env``."""
    return bool(getattr(args, "use_env", True))


def _get_logs_specs_class(logs_specs_name: str | None) -> type["LogsSpecs"]:
    """Return the class that configures the log files.

    Args:
        logs_specs_name: name of an entry point of the group ``torchrun.logs_specs``; ``None`` selects ``DefaultLogsSpecs``.

    Raises:
        UsageError: the entry point does not exist.
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
    # torch registers its default class. This package uses its own instead.
    ours = entry.value == "torch.distributed.elastic.multiprocessing:DefaultLogsSpecs"
    plugin: type[LogsSpecs] = _late("DefaultLogsSpecs") if ours else entry.load()
    _late("logger").info("logs_specs %r is %s", logs_specs_name, plugin)
    return plugin


def _std_class(logs_specs_cls: type["LogsSpecs"]) -> Any:
    """Return the ``Std`` class for a ``LogsSpecs`` class: torch's ``Std`` if the class is derived from torch's ``LogsSpecs``."""
    theirs = sys.modules.get("torch.distributed.elastic.multiprocessing.api")
    # issubclass does not work here: our class is a virtual subclass of torch's.
    if theirs is not None and theirs.LogsSpecs in logs_specs_cls.__mro__:
        return theirs.Std
    return _late("Std")


def config_from_args(args: Namespace) -> tuple["LaunchConfig", Callable[..., Any] | str, list[str]]:
    """Return the configuration, the entrypoint and its arguments. Mirrors ``torch.distributed.run.config_from_args``.

    With several workers, sets ``OMP_NUM_THREADS=1`` in this process if the variable is not set, as torch does.

    Args:
        args: the parsed command line. Modified in place: options that the parser of torch does not have get their defaults.

    Raises:
        UsageError: a value is invalid.
        OSError: the log folder cannot be created.
    """
    from ferroelastic import _usage, _usage_logs

    _add_missing_options(args)
    logger = _late("logger")
    min_nodes, max_nodes = parse_min_max_nnodes(args.nnodes)
    if not 0 < min_nodes <= max_nodes:
        raise UsageError(f"{named('nnodes', args.nnodes)} must have 0 < MIN <= MAX; give e.g. 1:4")
    _usage.check_numbers(args)
    _usage.check_texts(args)
    _usage.check_signals(args.signals_to_handle, args.signals_to_forward)
    _usage.check_rendezvous_backend(args.rdzv_backend)
    _usage.check_local_addr(args.local_addr)
    static = args.rdzv_backend == "static"
    if static and not 0 <= args.node_rank < max_nodes:
        raise UsageError(
            f"{named('node_rank', args.node_rank)} is not a rank of a job with {named('nnodes', args.nnodes)}; "
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

    log_options = _usage_logs.parse_log_options(args)
    logs_specs_cls = _get_logs_specs_class(args.logs_specs)
    std = _std_class(logs_specs_cls)
    redirects, tee = (_usage.parse_std(name, getattr(args, name), std) for name in ("redirects", "tee"))
    logs_specs = logs_specs_cls(
        redirects=redirects,
        tee=_usage_logs.with_files(log_options, redirects, tee, std, nproc_per_node),
        local_ranks_filter=_usage.parse_ranks(args.local_ranks_filter),
        log_dir=args.log_dir,
    )
    if args.log_dir and hasattr(logs_specs, "link_latest"):
        logs_specs.link_latest = True
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
        # Parsers of torch before 2.14 lack the option.
        log_line_prefix_template=getattr(args, "log_line_prefix_template", "")
        or os.getenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
        local_addr=args.local_addr,
        logs_specs=logs_specs,
        event_log_handler=args.event_log_handler,
        numa_options=_numa_options(args.numa_binding),
        signals_to_handle=args.signals_to_handle,
        signals_to_forward=args.signals_to_forward,
        duplicate_stdout_filters=args.duplicate_stdout_filters,
        duplicate_stderr_filters=args.duplicate_stderr_filters,
        virtual_local_rank=args.virtual_local_rank,
        shutdown_timeout=args.shutdown_timeout,
        exit_barrier_timeout=args.exit_barrier_timeout,
        grace_signal_target=args.grace_signal_target,
        interactive_rank=args.interactive_rank,
        **_usage.parse_warm_workers(args, nproc_per_node),
        **_usage_logs.log_settings(log_options),
        **_usage.parse_restart_settings(args),
    )
    if nproc_per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Workers inherit it. One thread per CPU in each of several workers would be slower than one thread per worker.
        os.environ["OMP_NUM_THREADS"] = "1"
        logger.warning(
            "OMP_NUM_THREADS is not set; each of the %d workers gets OMP_NUM_THREADS=1, set it to another value to tune performance",
            nproc_per_node,
        )
    return config, *_entrypoint(args)


def _numa_options(mode: str | None) -> Any:
    if mode is None:
        return None
    from ferroelastic.numa.binding import AffinityMode, NumaOptions

    return NumaOptions(affinity_mode=AffinityMode(mode))


def _entrypoint(args: Namespace) -> tuple[Callable[..., Any] | str, list[str]]:
    """Return the entrypoint of the workers and its arguments."""
    from ferroelastic import _usage

    entrypoint: Callable[..., Any] | str
    if args.run_path:
        _usage.warn_of_environment("to run the workers in it, start {python} -m ferroelastic.run")
        entrypoint, arguments = run_script_path, [args.training_script]
    elif args.no_python:
        entrypoint, arguments = args.training_script, []
    else:
        # Unbuffered, so that the last output of a killed worker is in its log.
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
        _usage.warn_of_environment("to run the workers in it, set PYTHON_EXEC={python}")
        return sys.executable
    if not chosen:
        raise UsageError("PYTHON_EXEC='' names no Python interpreter; unset it, or set it to the path of one")
    return chosen


def run_script_path(training_script: str, *training_script_args: str) -> None:
    """Run a script in this interpreter, as its main module. Mirrors ``torch.distributed.run.run_script_path``.

    Args:
        training_script: absolute path of the script.
        training_script_args: arguments of the script.
    """
    import runpy

    sys.argv = [training_script, *training_script_args]
    runpy.run_path(training_script, run_name="__main__")


# One variable of each scheduler. Without them the modules that read the rest are not loaded.
_SCHEDULERS = (
    "SLURM_JOB_ID",
    "SLURM_JOBID",
    "JOB_COMPLETION_INDEX",
    "SKYPILOT_NODE_RANK",
    "SKYPILOT_TASK_ID",
    "DSTACK_NODE_RANK",
    "FLUX_JOB_ID",
    "OMPI_COMM_WORLD_SIZE",
)

_RENDEZVOUS_OPTIONS = frozenset({"rdzv_backend", "rdzv_endpoint", "rdzv_id", "node_rank", "master_addr", "master_port"})


def _ask_scheduler(args: Namespace) -> None:
    """Complete the command line with the values of the scheduler, if there is one and the user gave no option of the rendezvous."""
    given = getattr(args, "given", None)
    # A program that fills a namespace itself has decided.
    if given is None or args.standalone or args.no_scheduler or given & _RENDEZVOUS_OPTIONS:
        return
    nodes = parse_min_max_nnodes(args.nnodes) if "nnodes" in given else None
    if (nodes is None or nodes[1] > 1) and any(variable in os.environ for variable in _SCHEDULERS):
        from ferroelastic._scheduler.take import take

        take(args, given, nodes)


def run(args: Namespace) -> None:
    """Launch a job from a parsed command line, and wait for the workers of this node. Mirrors ``torch.distributed.run.run``.

    Args:
        args: as returned by :func:`parse_args`, or by torch's parser. Modified in place: the rendezvous of a single-node job is set here.

    Raises:
        ChildFailedError: workers failed and no restart was left.
        SignalException: this process received a terminating signal. The workers were stopped.
        UsageError: a value is invalid.
    """
    _name_thread("pt_elastic")
    _ask_scheduler(args)
    if args.standalone:
        _check_standalone(args)
        _use_local_rendezvous(args)
        _late("logger").info(
            "rendezvous: --rdzv-backend=%s --rdzv-endpoint=%s --rdzv-id=%s",
            args.rdzv_backend,
            args.rdzv_endpoint,
            args.rdzv_id,
        )
    elif args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port is None:
        _, max_nodes = parse_min_max_nnodes(args.nnodes)
        if max_nodes == 1:
            _use_local_rendezvous(args)
    if args.master_port is None:
        args.master_port = 29500
    config, entrypoint, arguments = config_from_args(args)
    _late("elastic_launch")(config=config, entrypoint=entrypoint)(*arguments)


def _add_missing_options(args: Namespace) -> None:
    """Add the options that the parser of torch, or of an older torch, does not have. Their ``PET_*`` variables count."""
    if hasattr(args, "preload"):
        return
    for name, value in vars(parse_args(["script"])).items():
        if not hasattr(args, name):
            setattr(args, name, value)


def _check_standalone(args: Namespace) -> None:
    """Check that ``--standalone`` is not combined with several nodes.

    Raises:
        UsageError: ``--nnodes`` needs more than one node.
    """
    min_nodes, _ = parse_min_max_nnodes(args.nnodes)
    if min_nodes > 1:
        raise UsageError(
            f"--standalone runs the job on this node only, but {named('nnodes', args.nnodes)} waits for other nodes; remove one of them"
        )


def _use_local_rendezvous(args: Namespace) -> None:
    """Set a rendezvous on a free port of this host, which cannot collide with another job."""
    from ferroelastic.utils._ids import random_uuid

    args.rdzv_backend = "c10d"
    args.rdzv_endpoint = "localhost:0"
    args.rdzv_id = random_uuid()


def _name_thread(name: str) -> None:
    """Set the name of the calling thread in ``ps`` and ``top``."""
    try:
        with open("/proc/thread-self/comm", "w") as comm:
            comm.write(name)
    except OSError:  # the name is not essential
        pass


def main(args: Sequence[str] | None = None) -> None:
    """Launch a job from a command line, and wait for the workers of this node.

    Mirrors ``torch.distributed.run.main``. Exceptions are also recorded in ``$TORCHELASTIC_ERROR_FILE``, if the variable is set.

    Args:
        args: the command line without the program; ``None`` takes that of this process.

    Raises:
        ChildFailedError: workers failed and no restart was left.
        SignalException: this process received a terminating signal. The workers were stopped.
        SystemExit: the command line cannot be parsed (code 2).
        UsageError: a value is invalid.
    """
    _late("record")(_parse_and_run)(args)


def _parse_and_run(args: Sequence[str] | None) -> None:
    run(parse_args(args))


def cli(args: Sequence[str] | None = None) -> int:
    """Run :func:`main` for a console: report exceptions on standard error and return an exit code.

    Args:
        args: the command line without the program; ``None`` takes that of this process.

    Returns:
        0 after a success; the exit code of the worker that failed first (128+n for signal n); 128+n if signal n ended
        ``ferrorun``; 2 for a usage error; else 1.

    Raises:
        SystemExit: the command line cannot be parsed (code 2), or it has ``--help`` (code 0).
    """
    from ferroelastic import _process

    with ExitStack() as cleanup:
        _process.prepare(cleanup)
        return _cli(args, cleanup)


def console(parse: Callable[[Sequence[str] | None], Namespace] | None = None) -> NoReturn:
    """Run :func:`cli` and end this process with its exit code. With ``--exec``, replace this process by the program.

    Args:
        parse: parser of the command line, by default :func:`parse_args`.
    """
    if parse is None and sys.argv[1:2] == [EXEC]:
        from ferroelastic._exec import execute

        execute(sys.argv[2:])
    from ferroelastic import _process

    # Never closed: the handlers stay installed until the process ends, so that no signal changes the exit code.
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
        _show_logs(getattr(parsed, "log_format", "text"))
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


def _show_logs(log_format: str) -> None:
    """Write the launcher's log to standard error, one line per record, with the level of ``$LOGLEVEL``.

    Args:
        log_format: ``"text"``, or ``"json"`` for one JSON object per record.

    Raises:
        UsageError: the value of ``$LOGLEVEL`` is not a log level.
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
        if log_format == "json":
            from ferroelastic._json_log import JsonFormatter

            handler.setFormatter(JsonFormatter())
        else:
            handler.setFormatter(logging.Formatter("%(asctime)s ferrorun[%(process)d] %(levelname)s: %(message)s"))
        logger.addHandler(handler)


if __name__ == "__main__":
    console()
