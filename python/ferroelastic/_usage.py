"""Checks of the command line before ``ferrorun`` starts any process."""

import math
import os
import sys
from argparse import Namespace
from importlib import import_module
from typing import Any

from ferroelastic._checks import check_warm_workers


class UsageError(ValueError, AssertionError, RuntimeError):
    """An option has an invalid value. The text names the option, the value and the remedy.

    torch's launcher raises one of these three base classes, depending on the option. Code that catches torch's error catches this one.
    """


def named(dest: str, value: object) -> str:
    """Return an option and its value as the user wrote them: ``--nnodes='x'``, or ``PET_NNODES='x'``.

    Args:
        dest: the option's attribute in the namespace.
        value: value of the option.
    """
    variable = f"PET_{dest.upper()}"
    text = repr(value) if isinstance(value, str) else str(value)
    if os.environ.get(variable) == str(value):
        return f"{variable}={text}"
    return f"--{dest.replace('_', '-')}={text}"


def check_numbers(args: Namespace) -> None:
    """Check the ranges of numeric options.

    Raises:
        UsageError: a value is out of range.
    """
    if args.max_restarts < 0:
        raise UsageError(f"{named('max_restarts', args.max_restarts)} must be >= 0; give 0 for no restart")
    if not args.monitor_interval > 0:
        raise UsageError(f"{named('monitor_interval', args.monitor_interval)} must be > 0; give seconds, e.g. 0.1")
    if args.shutdown_timeout is not None and args.shutdown_timeout < 0:
        raise UsageError(
            f"{named('shutdown_timeout', args.shutdown_timeout)} must be non-negative; "
            "give whole seconds, 0 to kill the workers at once"
        )
    if args.exit_barrier_timeout is not None and not 0 <= args.exit_barrier_timeout < math.inf:
        raise UsageError(
            f"{named('exit_barrier_timeout', args.exit_barrier_timeout)} must be non-negative; "
            "give seconds, 0 to end without a wait for the other nodes"
        )


def check_detached(args: Namespace) -> None:
    """Check that ``--keep-detached`` and ``--end-detached`` are not combined.

    Raises:
        UsageError: both are set.
    """
    if args.keep_detached and args.end_detached:
        raise UsageError("--keep-detached and --end-detached exclude each other; remove one of them")


def check_interactive_rank(args: Namespace, nproc_per_node: int) -> None:
    """Check that the worker of ``--interactive-rank`` exists and that standard input is a terminal.

    Args:
        args: the parsed command line. A namespace of torch's parser lacks the option.
        nproc_per_node: number of workers on this node.

    Raises:
        UsageError: the worker does not exist, or standard input is not a terminal.
    """
    rank = getattr(args, "interactive_rank", None)
    if rank is None:
        return
    if not 0 <= rank < nproc_per_node:
        raise UsageError(
            f"{named('interactive_rank', rank)} is not a local rank of this node; give 0 to {nproc_per_node - 1}"
        )
    if not os.isatty(0):
        from ferroelastic.multiprocessing._terminal import NO_TERMINAL

        raise UsageError(f"{named('interactive_rank', rank)}: {NO_TERMINAL}")


def check_texts(args: Namespace) -> None:
    """Check that options whose text the agent writes or searches are UTF-8. Paths may have any bytes.

    Raises:
        UsageError: an option is not.
    """
    options = ("role", "log_line_prefix_template", "duplicate_stdout_filters", "duplicate_stderr_filters")
    for dest in (*options, "fail_on_log", "warn_on_log"):
        value = getattr(args, dest, None) or []
        for text in [value] if isinstance(value, str) else value:
            if text != text.encode(errors="ignore").decode():
                raise UsageError(f"{named(dest, text)} is not UTF-8; give a text in UTF-8")


def check_signals(handled: str, forwarded: str) -> None:
    """Check ``--signals-to-handle`` and ``--signals-to-forward``.

    Args:
        handled: names of signals, separated by commas. Empty names are skipped.
        forwarded: same for the forwarded signals.

    Raises:
        UsageError: a name is unknown, is a signal that no process can handle, or is in both lists.
    """
    both = _check_signal_names("signals_to_handle", handled) & _check_signal_names("signals_to_forward", forwarded)
    if both:
        raise UsageError(
            f"{named('signals_to_forward', forwarded)}: {', '.join(sorted(both))} also ends the job "
            f"({named('signals_to_handle', handled)}), which sends it to the workers anyway; remove it from one of the two options"
        )


