"""Finds the CPUs near a GPU in sysfs."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path


class Topology:
    """CPUs, caches, sockets and NUMA nodes of a host.

    Args:
        allowed: logical CPUs that workers may use.
        sysfs: root of sysfs; tests pass a fake tree.
    """

    def __init__(self, allowed: AbstractSet[int], sysfs: Path = Path("/sys")) -> None:
        self._allowed = allowed
        self._sysfs = sysfs

    def cpus_near(self, gpu: int, pci_addresses: Sequence[str], mode: str) -> list[int]:
        """Return the CPUs for the worker of one GPU.

        Args:
            gpu: index of the GPU.
            pci_addresses: PCI addresses of all visible GPUs, by index.
            mode: a value of ``AffinityMode``.

        Returns:
            Logical CPUs in ascending order, at least one.

        Raises:
            RuntimeError: the GPU or its CPUs cannot be found.
            ValueError: the mode is unknown.
        """
        if gpu >= len(pci_addresses):
            raise RuntimeError(
                f"it needs GPU {gpu}, but only {len(pci_addresses)} are visible; start at most one worker per GPU"
            )
        node = self._node_of_gpu(gpu, pci_addresses)
        if mode == "node":
            cpus = self._cpus_of_node(node)
        elif mode == "socket":
            cpus = self._cpus_of_socket(node)
        elif mode == "exclusive":
            cpus = self._exclusive_cores(node, *self._index_on_node(gpu, node, pci_addresses))
        elif mode == "core-complex":
            index, _ = self._index_on_node(gpu, node, pci_addresses)
            cpus = self._core_complex(node, index)
        else:
            raise ValueError(f"unknown affinity mode {mode!r}; use node, socket, exclusive or core-complex")
        return sorted(self._require_cpus(cpus, node))

    def _node_of_gpu(self, gpu: int, pci_addresses: Sequence[str]) -> int:
        address = pci_addresses[gpu]
        if not address:
            raise RuntimeError(f"the driver does not report the PCI address of GPU {gpu}")
        text = self._read(f"bus/pci/devices/{address}/numa_node", f"the NUMA node of GPU {gpu} ({address})")
        # The kernel reports -1 on a machine with one node.
        return max(int(text), 0)

    def _index_on_node(self, gpu: int, node: int, pci_addresses: Sequence[str]) -> tuple[int, int]:
        """Return the index of a GPU among the GPUs of its node, and the number of GPUs of the node."""
        peers = [i for i in range(len(pci_addresses)) if self._node_of_gpu(i, pci_addresses) == node]
        return peers.index(gpu), len(peers)

    def _all_cpus_of_node(self, node: int) -> set[int]:
        return parse_ranges(self._read(f"devices/system/node/node{node}/cpulist", f"the CPUs of NUMA node {node}"))

    def _cpus_of_node(self, node: int) -> set[int]:
        return self._all_cpus_of_node(node) & self._allowed

    def _cpus_of_socket(self, node: int) -> set[int]:
        socket = self._socket_of_node(node)
        cpus: set[int] = set()
        for other in parse_ranges(self._read("devices/system/node/possible", "the NUMA nodes")):
            # A possible node may be absent (hot-plug), or have no CPUs (memory of a GPU).
            if (self._sysfs / f"devices/system/node/node{other}").exists() and self._socket_of_node(other) == socket:
                cpus |= self._cpus_of_node(other)
        return cpus

    def _socket_of_node(self, node: int) -> int | None:
        cpus = self._all_cpus_of_node(node)
        if not cpus:
            return None
        # Prefer an allowed CPU, because an offline CPU has no topology.
        cpu = min(cpus & self._allowed or cpus)
        return int(self._read(f"devices/system/cpu/cpu{cpu}/topology/physical_package_id", f"the socket of CPU {cpu}"))

    def _exclusive_cores(self, node: int, index: int, gpu_count: int) -> set[int]:
        cores = self._group_cpus(node, self._thread_siblings)
        per_gpu, extra = divmod(len(cores), gpu_count)
        if per_gpu < 1:
            raise RuntimeError(
                f"NUMA node {node} has {len(cores)} usable cores for {gpu_count} GPUs; "
                "give the job more CPUs, or use --numa-binding=node"
            )
        # The first GPUs get one of the remaining cores each.
        start = index * per_gpu + min(index, extra)
        chosen = [cores[first] for first in sorted(cores)][start : start + per_gpu + (index < extra)]
        return set().union(*chosen)

    def _core_complex(self, node: int, index: int) -> set[int]:
        complexes = self._group_cpus(node, self._cache_siblings)
        # The largest first: complexes with fewer usable CPUs are assigned last.
        order = sorted(complexes, key=lambda first: (-len(complexes[first]), first))
        return complexes[order[index % len(order)]]

    def _group_cpus(self, node: int, siblings: Callable[[int], set[int]]) -> dict[int, set[int]]:
        """Group the usable CPUs of a node by siblings. The key is the lowest sibling."""
        groups: dict[int, set[int]] = {}
        for cpu in self._require_cpus(self._cpus_of_node(node), node):
            groups.setdefault(min(siblings(cpu)), set()).add(cpu)
        return groups

    def _thread_siblings(self, cpu: int) -> set[int]:
        return parse_ranges(
            self._read(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"the core of CPU {cpu}")
        )

    def _cache_siblings(self, cpu: int) -> set[int]:
        """Return the CPUs that share the last-level cache of a CPU."""
        highest, siblings = -1, set[int]()
        for cache in sorted((self._sysfs / f"devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")):
            if (cache / "type").read_text().strip() not in {"Unified", "Data"}:
                continue
            level = int((cache / "level").read_text())
            if level > highest:
                highest, siblings = level, parse_ranges((cache / "shared_cpu_list").read_text())
        if not siblings:
            raise RuntimeError(f"the kernel does not report the caches of CPU {cpu}; use --numa-binding=node")
        return siblings

    def _require_cpus(self, cpus: set[int], node: int) -> set[int]:
        if not cpus:
            raise RuntimeError(
                f"no CPU near NUMA node {node} is usable; "
                "allow the job to use these CPUs (cpuset, taskset), or run without NUMA binding"
            )
        return cpus

    def _read(self, path: str, what: str) -> str:
        try:
            return (self._sysfs / path).read_text().strip()
        except OSError as error:
            raise RuntimeError(f"failed to read {what}: {error.strerror}: {error.filename}") from error


def parse_ranges(text: str) -> set[int]:
    """Parse the kernel's list format of CPUs or nodes: ``"0-2,5"`` is ``{0, 1, 2, 5}``."""
    numbers: set[int] = set()
    for part in text.split(","):
        if part.strip():
            first, _, last = part.strip().partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers
