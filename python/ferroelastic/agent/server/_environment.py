"""Environment variables of workers, and the prefix of their lines on the console."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ferroelastic import _torch
from ferroelastic._checks import check_type
from ferroelastic._compat import newer
from ferroelastic.multiprocessing._line_heads import MACROS, prefix_of, unknown_macros
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from ferroelastic.agent.server._workers import Worker, WorkerGroup, WorkerSpec

__all__ = ["checked_template", "log_line_prefixes", "set_local_rank", "worker_environment"]

logger = get_logger(__name__)

_INHERITED = "OMP_NUM_THREADS"


def worker_environment(worker_group: WorkerGroup, worker: Worker, restart_count: int) -> dict[str, str]:
    """Return the variables of one worker except those of :func:`set_local_rank`.

    Args:
        worker_group: the workers of this node, after a rendezvous.
        worker: the worker.
        restart_count: number of restarts so far.
    """
    spec = worker_group.spec
    env = {
        "RANK": str(worker.global_rank),
        "GROUP_RANK": str(worker_group.group_rank),
        "ROLE_RANK": str(worker.role_rank),
        "ROLE_NAME": spec.role,
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
        "WORLD_SIZE": str(worker.world_size),
        "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
        "ROLE_WORLD_SIZE": str(worker.role_world_size),
        "MASTER_ADDR": str(worker_group.master_addr),
        "MASTER_PORT": str(worker_group.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
        "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
    if _INHERITED in os.environ:
        env[_INHERITED] = os.environ[_INHERITED]
    return env


def set_local_rank(env: dict[str, str], local_rank: int, spec: WorkerSpec) -> None:
    """Set ``LOCAL_RANK`` and the variables that select the visible devices.

    With ``spec.virtual_local_rank`` a worker sees only its own device, as device 0, and has ``LOCAL_RANK`` 0. The agent's devices are those
    of ``HIP_VISIBLE_DEVICES`` (ROCm), if it is set, else those of ``CUDA_VISIBLE_DEVICES``. The worker gets both variables in the first
    case. torch before 2.15 ignores ``HIP_VISIBLE_DEVICES``, and so does this function if such a version is installed.

    Args:
        env: variables of the worker, changed in place.
        local_rank: rank of the worker on this node.
        spec: specification of the worker, of this package's or of torch's class.

    Raises:
        ValueError: the variable of the agent has no device for this rank.
    """
    variable = "CUDA_VISIBLE_DEVICES"
    visible = os.environ.get(variable)
    if not newer(spec, "virtual_local_rank", False):
        env["LOCAL_RANK"] = str(local_rank)
        if visible is not None:
            env[variable] = visible
        return
    env["LOCAL_RANK"] = "0"
    hip = os.environ.get("HIP_VISIBLE_DEVICES")
    if hip and not _torch.is_older_than(2, 15):
        variable, visible = "HIP_VISIBLE_DEVICES", hip
    devices = [str(local_rank)] if visible is None else visible.split(",")
    position = 0 if visible is None else local_rank
    if position >= len(devices):
        raise ValueError(f"local_rank {local_rank} exceeds available GPUs in {variable}={visible}")
    env[variable] = env["CUDA_VISIBLE_DEVICES"] = devices[position].strip()


def log_line_prefixes(template: str | None, worker_group: WorkerGroup, restarts: int) -> dict[int, str] | None:
    """Return the prefixes of the workers' lines on the console by local rank; ``None`` without a template.

    Args:
        template: text with the macros of :class:`ferroelastic.agent.server.LocalElasticAgent`.
        worker_group: the workers.
        restarts: number of restarts after failures.
    """
    if not template:
        return None
    return {
        worker.local_rank: prefix_of(template, worker_group.spec.role, worker.global_rank, worker.local_rank, restarts)
        for worker in worker_group.workers
    }


def checked_template(template: str | None) -> str | None:
    """Check a prefix template. Parts that look like a macro and are none are logged. They stay unchanged, as in torch.

    Raises:
        TypeError: it is neither a string nor ``None``.
    """
    check_type("log_line_prefix_template", template, (str, type(None)), "a string or None")
    unknown = unknown_macros(template) if template else []
    if unknown:
        logger.warning(
            "the prefix template of log lines has unknown macros, which stay unchanged: %s; the macros are %s",
            ", ".join(unknown),
            ", ".join(f"${{{name}}}" for name in MACROS),
        )
    return template
