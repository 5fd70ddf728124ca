"""Bind each worker to the CPUs near its GPU.

Mirrors ``torch.numa.binding``. Intended differences: the CPU set comes from sysfs and ``sched_setaffinity(2)`` alone,
so that neither the ``numactl`` program nor CUDA is needed; in ``socket`` mode NUMA nodes without usable CPUs are
skipped where torch fails; errors say what could not be read and what to do.

Worker ``n`` is taken to use GPU ``n`` of the visible ones, in PCI order (``CUDA_DEVICE_ORDER=PCI_BUS_ID``). On a
host with GPUs of several models CUDA's default order may differ; set that variable there.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ferroelastic.utils.logging import get_logger

__all__ = ["AffinityMode", "NumaOptions", "bind_current_process", "cpus_for_worker"]

logger = get_logger(__name__)


class AffinityMode(str, Enum):
    """Which CPUs a worker gets. Mirrors ``torch.numa.binding.AffinityMode``."""

    NODE = "node"
    """All CPUs of its GPU's NUMA node. The one to take if in doubt."""
    SOCKET = "socket"
    """All CPUs of all NUMA nodes of its GPU's socket."""
    EXCLUSIVE = "exclusive"
    """Whole cores of its GPU's NUMA node, shared out evenly among the GPUs of that node; no core has two owners."""
    CORE_COMPLEX = "core-complex"
    """The cores behind one last-level cache of its GPU's NUMA node, another for each GPU while there are enough."""


@dataclass(frozen=True)
class NumaOptions:
    """How to bind. Mirrors ``torch.numa.binding.NumaOptions``; wherever one is taken, torch's will do.

    Args:
        affinity_mode: which CPUs a worker gets.
        should_fall_back_if_binding_fails: start the worker unbound, with a warning, if its CPUs cannot be found.
    """

    affinity_mode: AffinityMode
    should_fall_back_if_binding_fails: bool = False


def cpus_for_worker(local_rank: int, options: NumaOptions | None) -> list[int] | None:
    """Return the logical CPUs to bind a worker to, in ascending order.

    Only CPUs that the calling thread may run on itself are considered.

    Args:
        local_rank: local rank of the worker, and the index of its GPU.
        options: how to bind; ``None`` not at all.

    Returns:
        The CPUs, or ``None`` for no binding.

    Raises:
        RuntimeError: no CPUs were found, and ``options`` does not ask to fall back.
    """
    if options is None:
        return None
    try:
        return _find_cpus(local_rank, options)
    except (OSError, ValueError, RuntimeError) as error:
        text = f"failed to find the CPUs to bind worker {local_rank} to (--numa-binding={_mode_name(options)}): {error}"
        if not options.should_fall_back_if_binding_fails:
            raise RuntimeError(text) from error
        logger.warning("%s; it runs unbound", text)
        return None


def bind_current_process(local_rank: int, options: NumaOptions | None) -> None:
    """Bind the calling process to the CPUs of a worker.

    All threads are bound whose CPUs are those of the calling thread; one that chose its own keeps them.

    Args:
        local_rank: as in :func:`cpus_for_worker`.
        options: as in :func:`cpus_for_worker`.

    Raises:
        RuntimeError: no CPUs were found, or the kernel refused them, and ``options`` does not ask to fall back.
    """
    cpus = cpus_for_worker(local_rank, options)
    if cpus is None or options is None:
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        text = f"failed to bind worker {local_rank} to CPUs {format_ranges(cpus)}: {error.strerror}"
        if not options.should_fall_back_if_binding_fails:
            raise RuntimeError(text) from error
        logger.warning("%s; it runs unbound", text)
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.sched_getaffinity(int(thread)) == before:
                os.sched_setaffinity(int(thread), cpus)


def _find_cpus(local_rank: int, options: NumaOptions) -> list[int]:
    from ferroelastic import _devices
    from ferroelastic.numa import _topology

    gpus = _visible_gpus(*(os.environ.get(name) for name in _devices.VISIBILITY_VARIABLES))
    topology = _topology.Topology(allowed=frozenset(os.sched_getaffinity(0)))
    cpus = topology.cpus_near(local_rank, [gpu.pci_address for gpu in gpus], _mode_name(options))
    logger.info(
        "worker %d is bound to CPUs %s, near GPU %s", local_rank, format_ranges(cpus), gpus[local_rank].pci_address
    )
    return cpus


_gpus_seen: tuple[tuple[str | None, ...], list[Any]] | None = None


def _visible_gpus(*variables: str | None) -> list[Any]:
    """Return the visible GPUs, asked once: starting NVML takes tens of milliseconds, and each worker of a host asks."""
    global _gpus_seen  # noqa: PLW0603 - a cache of one entry
    if _gpus_seen is None or _gpus_seen[0] != variables:
        from ferroelastic import _devices

        _gpus_seen = (variables, _devices.visible_gpus())
    return _gpus_seen[1]


def _mode_name(options: NumaOptions) -> str:
    """Return the mode's value; ``options`` may be torch's, or hold a plain string."""
    mode: Any = options.affinity_mode
    return str(mode.value if isinstance(mode, Enum) else mode)


def format_ranges(cpus: Sequence[int]) -> str:
    """Format CPUs as the kernel does: ``[0, 1, 2, 5]`` is ``"0-2,5"``."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and parts[-1][1] == cpu - 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
