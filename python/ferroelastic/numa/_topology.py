"""Which CPUs lie near which GPU, as the kernel's sysfs tells it."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path


class Topology:
    """CPUs, caches, sockets and NUMA nodes of a host.

    Args:
        allowed: logical CPUs that may be used.
        sysfs: where sysfs is; tests put a fake tree here.
    """

    def __init__(self, allowed: AbstractSet[int], sysfs: Path = Path("/sys")) -> None:
        self._allowed = allowed
        self._sysfs = sysfs

    def cpus_near(self, gpu: int, pci_addresses: Sequence[str], mode: str) -> list[int]:
        """Return the CPUs for the worker that uses one GPU.

        Args:
            gpu: index of the GPU.
            pci_addresses: of all visible GPUs, by index.
            mode: a value of ``AffinityMode``.

        Returns:
            Logical CPUs, ascending, at least one.

        Raises:
            RuntimeError: a GPU or its CPUs cannot be found.
            ValueError: there is no such mode.
        """
        if gpu >= len(pci_addresses):
            raise RuntimeError(
                f"it needs GPU {gpu}, but {len(pci_addresses)} are visible; start at most one worker a GPU"
            )
        node = self._node_of_gpu(gpu, pci_addresses)
        if mode == "node":
            cpus = self._cpus_of_node(node)
        elif mode == "socket":
            cpus = self._cpus_of_socket(node)
        elif mode == "exclusive":
            cpus = self._exclusive_cores(node, *self._turn(gpu, node, pci_addresses))
        elif mode == "core-complex":
            turn, _ = self._turn(gpu, node, pci_addresses)
            cpus = self._core_complex(node, turn)
        else:
            raise ValueError(f"affinity mode {mode!r} is not known; use node, socket, exclusive or core-complex")
        return sorted(self._some(cpus, node))

    def _node_of_gpu(self, gpu: int, pci_addresses: Sequence[str]) -> int:
        address = pci_addresses[gpu]
        if not address:
            raise RuntimeError(f"the driver does not tell the PCI address of GPU {gpu}")
        text = self._read(f"bus/pci/devices/{address}/numa_node", f"the NUMA node of GPU {gpu} ({address})")
        # The kernel says -1 where there is but one node.
        return max(int(text), 0)

    def _turn(self, gpu: int, node: int, pci_addresses: Sequence[str]) -> tuple[int, int]:
        """Return a GPU's place among the GPUs of its node, and how many those are."""
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
            # A node may be possible without being there (hot-plug), and be there without CPUs (memory of a GPU).
            if (self._sysfs / f"devices/system/node/node{other}").exists() and self._socket_of_node(other) == socket:
                cpus |= self._cpus_of_node(other)
        return cpus

    def _socket_of_node(self, node: int) -> int | None:
        cpus = self._all_cpus_of_node(node)
        if not cpus:
            return None
        # An offline CPU has no topology, an allowed one has.
        cpu = min(cpus & self._allowed or cpus)
        return int(self._read(f"devices/system/cpu/cpu{cpu}/topology/physical_package_id", f"the socket of CPU {cpu}"))

    def _exclusive_cores(self, node: int, turn: int, sharers: int) -> set[int]:
        cores = self._grouped(node, self._thread_siblings)
        each, extra = divmod(len(cores), sharers)
        if each < 1:
            raise RuntimeError(
                f"NUMA node {node} has {len(cores)} usable cores for {sharers} GPUs; "
                "allow the job more CPUs or bind with --numa-binding=node"
            )
        # What does not divide evenly goes to the first GPUs, one core each.
        start = turn * each + min(turn, extra)
        mine = [cores[first] for first in sorted(cores)][start : start + each + (turn < extra)]
        return set().union(*mine)

    def _core_complex(self, node: int, turn: int) -> set[int]:
        complexes = self._grouped(node, self._cache_siblings)
        # The largest first, so that a worker gets a partly usable one last.
        order = sorted(complexes, key=lambda first: (-len(complexes[first]), first))
        return complexes[order[turn % len(order)]]

    def _grouped(self, node: int, siblings: Callable[[int], set[int]]) -> dict[int, set[int]]:
        """Group the usable CPUs of a node by what they share; the key is the lowest CPU that shares it."""
        groups: dict[int, set[int]] = {}
        for cpu in self._some(self._cpus_of_node(node), node):
            groups.setdefault(min(siblings(cpu)), set()).add(cpu)
        return groups

    def _thread_siblings(self, cpu: int) -> set[int]:
        return parse_ranges(
            self._read(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"the core of CPU {cpu}")
        )

    def _cache_siblings(self, cpu: int) -> set[int]:
        """Return the CPUs behind the same last-level cache."""
        highest, siblings = -1, set[int]()
        for cache in sorted((self._sysfs / f"devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")):
            if (cache / "type").read_text().strip() not in {"Unified", "Data"}:
                continue
            level = int((cache / "level").read_text())
            if level > highest:
                highest, siblings = level, parse_ranges((cache / "shared_cpu_list").read_text())
        if not siblings:
            raise RuntimeError(f"the kernel does not tell the caches of CPU {cpu}; bind with --numa-binding=node")
        return siblings

    def _some(self, cpus: set[int], node: int) -> set[int]:
        if not cpus:
            raise RuntimeError(
                f"none of the CPUs near NUMA node {node} is usable; "
                "allow them to the job (cpuset, taskset) or do not bind"
            )
        return cpus

    def _read(self, path: str, what: str) -> str:
        try:
            return (self._sysfs / path).read_text().strip()
        except OSError as error:
            raise RuntimeError(f"failed to read {what}: {error.strerror}: {error.filename}") from error


def parse_ranges(text: str) -> set[int]:
    """Parse a list of CPUs or nodes as the kernel writes it: ``"0-2,5"`` is ``{0, 1, 2, 5}``."""
    numbers: set[int] = set()
    for part in text.split(","):
        if part.strip():
            first, _, last = part.strip().partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers
