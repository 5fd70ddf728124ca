"""Environment variables, for the page of the reference. A test compares the names with the reads in the sources."""

from typing import NamedTuple

__all__ = ["GROUPS", "VARIABLES", "WORKER_VARIABLES", "Variable"]


class Variable(NamedTuple):
    """One environment variable."""

    name: str
    """Its name."""
    group: str
    """A key of :data:`GROUPS`."""
    meaning: str
    """The effect, in Markdown. With the unit of a number."""
    default: str = ""
    """The value that an unset variable stands for, in Markdown. Empty if an unset variable has no effect."""


GROUPS: dict[str, str] = {
    "run": "The run",
    "workers": "Workers and their restarts",
    "logs": "Logs and errors",
    "watchdog": "Watchdog",
    "health": "Health checks",
    "devices": "Devices and threads",
    "system": "System and Python",
}

_SEE_NCCL = "Handed on to the workers. NCCL in torch reads it"

VARIABLES: tuple[Variable, ...] = (
    Variable(
        "PET_*",
        "run",
        "Each option of `ferrorun` has a variable. Its name is `PET_` and the name of the option in upper case, with underscores. "
        "The [command line reference](command-line.md) lists them. The command line wins over the variable.",
    ),
    Variable(
        "FERROELASTIC_RUN",
        "run",
        "Marks the processes of a run. `ferrorun` sets it and finds detached helper processes by it. An inner `ferrorun` adds its own mark. "
        "Do not set it. `--keep-detached` lets helpers outlive the run.",
    ),
    Variable(
        "FERROELASTIC_EXEC",
        "run",
        "The interpreter of `ferrorun --exec`, which sets it for [the program](../programs.md). Without it the hook in `PYTHONPATH` has no effect. "
        "Workers do not have it.",
    ),
    Variable(
        "FERROELASTIC_CGROUP",
        "run",
        "`0`: make no cgroup for the workers. Detached helpers are found by their session and by `FERROELASTIC_RUN` only.",
        "`1`",
    ),
    Variable(
        "FERROELASTIC_FORK_SERVER_IMPORTS",
        "workers",
        "The agent passes `--warm-imports` to its fork server with it, and the fork server removes it. Do not set it.",
    ),
    Variable(
        "FERROELASTIC_WARM_TIMEOUT_S",
        "workers",
        "Timeout of the imports of warm workers in seconds. After it the zygote is killed, and workers start without warm imports.",
        "`300`",
    ),
    Variable(
        "FERROELASTIC_PIDFD",
        "run",
        "`0`: use no pidfds. The engine behaves as on a kernel or container runtime without them.",
        "`1`",
    ),
    Variable(
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        "run",
        "`1`: the workers get a store of their own, apart from the rendezvous. As in torch.",
        "`0`",
    ),
    Variable(
        "TORCHELASTIC_SIGNALS_TO_HANDLE",
        "run",
        "Signals that end the job, separated by commas. `ferrorun` sets it from `--signals-to-handle`. It takes effect in programs that embed the agent.",
        "`SIGTERM,SIGINT,SIGHUP,SIGQUIT`",
    ),
    Variable(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        "workers",
        "Grace period in whole seconds between the signal to end and SIGKILL. `--shutdown-timeout` wins over it.",
        "`30`",
    ),
    Variable(
        "TORCH_ELASTIC_WORKER_IDENTICAL",
        "workers",
        "`1`: all nodes have the same number of workers, and an agent computes its ranks without the numbers of the others. As in torch. "
        "It takes effect with rendezvous handlers of torch (etcd, plug-ins).",
        "`0`",
    ),
    Variable(
        "TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT",
        "workers",
        "Seconds that a worker may be in uninterruptible sleep (state D). After them the worker counts as failed and the job is not restarted. `0` sets no limit.",
        "`0`",
    ),
    Variable(
        "TORCH_MP_PARALLEL_START",
        "workers",
        "`1`: function workers of the start method `forkserver` are started in parallel. As in torch.",
        "`0`",
    ),
    Variable("PYTHON_EXEC", "workers", "Python interpreter of the workers.", "the interpreter of `ferrorun`"),
    Variable(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "workers",
        f"{_SEE_NCCL}.",
        "`1`",
    ),
    Variable(
        "LOGLEVEL",
        "logs",
        "Level of the log of `ferrorun`: `DEBUG`, `INFO`, `WARNING`, `ERROR` in any case, or a number. `DEBUG` shows tracebacks of `ferrorun` itself.",
        "`WARNING`",
    ),
    Variable(
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE",
        "logs",
        "Prefix of teed lines. `${role_name}`, `${rank}` and `${local_rank}` are replaced.",
        "`[${role_name}${rank}]:`",
    ),
    Variable(
        "TORCHELASTIC_ERROR_FILE",
        "logs",
        "File that a worker writes its exception to. The agent sets it for each worker. An outer launcher may set it for `ferrorun`, which hands the first failure on.",
    ),
    Variable(
        "TORCHELASTIC_ENABLE_FILE_TIMER",
        "watchdog",
        "`1`: the agent serves the [watchdog](../watchdog.md).",
        "off",
    ),
    Variable(
        "TORCHELASTIC_TIMER_FILE",
        "watchdog",
        "Path of the named pipe of the watchdog. The agent chooses one if it is not set, and sets it for the workers.",
    ),
    Variable(
        "FERROELASTIC_EVIDENCE_S",
        "watchdog",
        "Seconds that the watchdog may gather evidence before it ends a worker. `0` gathers none.",
        "`2`",
    ),
    Variable(
        "TORCHELASTIC_HEALTH_CHECK_PORT",
        "health",
        "Port of the [health checks](../health.md). Without it none are answered.",
    ),
    Variable(
        "TORCHELASTIC_HEALTH_CHECK_HOST",
        "health",
        "Address that health checks are answered on. A kubelet needs `0.0.0.0`.",
        "`127.0.0.1`",
    ),
    Variable(
        "TORCH_WORKER_SERVER_SOCKET",
        "health",
        "Unix socket on which `ferroelastic.control_plane.worker_main` serves torch's handlers for debugging in a worker. As in torch.",
    ),
    Variable(
        "OMP_NUM_THREADS",
        "devices",
        "Handed on to the workers. With several workers on a node `ferrorun` sets it to `1` and reports that.",
    ),
    Variable(
        "CUDA_VISIBLE_DEVICES",
        "devices",
        "GPUs that count for `--nproc-per-node=gpu`, `--numa-binding` and `--virtual-local-rank`. Handed on to the workers.",
        "all GPUs",
    ),
    Variable(
        "HIP_VISIBLE_DEVICES",
        "devices",
        "The same for AMD GPUs. `CUDA_VISIBLE_DEVICES` counts where it is not set.",
        "all GPUs",
    ),
    Variable(
        "ROCR_VISIBLE_DEVICES",
        "devices",
        "The same for AMD GPUs, one level below: the other variables count among the GPUs that it leaves.",
        "all GPUs",
    ),
    Variable(
        "VIRTUAL_ENV",
        "system",
        "An active virtual environment. `ferrorun` warns if it is not the environment of the workers' interpreter.",
    ),
    Variable("CONDA_PREFIX", "system", "The same for an active conda environment."),
    Variable(
        "PATH",
        "system",
        "`ferrorun --exec` puts a folder with a `torchrun` first, and the agent removes the folder for its workers.",
    ),
    Variable(
        "PYTHONPATH",
        "system",
        "The same with a folder that has the hook of `ferrorun --exec`. The zygote of warm workers has another one.",
    ),
    Variable("PWD", "system", "Names the working directory in the message that it was deleted."),
    Variable(
        "TMPDIR",
        "system",
        "Folder for log folders without `--log-dir`, and for the named pipe of the watchdog.",
        "`/tmp`",
    ),
)

