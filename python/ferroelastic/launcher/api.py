"""Launches a local agent for a function or a program, and waits for its workers.

Mirrors ``torch.distributed.launcher.api``. Intended differences:

* Neither torch nor CUDA is imported or initialised.
* If the agent gives up because workers are stuck and none of them has failed, an exception is raised. torch returns ``{}``.
* ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` is validated.
* ``exit_barrier_timeout`` and ``TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT``, which are planned for torch, set the timeout of the exit barrier.
* An exception from the final shutdown of the rendezvous is logged and not raised. torch does so since 2.15.
* A ``LaunchConfig`` of torch 2.6 or later is accepted in place of :class:`LaunchConfig`.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ferroelastic.rendezvous.registry as rdzv_registry
from ferroelastic import _signals, _torch, events, metrics
from ferroelastic._checks import (
    check_iterable,
    check_logs_specs,
    check_number,
    check_signal_target,
    check_strings,
    check_type,
    check_warm_workers,
    check_whole_number,
)
from ferroelastic._compat import family, newer
from ferroelastic._exit_codes import exit_code
from ferroelastic._signals import DEFAULT_SIGNALS, SIGNALS_ENV, SignalException
from ferroelastic._stop_notice import SignalTarget
from ferroelastic._text import launched_name
from ferroelastic._timeouts import exit_barrier_timeout_s, shutdown_timeout_s
from ferroelastic.agent.server._events import event_log_handler_of
from ferroelastic.agent.server._policy import RestartPolicy, RestartSettings
from ferroelastic.agent.server.api import RunResult, WorkerSpec
from ferroelastic.agent.server.health_check_server import HealthCheckServer, create_healthcheck_server
from ferroelastic.agent.server.local_elastic_agent import LocalElasticAgent
from ferroelastic.events import handlers as event_handlers
from ferroelastic.multiprocessing import DefaultLogsSpecs, LogsSpecs
from ferroelastic.multiprocessing._log_options import LogOptions
from ferroelastic.multiprocessing.errors import ChildFailedError
from ferroelastic.numa.binding import NumaOptions
from ferroelastic.rendezvous import RendezvousParameters
from ferroelastic.rendezvous._native_settings import DEFAULT_STATIC_TIMEOUT_S
from ferroelastic.rendezvous._notifying import notifier_of
from ferroelastic.rendezvous.utils import parse_rendezvous_endpoint
from ferroelastic.utils.logging import get_logger

__all__ = ["LaunchConfig", "create_healthcheck_server", "elastic_launch", "launch_agent"]

logger = get_logger(__name__)


@dataclass
class LaunchConfig:
    """Configuration of a job. Mirrors ``torch.distributed.launcher.api.LaunchConfig``.

    Args:
        min_nodes: minimum number of nodes.
        max_nodes: maximum number of nodes.
        nproc_per_node: number of workers on this node.
        logs_specs: destination of the workers' output. Default ``DefaultLogsSpecs()``.
        run_id: id of the job, equal on all nodes. Generated if empty.
        role: name of the workers' role, for logs and events.
        rdzv_endpoint: endpoint of the rendezvous, ``host[:port]``.
        rdzv_backend: ``"static"``, ``"c10d"`` or another registered backend.
        rdzv_configs: further settings of the rendezvous. ``"timeout"`` is in seconds, default 900.
        rdzv_timeout: legacy alternative to ``rdzv_configs["timeout"]``, in seconds. -1 means not set.
        max_restarts: maximum number of restarts after failures.
        monitor_interval: maximum time between two checks of the workers, in seconds.
        start_method: start method of ``multiprocessing`` for function entrypoints: ``spawn``, ``fork`` or ``forkserver``.
        log_line_prefix_template: prefix of the workers' lines on the console, see
            :class:`ferroelastic.agent.server.LocalElasticAgent`.
        metrics_cfg: parameters for the metrics.
        local_addr: address of this node for the other nodes. ``None`` detects it.
        event_log_handler: name of the handler for the agent's events.
        numa_options: binding of the workers to CPUs. ``None`` means no binding.
        signals_to_handle: names of the signals that end the job, separated by commas.
        duplicate_stdout_filters: stdout lines that contain one of these strings are also written to one common file.
        duplicate_stderr_filters: same for standard error.
        virtual_local_rank: whether each worker gets ``LOCAL_RANK=0`` and one visible device.
        signals_to_forward: names of the signals that are forwarded to the workers without ending the job, separated by commas. Not in
            torch.
        interactive_rank: local rank of the worker with the terminal as standard input, ``None`` for no worker. Not in torch.
        shutdown_timeout: grace period in seconds between the stop signal and SIGKILL. Default
            ``$TORCH_ELASTIC_SHUTDOWN_TIMEOUT``, else 30.
        warm_workers: see :class:`ferroelastic.agent.server.WorkerSpec`. Not in torch.
        warm_imports: see :class:`ferroelastic.agent.server.WorkerSpec`. Not in torch.
        preload: see :class:`ferroelastic.agent.server.WorkerSpec`. Not in torch.
        log_options: options for the lines of the workers. ``None`` for torch's behaviour. Not in torch.
        exit_barrier_timeout: seconds to wait at the end for the agents of the other nodes. Default
            ``$TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT``, else 300. As planned for torch.
        grace_signal_target: receivers of the stop signal: ``"group"`` for the worker's process group, as in torch, or ``"leader"`` for the
            worker alone. The rest of the group then gets SIGTERM after the worker has ended. Not in torch.
        restart_settings: see :class:`ferroelastic.agent.server.WorkerSpec`. Not in torch.
        restart_policy: see :class:`ferroelastic.agent.server.WorkerSpec`. Not in torch.

    Raises:
        ValueError: ``interactive_rank`` is not a local rank, a timeout (argument or variable) is negative or not a number, or
            ``grace_signal_target`` is unknown.
        TypeError: a value has the wrong type.
    """

    min_nodes: int
    max_nodes: int
    nproc_per_node: int
    logs_specs: LogsSpecs | None = None
    run_id: str = ""
    role: str = "default_role"
    rdzv_endpoint: str = ""
    rdzv_backend: str = "etcd"
    rdzv_configs: dict[str, Any] = field(default_factory=dict)
    rdzv_timeout: int = -1
    max_restarts: int = 3
    monitor_interval: float = 0.1
    start_method: str = "spawn"
    log_line_prefix_template: str | None = None
    metrics_cfg: dict[str, str] = field(default_factory=dict)
    local_addr: str | None = None
    event_log_handler: str = "null"
    numa_options: NumaOptions | None = None
    signals_to_handle: str = DEFAULT_SIGNALS
    duplicate_stdout_filters: list[str] | None = None
    duplicate_stderr_filters: list[str] | None = None
    virtual_local_rank: bool = False
    shutdown_timeout: int | None = None
    signals_to_forward: str = ""
    interactive_rank: int | None = None
    warm_workers: int = 0
    warm_imports: Sequence[str] = ("torch",)
    preload: bool = False
    log_options: LogOptions | None = None
    exit_barrier_timeout: float | None = None
    grace_signal_target: SignalTarget = "group"
    restart_settings: RestartSettings | None = None
    restart_policy: RestartPolicy | None = None

    def __post_init__(self) -> None:
        """Check the values and set defaults that depend on other fields or on the environment."""
        _check_types(self)
        if self.rdzv_timeout != -1:
            self.rdzv_configs["timeout"] = self.rdzv_timeout
        else:
            self.rdzv_configs.setdefault("timeout", DEFAULT_STATIC_TIMEOUT_S)
        if self.logs_specs is None:
            self.logs_specs = DefaultLogsSpecs()
        if self.interactive_rank is not None and not 0 <= self.interactive_rank < self.nproc_per_node:
            raise ValueError(
                f"interactive_rank={self.interactive_rank} is not a local rank; give 0 to {self.nproc_per_node - 1}"
            )
        self.shutdown_timeout = shutdown_timeout_s(self.shutdown_timeout)
        self.exit_barrier_timeout = exit_barrier_timeout_s(self.exit_barrier_timeout)


def _check_types(config: Any) -> None:
    """Check the types of a configuration, of this package's or of torch's class.

    Raises:
        TypeError: a value has the wrong type. The text names it.
    """
    for name in ("min_nodes", "max_nodes", "nproc_per_node"):
        check_whole_number(name, getattr(config, name))
    check_number("max_restarts", config.max_restarts, "a number of restarts")
    for name in ("monitor_interval", "rdzv_timeout"):
        check_number(name, newer(config, name, 0))
    for name in ("run_id", "role", "rdzv_backend", "signals_to_handle", "signals_to_forward", "event_log_handler"):
        check_type(name, newer(config, name, ""), str, "a string")
    for name in ("local_addr", "log_line_prefix_template"):
        check_type(name, newer(config, name, None), (str, type(None)), "a string or None")
    check_type("rdzv_configs", config.rdzv_configs, dict, "a dictionary")
    if config.logs_specs is not None:
        check_logs_specs("logs_specs", config.logs_specs)
    numa_options = newer(config, "numa_options", None)
    if numa_options is not None and not hasattr(numa_options, "affinity_mode"):
        check_type("numa_options", numa_options, NumaOptions, "NumaOptions or None")
    for name in ("duplicate_stdout_filters", "duplicate_stderr_filters"):
        check_strings(name, newer(config, name, None))
    check_signal_target(newer(config, "grace_signal_target", "group"))
    check_warm_workers(newer(config, "warm_workers", 0), newer(config, "warm_imports", ()))


def _warm_settings(config: Any) -> dict[str, Any]:
    """Return the settings of warm workers for a ``WorkerSpec``. Empty if there are none: the class may be replaced by torch's."""
    names = ("warm_workers", "warm_imports", "preload")
    if not newer(config, "warm_workers", 0) and not newer(config, "preload", False):
        return {}
    return {name: getattr(config, name) for name in names}


