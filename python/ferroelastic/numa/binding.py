"""Binds each worker to the CPUs near its GPU. Mirrors ``torch.numa.binding``.

Intended differences:

* Only sysfs and ``sched_setaffinity(2)`` are used. The program ``numactl`` and CUDA are not needed.
* In ``socket`` mode, NUMA nodes without usable CPUs are skipped. torch fails.
* An error names the value that cannot be read, and a remedy.

On a host without GPUs of NVIDIA and AMD, the devices are the accelerators that sysfs shows.

Worker ``n`` must use visible GPU ``n`` in PCI order (``CUDA_DEVICE_ORDER=PCI_BUS_ID``). On a host with GPUs of several models, CUDA's
default order may differ: set that variable there.
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
    """The set of CPUs for a worker. Mirrors ``torch.numa.binding.AffinityMode``."""

    NODE = "node"
    """All CPUs of the GPU's NUMA node. The recommended mode."""
    SOCKET = "socket"
    """All CPUs of all NUMA nodes of the GPU's socket."""
    EXCLUSIVE = "exclusive"
    """Whole cores of the GPU's NUMA node, divided evenly among the GPUs of that node. GPUs do not share cores."""
    CORE_COMPLEX = "core-complex"
    """The cores of one last-level cache on the GPU's NUMA node. GPUs share a cache only if there are more GPUs than caches."""


@dataclass(frozen=True)
class NumaOptions:
    """Options of the NUMA binding. Mirrors ``torch.numa.binding.NumaOptions``. Functions of this package also accept torch's class.

    Args:
        affinity_mode: set of CPUs for a worker.
        should_fall_back_if_binding_fails: if the CPUs cannot be found, start the worker without binding and log a warning.
    """

    affinity_mode: AffinityMode
    should_fall_back_if_binding_fails: bool = False


def cpus_for_worker(local_rank: int, options: NumaOptions | None) -> list[int] | None:
    """Return the logical CPUs for a worker. Only CPUs in the affinity mask of the calling thread are used. Not in torch.

    Args:
        local_rank: local rank of the worker, also the index of its GPU.
        options: options of the binding; ``None`` for no binding.

    Returns:
        The CPUs in ascending order; ``None`` for no binding.

    Raises:
        RuntimeError: no CPUs were found, and ``options.should_fall_back_if_binding_fails`` is not set.
    """
    if options is None:
        return None
    try:
        return _find_cpus(local_rank, options)
    except (OSError, ValueError, RuntimeError) as error:
        text = f"failed to find the CPUs to bind worker {local_rank} to (--numa-binding={_mode_name(options)}): {error}"
        if not options.should_fall_back_if_binding_fails:
            raise RuntimeError(text) from error
        logger.warning("%s; the worker runs without binding", text)
        return None


def bind_current_process(local_rank: int, options: NumaOptions | None) -> None:
    """Bind the calling process to the CPUs of a worker, with ``sched_setaffinity(2)``. Not in torch.

    Threads with the same affinity mask as the calling thread are bound too. Threads with another mask keep it.

    Args:
        local_rank: see :func:`cpus_for_worker`.
        options: see :func:`cpus_for_worker`.

    Raises:
        RuntimeError: no CPUs were found or the kernel rejected them, and ``options.should_fall_back_if_binding_fails`` is not set.
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
        logger.warning("%s; the worker runs without binding", text)
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # the thread has ended
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


_cached_gpus: tuple[tuple[str | None, ...], list[Any]] | None = None


def _visible_gpus(*variables: str | None) -> list[Any]:
    """Return the visible GPUs, or other accelerators on a host without. The result is cached for all workers, because the start of NVML takes tens of milliseconds."""
    global _cached_gpus  # noqa: PLW0603 - a cache of one entry
    if _cached_gpus is None or _cached_gpus[0] != variables:
        from ferroelastic import _devices

        _cached_gpus = (variables, _devices.visible_gpus() or _devices.other_accelerators())
    return _cached_gpus[1]


def _mode_name(options: NumaOptions) -> str:
    """Return the value of the mode. ``options`` may be torch's class or have a plain string."""
    mode: Any = options.affinity_mode
    return str(mode.value if isinstance(mode, Enum) else mode)


def format_ranges(cpus: Sequence[int]) -> str:
    """Format CPUs in the kernel's list format: ``[0, 1, 2, 5]`` is ``"0-2,5"``."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and parts[-1][1] == cpu - 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