def _check_signal_names(dest: str, names: str) -> set[str]:
    """Check one list of signals and return its names.

    Raises:
        UsageError: a name is unknown, or is a signal that no process can handle.
    """
    import signal

    known = signal.Signals.__members__
    listed = set(filter(None, map(str.strip, names.split(","))))
    for name in sorted(listed):
        if name in ("SIGKILL", "SIGSTOP"):
            raise UsageError(f"{named(dest, names)}: {name} cannot be handled by a process; remove it")
        if name not in known:
            guess = f"SIG{name.upper().removeprefix('SIG')}"
            remedy = f"write {guess}" if guess in known else "give names such as SIGTERM,SIGUSR1"
            raise UsageError(f"{named(dest, names)}: {name!r} is not a signal of this system; {remedy}")
    return listed


def parse_ranks(text: str) -> set[int] | None:
    """Parse ``--local-ranks-filter``: ``"0,2"`` is ``{0, 2}``, an empty text is ``None``.

    Raises:
        UsageError: the value is not a list of integers.
    """
    if not text:
        return None
    try:
        return set(map(int, text.split(",")))
    except ValueError:
        raise UsageError(
            f"{named('local_ranks_filter', text)} must be a comma-separated list of integers, "
            "e.g. --local_ranks_filter=0,1,2"
        ) from None


def parse_warm_workers(args: Namespace, nproc_per_node: int) -> dict[str, Any]:
    """Parse ``--warm-workers``, ``--warm-imports`` and ``--preload``.

    Args:
        args: the parsed command line. A command line of torch's parser has none of the options.
        nproc_per_node: number of workers on this node.

    Returns:
        The fields of a ``LaunchConfig``. Empty without warm workers: the class may be replaced by torch's.

    Raises:
        UsageError: a value is invalid.
    """
    text = getattr(args, "warm_workers", "0")
    preload = getattr(args, "preload", False)
    try:
        warm_workers = nproc_per_node if text == _AUTO else int(text)
    except ValueError:
        warm_workers = -1
    if warm_workers < 0:
        raise UsageError(
            f"{named('warm_workers', text)} is not a number of parked workers; give a number >= 0, or {_AUTO} for one per worker"
        )
    if not warm_workers and not preload:
        return {}
    settings = {"warm_workers": warm_workers or nproc_per_node, "warm_imports": args.warm_imports, "preload": preload}
    try:
        check_warm_workers(settings["warm_workers"], settings["warm_imports"])
    except ValueError as error:
        raise UsageError(str(error)) from None
    return settings


_AUTO = "auto"

_RESTART_DEFAULTS: dict[str, Any] = {
    "restart_backoff": 0.25,
    "restart_backoff_max": 5.0,
    "healthy_window": 0.0,
    "restart_rate": "none",
    "fatal_exit_codes": "none",
    "fatal_causes": "stuck",
    "min_uptime": 0.0,
    "restarts_without_progress": None,
    "progress_file": None,
    "on_node_failure": "restart",
    "early_exit_timeout": 0.0,
}


def parse_restart_settings(args: Namespace) -> dict[str, Any]:
    """Parse the options of the restart policy.

    Args:
        args: the parsed command line. A command line of torch's parser has none of the options.

    Returns:
        The fields of a ``LaunchConfig``. Empty for the default policy: the class may be replaced by torch's.

    Raises:
        UsageError: a value is invalid.
    """
    fields: dict[str, Any] = {}
    values = {name: getattr(args, name, default) for name, default in _RESTART_DEFAULTS.items()}
    if values != _RESTART_DEFAULTS:
        from ferroelastic.agent.server import RestartSettings

        try:
            fields["restart_settings"] = RestartSettings(**values)
        except ValueError as error:
            raise UsageError(str(error)) from None
    path = getattr(args, "restart_policy", None)
    if path is not None:
        fields["restart_policy"] = _load_policy(path)
    return fields