def _restart_settings(config: Any) -> dict[str, Any]:
    """Return the restart policy for a ``WorkerSpec``. Empty for the default: the class may be replaced by torch's."""
    values = {name: newer(config, name, None) for name in ("restart_settings", "restart_policy")}
    return {name: value for name, value in values.items() if value is not None}


class elastic_launch:  # noqa: N801 - torch's name
    """Callable that launches an agent. Mirrors ``torch.distributed.launcher.api.elastic_launch``.

    ``elastic_launch(config, trainer)(1, "two")`` runs ``trainer(1, "two")`` in each worker and returns the return values by
    global rank. ``elastic_launch(config, "python")("train.py")`` runs a program.

    Args:
        config: configuration of the job.
        entrypoint: a function, or the path of a program.
        health_check_server: a started server that reports the agent's health. The agent stops it.
    """

    def __init__(
        self,
        config: LaunchConfig,
        entrypoint: Callable[..., Any] | str | None,
        health_check_server: HealthCheckServer | None = None,
    ) -> None:
        self._config = config
        self._entrypoint = entrypoint
        self._health_check_server = health_check_server

    def __call__(self, *args: Any) -> dict[int, Any]:
        """Launch the entrypoint with these arguments. See :func:`launch_agent` for the return value and the exceptions."""
        return launch_agent(
            self._config,
            self._entrypoint,
            list(args),
            health_check_server=self._health_check_server,
        )