WORKER_VARIABLES: tuple[tuple[str, str], ...] = (
    ("RANK", "Rank of the worker in the job, from 0."),
    ("LOCAL_RANK", "Rank of the worker on its node, from 0. Always `0` with `--virtual-local-rank`."),
    ("WORLD_SIZE", "Number of workers of the job."),
    ("LOCAL_WORLD_SIZE", "Number of workers of the node."),
    ("GROUP_RANK", "Rank of the node, from 0."),
    ("GROUP_WORLD_SIZE", "Number of nodes."),
    ("ROLE_NAME", "Role of the worker (`--role`)."),
    ("ROLE_RANK", "Rank of the worker among those of its role."),
    ("ROLE_WORLD_SIZE", "Number of workers of its role."),
    ("MASTER_ADDR", "Address of the workers' store."),
    ("MASTER_PORT", "Port of the workers' store."),
    ("TORCHELASTIC_RESTART_COUNT", "Restarts after failures so far. The same on all nodes."),
    ("TORCHELASTIC_MAX_RESTARTS", "`--max-restarts`."),
    ("TORCHELASTIC_RUN_ID", "Id of the job (`--rdzv-id`, a random one with `--standalone`)."),
    (
        "TORCHELASTIC_USE_AGENT_STORE",
        "`True` if the agents host the workers' store, so `env://` of torch connects to it.",
    ),
    ("TORCHELASTIC_ERROR_FILE", "File for the worker's exception."),
    ("TORCHELASTIC_TIMER_FILE", "Named pipe of the watchdog, if the watchdog is on."),
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "`1`, or the value of `ferrorun`'s own environment."),
    ("OMP_NUM_THREADS", "`1` if there are several workers and it was not set."),
    (
        "CUDA_VISIBLE_DEVICES",
        "The one GPU of the worker with `--virtual-local-rank`. Otherwise the value of `ferrorun`'s own environment.",
    ),
    ("FERROELASTIC_RUN", "The mark of the run."),
)
