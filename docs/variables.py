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
    "schedulers": "Schedulers",
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
        "FERROELASTIC_EVENT_FILE",
        "logs",
        "File to which `--event-log-handler=jsonl` appends events. It is created if it is missing.",
        "`events.jsonl` in the log folder of the run",
    ),
    Variable(
        "FERROELASTIC_STOP_FILE",
        "workers",
        "File in which a worker reads the deadline of its stop, see [how a job ends](../stopping.md). The agent sets it for each worker. Do not set it.",
    ),
    Variable(
        "TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT",
        "workers",
        "Seconds that an agent waits at the end for the agents of the other nodes. `--exit-barrier-timeout` wins over it.",
        "`300`",
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
    Variable("NO_COLOR", "logs", "A value that is not empty: the report of a failed job has no colours on a terminal."),
    Variable("TERM", "logs", "`dumb`: the report of a failed job has no colours."),
    Variable(
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE",
        "logs",
        "Prefix of teed lines. `${role_name}`, `${rank}`, `${local_rank}` and `${hostname}` (the short name of this host) are replaced. "
        "`--log-line-prefix-template` wins over it.",
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
        "The same for AMD GPUs. `CUDA_VISIBLE_DEVICES` counts where it is not set. With `--virtual-local-rank` and torch 2.15, workers get both.",
        "all GPUs",
    ),
    Variable(
        "ROCR_VISIBLE_DEVICES",
        "devices",
        "The same for AMD GPUs, one level below: the other variables count among the GPUs that it leaves.",
        "all GPUs",
    ),
    Variable(
        "FERROELASTIC_JOB_END_S",
        "schedulers",
        "End of the job in seconds since 1970, for the workers. `ferrorun` sets it from `SLURM_JOB_END_TIME`, if Slurm sets that.",
    ),
    Variable(
        "SLURM_JOB_ID",
        "schedulers",
        "Number of the job: `--rdzv-id` and the port. See [schedulers](../recipes/schedulers.md).",
    ),
    Variable("SLURM_JOBID", "schedulers", "The same, in older versions of Slurm."),
    Variable(
        "SLURM_STEP_ID",
        "schedulers",
        "Number of the step: `--rdzv-id` and the port. Without it `ferrorun` runs on this node alone.",
    ),
    Variable("SLURM_STEPID", "schedulers", "The same, in older versions of Slurm."),
    Variable("SLURM_RESTART_COUNT", "schedulers", "How often the job was requeued. A part of `--rdzv-id` from 1."),
    Variable("SLURM_STEP_NUM_NODES", "schedulers", "Number of nodes of the step: `--nnodes`."),
    Variable("SLURM_NNODES", "schedulers", "The same, if `SLURM_STEP_NUM_NODES` is not set."),
    Variable(
        "SLURM_JOB_NUM_NODES",
        "schedulers",
        "The same, if both are not set. Number of nodes of the job outside of a step.",
    ),
    Variable("SLURM_NODEID", "schedulers", "Rank of this node in the step."),
    Variable("SLURM_STEP_NODELIST", "schedulers", "Nodes of the step. The first one hosts the rendezvous."),
    Variable("SLURM_JOB_NODELIST", "schedulers", "The same, if `SLURM_STEP_NODELIST` is not set."),
    Variable("SLURM_NODELIST", "schedulers", "The same, in older versions of Slurm."),
    Variable(
        "SLURMD_NODENAME",
        "schedulers",
        "Name of this node. It must be the node with the rank of this node in the list.",
    ),
    Variable("SLURM_STEP_TASKS_PER_NODE", "schedulers", "Tasks of each node. More than one is refused."),
    Variable("SLURM_TASKS_PER_NODE", "schedulers", "The same, if `SLURM_STEP_TASKS_PER_NODE` is not set."),
    Variable(
        "SLURM_STEP_RESV_PORTS",
        "schedulers",
        "Ports that `srun --resv-ports` reserved. The first one is the port of the rendezvous.",
    ),
    Variable("SLURM_GPUS_ON_NODE", "schedulers", "GPUs of the job on this node: the default of `--nproc-per-node`."),
    Variable(
        "SLURM_CPUS_ON_NODE", "schedulers", "CPUs of the job on this node, for `--nproc-per-node=cpu` and `auto`."
    ),
    Variable("SLURM_JOB_END_TIME", "schedulers", "End of the job in seconds since 1970. Slurm 22.05 does not set it."),
    Variable(
        "JOB_COMPLETION_INDEX",
        "schedulers",
        "Index of a pod in a Kubernetes Indexed Job: the rank of this node, with `--nnodes`.",
    ),
    Variable("SKYPILOT_NUM_NODES", "schedulers", "Number of nodes of a SkyPilot task: `--nnodes`."),
    Variable("SKYPILOT_NODE_RANK", "schedulers", "Rank of this node."),
    Variable("SKYPILOT_NODE_IPS", "schedulers", "Addresses of the nodes. The first one hosts the rendezvous."),
    Variable("SKYPILOT_TASK_ID", "schedulers", "Id of the task: `--rdzv-id`."),
    Variable("SKYPILOT_NUM_GPUS_PER_NODE", "schedulers", "GPUs of a node: the default of `--nproc-per-node`."),
    Variable("DSTACK_NODES_NUM", "schedulers", "Number of nodes of a dstack run: `--nnodes`."),
    Variable("DSTACK_NODE_RANK", "schedulers", "Rank of this node."),
    Variable("DSTACK_MASTER_NODE_IP", "schedulers", "Address of the node that hosts the rendezvous."),
    Variable("DSTACK_RUN_ID", "schedulers", "Id of the run: `--rdzv-id`."),
    Variable("DSTACK_RUN_NAME", "schedulers", "Name of the run: `--rdzv-id` if `DSTACK_RUN_ID` is not set."),
    Variable("DSTACK_GPUS_PER_NODE", "schedulers", "GPUs of a node: the default of `--nproc-per-node`."),
    Variable("FLUX_JOB_ID", "schedulers", "Id of a Flux job: `--rdzv-id`."),
    Variable("FLUX_JOB_NNODES", "schedulers", "Number of nodes of the job: `--nnodes`."),
    Variable("FLUX_TASK_RANK", "schedulers", "Rank of this node."),
    Variable("FLUX_JOB_SIZE", "schedulers", "Number of tasks of the job. More than one per node is refused."),
    Variable(
        "OMPI_COMM_WORLD_SIZE", "schedulers", "Number of processes of `mpirun`: `--nnodes`, in an allocation of Slurm."
    ),
    Variable("OMPI_COMM_WORLD_RANK", "schedulers", "Rank of this node."),
    Variable("PMIX_NAMESPACE", "schedulers", "Namespace of an `mpirun`: a part of `--rdzv-id`."),
    Variable(
        "OMPI_COMM_WORLD_LOCAL_SIZE", "schedulers", "Processes of `mpirun` on this node. More than one is refused."
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
    (
        "FERROELASTIC_STOP_FILE",
        "File with the deadline of a stop, empty before it. [`ferroelastic.stop_deadline()`](../stopping.md) reads it.",
    ),
    ("FERROELASTIC_JOB_END_S", "End of the job in seconds since 1970, where the scheduler tells it."),
)