def _get_entrypoint_name(entrypoint: Callable[..., Any] | str | None, args: list[Any]) -> str:
    """Return the name for reports: of the function, of the script that this interpreter runs, or of the program."""
    return launched_name(entrypoint, args)


def _get_addr_and_port(rdzv_parameters: RendezvousParameters) -> tuple[str | None, int | None]:
    """Return the master's address and port of a static rendezvous. Other backends determine them during the rendezvous.

    Raises:
        ValueError: a static rendezvous has no endpoint, or an endpoint without a port.
    """
    if rdzv_parameters.backend != "static":
        return None, None
    endpoint = rdzv_parameters.endpoint.strip()
    if not endpoint:
        raise ValueError("the static rendezvous has no endpoint; give --master-addr and --master-port")
    address, port = parse_rendezvous_endpoint(endpoint, default_port=-1)
    if port == -1:
        raise ValueError(f"the endpoint {endpoint!r} has no port; give --master-port")
    return address, port


def launch_agent(
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str | None,
    args: list[Any],
    health_check_server: HealthCheckServer | None = None,
) -> dict[int, Any]:
    """Run an agent in this process until its workers have ended.

    Mirrors ``torch.distributed.launcher.api.launch_agent``.

    Args:
        config: configuration of the job.
        entrypoint: a function, or the path of a program.
        args: arguments of the entrypoint.
        health_check_server: a started server that reports the agent's health. The agent stops it.

    Returns:
        Return values of the workers of this node, by global rank. Empty for a program.

    Raises:
        ChildFailedError: workers failed and no restart was left.
        SignalException: this process received a terminating signal. The workers were stopped.
        RuntimeError: the agent gave up because workers were stuck, and none of them had failed.
        ValueError: the configuration is invalid.
        TypeError: a value of the configuration has the wrong type.
    """
    _check_types(config)
    check_iterable("args", args, "a list of arguments")
    if not config.run_id:
        import uuid

        config.run_id = str(uuid.uuid4().int)
        logger.warning("config has no run_id, generated a random run_id: %s", config.run_id)

    entrypoint_name = _get_entrypoint_name(entrypoint, args)
    _log_config(config, entrypoint_name)

    rdzv_parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    names = newer(config, "signals_to_handle", DEFAULT_SIGNALS)
    # For code that installs its own handlers when it starts workers.
    os.environ[SIGNALS_ENV] = names
    with _signals.Handling(names, forward=newer(config, "signals_to_forward", "")):
        try:
            return _launch(config, entrypoint, args, rdzv_parameters, entrypoint_name, health_check_server)
        finally:
            event_handlers.finish()