def _load_policy(path: str) -> Any:
    """Import the restart policy ``MODULE:NAME``. A class is instantiated."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise UsageError(
            f"{named('restart_policy', path)} is not of the form MODULE:NAME; give a module that can be imported and the name of a policy in it"
        )
    try:
        policy = getattr(import_module(module), name)
        policy = policy() if isinstance(policy, type) else policy
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{named('restart_policy', path)} cannot be loaded: {reason}") from error
    if not callable(getattr(policy, "decide", None)):
        raise UsageError(f"{named('restart_policy', path)} has no method decide(); add it, or name another object")
    return policy


def parse_std(dest: str, text: str, std: Any) -> Any:
    """Parse ``--redirects`` or ``--tee``.

    Args:
        dest: ``"redirects"`` or ``"tee"``.
        text: value of the option.
        std: the ``Std`` class of the result. A plugin for torch needs torch's class.

    Raises:
        UsageError: the value is neither a stream nor a mapping of local ranks to streams.
    """
    try:
        return std.from_str(text)
    except ValueError:
        raise UsageError(
            f"{named(dest, text)} is neither one of 0 (none), 1 (stdout), 2 (stderr), 3 (both) nor a list of "
            "RANK:ONE_OF_THEM; write e.g. 3 or 0:3,1:2"
        ) from None


def parse_rendezvous_conf(text: str) -> dict[str, Any]:
    """Parse ``--rdzv-conf``: ``"timeout=60,is_host=1"``.

    Raises:
        UsageError: the value is not a list of assignments, or contains a setting that has its own option.
    """
    from ferroelastic.rendezvous.utils import _parse_rendezvous_config

    try:
        config: dict[str, Any] = dict(_parse_rendezvous_config(text))
    except ValueError as error:
        raise UsageError(f"{named('rdzv_conf', text)}: {error}") from None
    flags = {
        "backend": "--rdzv-backend",
        "endpoint": "--rdzv-endpoint",
        "run_id": "--rdzv-id",
        "min_nodes": "--nnodes",
        "max_nodes": "--nnodes",
        "local_addr": "--local-addr",
    }
    for key in config.keys() & flags.keys():
        raise UsageError(f"{named('rdzv_conf', text)}: {key!r} has its own option; use {flags[key]}")
    timeout: str = config.get("timeout", "0")
    if not timeout.isdecimal():
        raise UsageError(f"{named('rdzv_conf', text)}: timeout={timeout!r} is not a timeout; give whole seconds")
    return config


def check_endpoint(args: Namespace, endpoint: str, rdzv_configs: dict[str, Any]) -> None:
    """Check the endpoint of the backends ``static`` and ``c10d``, which consists of a host and a port.

    Args:
        args: the parsed command line.
        endpoint: the endpoint that results from it.
        rdzv_configs: settings of the rendezvous. With ``store_type=file`` the endpoint of ``c10d`` is a file.

    Raises:
        UsageError: the host or the port is invalid.
    """
    if args.rdzv_backend not in ("static", "c10d") or rdzv_configs.get("store_type") == "file":
        return
    if not args.rdzv_endpoint and args.master_port is None:
        return  # the caller is not run(), which sets the default port
    from ferroelastic.rendezvous.utils import parse_rendezvous_endpoint

    try:
        _, port = parse_rendezvous_endpoint(endpoint, default_port=-1)
    except ValueError as error:
        option = named("rdzv_endpoint", endpoint) if args.rdzv_endpoint else named("master_port", args.master_port)
        raise UsageError(f"{option}: {error}") from None
    if port == -1 and args.rdzv_backend == "static":
        raise UsageError(
            f"{named('rdzv_endpoint', endpoint)} has no port, which a static rendezvous needs; give HOST:PORT"
        )


def check_event_log_handler(name: str) -> None:
    """Check ``--event-log-handler``.

    Raises:
        UsageError: no handler of that name is registered.
    """
    from ferroelastic.events import handlers

    try:
        handlers.get_logging_handler(name)
    except (KeyError, ValueError):
        known = ", ".join(sorted(handlers._log_handlers))  # noqa: SLF001 - torch's name for the registry
        raise UsageError(
            f"{named('event_log_handler', name)} is not a registered event handler; use one of {known}"
        ) from None


def check_rendezvous_backend(name: str) -> None:
    """Check ``--rdzv-backend`` without loading the backend, which may be torch's or a plugin.

    Raises:
        UsageError: no backend of that name is registered in this package, in torch, or by an installed plugin.
    """
    from ferroelastic.rendezvous.api import rendezvous_handler_registry

    theirs = getattr(sys.modules.get("torch.distributed.elastic.rendezvous.api"), "rendezvous_handler_registry", None)
    known = {*rendezvous_handler_registry.backends, *getattr(theirs, "_registry", {})}
    if name in known:
        return
    from importlib.metadata import entry_points

    known |= entry_points(group="torchrun.handlers").names
    if name not in known:
        raise UsageError(
            f"{named('rdzv_backend', name)} is not a rendezvous backend; use one of {', '.join(sorted(known))}"
        )


_warned_of_environment = False


def warn_of_environment(remedy: str) -> None:
    """Warn once if the active environment is not the environment of this interpreter: workers do not run in it.

    Args:
        remedy: the remedy, with ``{python}`` for the interpreter of the active environment.
    """
    global _warned_of_environment  # noqa: PLW0603 - once per process
    other = _other_environment()
    if other is None or _warned_of_environment:
        return
    _warned_of_environment = True
    from ferroelastic.utils.logging import get_logger

    variable, folder = other
    get_logger("ferroelastic.run").warning(
        "%s=%s is active, but workers run with %s, the interpreter of this ferrorun; %s",
        *(variable, folder, sys.executable, remedy.format(python=os.path.join(folder, "bin", "python"))),
    )


def _other_environment() -> tuple[str, str] | None:
    """Return the variable and the folder of the active environment if it is not the environment of this interpreter."""
    own = {os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)}
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        folder = os.environ.get(variable)
        if not folder:
            continue
        if os.path.realpath(folder) not in own:
            return variable, folder
        if variable == "VIRTUAL_ENV":
            return None  # a virtual environment within a conda environment, whose variable stays set
    return None


def working_directory() -> str:
    """Return the working directory.

    Raises:
        UsageError: the working directory was deleted.
    """
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise UsageError(
            f"the working directory {os.environ.get('PWD', '')!r} was deleted; change to an existing directory"
        ) from None


def check_target(args: Namespace) -> None:
    """Check that the script, the module or the command exists.

    Raises:
        UsageError: it does not exist, or the script is not readable.
    """
    target: str = args.training_script
    if args.no_python and args.module and not args.run_path:
        return  # config_from_args reports it, with torch's text
    if args.no_python and not args.run_path:
        _check_command(target)
    elif args.module and not args.run_path:
        if os.environ.get("PYTHON_EXEC", sys.executable) == sys.executable:
            _check_module(target)
    elif target.startswith("-"):
        return  # "-" is standard input, and Python checks its own options
    elif not os.path.exists(target):
        raise UsageError(f"script {target!r} does not exist in {working_directory()!r}; check the path{_hint(target)}")
    elif not os.access(target, os.R_OK):
        raise UsageError(f"script {target!r} cannot be read; allow it with chmod +r")


def _check_command(command: str) -> None:
    import shutil

    if "/" in command:
        if not os.path.exists(command):
            where = "" if os.path.isabs(command) else f" in {working_directory()!r}"
            raise UsageError(f"command {command!r} does not exist{where}; check the path")
    elif shutil.which(command) is None:
        remedy = f"write './{command}'" if os.path.exists(command) else "check its name or write its path"
        raise UsageError(f"command {command!r} is not in PATH; {remedy}")


def _check_module(module: str) -> None:
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    top = module.partition(".")[0]
    try:
        found = bool(top) and find_spec(top) is not None
    except ValueError:  # the module is loaded and has no spec
        found = True
    if found:
        return
    # Workers search the working directory first. It may be missing in the path of ferrorun.
    here = working_directory()
    if not top or PathFinder.find_spec(top, [here]) is None:
        raise UsageError(f"module {module!r} is neither in {here!r} nor installed; check its name or PYTHONPATH")


def _hint(target: str) -> str:
    """Return a hint for a missing script: a command of that name may exist."""
    import shutil

    return " or use --no-python" if "/" not in target and shutil.which(target) else ""


def check_log_dir(log_dir: str | None) -> None:
    """Check that an existing log folder is writable, without writing to it.

    Raises:
        OSError: the folder is not writable.
    """
    if log_dir and os.path.isdir(log_dir) and not os.access(log_dir, os.W_OK | os.X_OK):
        import errno

        raise OSError(errno.EACCES, os.strerror(errno.EACCES), log_dir)


def check_local_addr(address: str | None) -> None:
    """Check that ``--local-addr`` can be resolved.

    Raises:
        UsageError: the name does not exist. A failure of the name server is not reported.
    """
    if not address:
        return
    import socket

    from ferroelastic.utils import _interruptible

    try:
        _interruptible.call(socket.getaddrinfo, address, None)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", socket.EAI_NONAME) == socket.EAI_NONAME:
            raise UsageError(
                f"{named('local_addr', address)} is an unknown host name; give an address or a host name of this machine"
            ) from None