def _launch(
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str | None,
    args: list[Any],
    rdzv_parameters: RendezvousParameters,
    entrypoint_name: str,
    health_check_server: HealthCheckServer | None,
) -> dict[int, Any]:
    master_addr, master_port = _get_addr_and_port(rdzv_parameters)
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(args),
        rdzv_handler=rdzv_registry.get_rendezvous_handler(rdzv_parameters),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=master_addr,
        master_port=master_port,
        local_addr=config.local_addr,
        event_log_handler=event_log_handler_of(config),
        numa_options=newer(config, "numa_options", None),
        duplicate_stdout_filters=newer(config, "duplicate_stdout_filters", None),
        duplicate_stderr_filters=newer(config, "duplicate_stderr_filters", None),
        virtual_local_rank=newer(config, "virtual_local_rank", False),
        **_warm_settings(config),
        **_restart_settings(config),
    )
    # Only if set: a class that replaces the agent may have torch's parameters.
    added = {
        name: newer(config, name, default)
        for name, default in (("interactive_rank", None), ("grace_signal_target", "group"), ("log_options", None))
        if newer(config, name, default) != default
    }
    agent = LocalElasticAgent(
        spec=spec,
        logs_specs=config.logs_specs,  # type: ignore[arg-type]  # __post_init__ has set it
        start_method=config.start_method,
        log_line_prefix_template=config.log_line_prefix_template,
        exit_barrier_timeout=exit_barrier_timeout_s(newer(config, "exit_barrier_timeout", None)),
        shutdown_timeout=shutdown_timeout_s(newer(config, "shutdown_timeout", None)),
        health_check_server=health_check_server,
        **added,
    )
    if health_check_server is not None:
        # A server that was started before the agent was created has a proxy as callback, ours or torch's.
        set_delegate = newer(health_check_server.alive_callback, "set_delegate", None)
        if set_delegate is not None:
            set_delegate(agent._get_alive_time)  # noqa: SLF001 - as torch's proxy is wired
    return _run_agent(agent, spec, config, entrypoint_name)


def _run_agent(
    agent: LocalElasticAgent, spec: WorkerSpec, config: LaunchConfig, entrypoint_name: str
) -> dict[int, Any]:
    shutdown_rdzv = True
    try:
        return _outputs(agent, config, entrypoint_name)
    except family(ChildFailedError):
        raise
    except family(SignalException) as error:
        # A shutdown of the rendezvous would close it for the other nodes too, which may continue without this one.
        shutdown_rdzv = False
        notifier = notifier_of(spec.rdzv_handler)
        if notifier is not None:
            notifier.leave(f"its agent was ended by {error.sigval.name}", exit_code(-error.sigval))
        events.record(agent.get_event_failed(), event_log_handler_of(config))
        raise
    except Exception:
        events.record(agent.get_event_failed(), event_log_handler_of(config))
        raise
    finally:
        if shutdown_rdzv:
            _shut_down(spec.rdzv_handler)


def _shut_down(handler: Any) -> None:
    """Shut a rendezvous handler down. Its exception is logged, because it would replace the exception or the result of the job."""
    try:
        handler.shutdown()
    except family(SignalException):
        raise
    except Exception:
        logger.exception("Error shutting down rendezvous handler")


def _outputs(agent: LocalElasticAgent, config: LaunchConfig, entrypoint_name: str) -> dict[int, Any]:
    metrics.initialize_metrics(metrics.MetricsConfig(config.metrics_cfg))
    result = agent.run()
    # The event is about the agent, which succeeded even if its workers failed.
    events.record(agent.get_event_succeeded(), event_log_handler_of(config))
    if result.is_failed():
        error = _failure_of(result, entrypoint_name)
        # If workers of several nodes fail, all nodes exit with the code of the first one.
        error.exit_code = newer(agent, "job_exit_code", None)  # type: ignore[attr-defined]  # for ferrorun
        error.job_failure = newer(agent, "job_failure", None)  # type: ignore[attr-defined]  # for the report of ferrorun
        raise error
    return result.return_values


def _failure_of(result: RunResult, entrypoint_name: str) -> Exception:
    if result.failures:
        return ChildFailedError(name=entrypoint_name, failures=result.failures)
    return RuntimeError(
        f"the workers of {entrypoint_name!r} ended in state {result.state.value} and none failed by itself; "
        "LOGLEVEL=INFO shows which ones were stuck"
    )


def _log_config(config: LaunchConfig, entrypoint_name: str) -> None:
    values = {
        "entrypoint": entrypoint_name,
        "min_nodes": config.min_nodes,
        "max_nodes": config.max_nodes,
        "nproc_per_node": config.nproc_per_node,
        "run_id": config.run_id,
        "rdzv_backend": config.rdzv_backend,
        "rdzv_endpoint": config.rdzv_endpoint,
        "rdzv_configs": config.rdzv_configs,
        "max_restarts": config.max_restarts,
        "monitor_interval": config.monitor_interval,
        "log_dir": getattr(config.logs_specs, "root_log_dir", None),
        "metrics_cfg": config.metrics_cfg,
        "event_log_handler": event_log_handler_of(config),
        "numa_options": newer(config, "numa_options", None),
        "signals_to_handle": newer(config, "signals_to_handle", DEFAULT_SIGNALS),
        "signals_to_forward": newer(config, "signals_to_forward", ""),
        "interactive_rank": newer(config, "interactive_rank", None),
        "exit_barrier_timeout": newer(config, "exit_barrier_timeout", None),
        "grace_signal_target": newer(config, "grace_signal_target", "group"),
        "duplicate_stdout_filters": newer(config, "duplicate_stdout_filters", None),
        "duplicate_stderr_filters": newer(config, "duplicate_stderr_filters", None),
    }
    lines = "\n".join(f"  {name:<24} : {value}" for name, value in values.items())
    logger.info("starting the agent with this configuration:\n%s", lines)
    # Reading the version takes milliseconds, so it is read only for a message that is shown.
    if logger.isEnabledFor(logging.INFO) and (_torch.installed_version() or ()) > _torch.NEWEST_VERSION:
        logger.info(
            "torch %d.%d is newer than %d.%d, the newest version that ferroelastic was tested with; the job uses it all the same",
            *(*(_torch.installed_version() or ()), *_torch.NEWEST_VERSION),
        )
