"""CPUs near GPUs, on fake hosts; the answers are held against torch's where torch is installed."""

import io
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from tests.support import torch_versions

import ferroelastic
from ferroelastic import _devices
from ferroelastic.numa import AffinityMode, NumaOptions, _topology, binding

MODES = ["node", "socket", "exclusive", "core-complex"]


class Host(NamedTuple):
    """What a fake host is made of."""

    sockets: int = 1
    nodes_per_socket: int = 1
    cores_per_node: int = 8
    threads_per_core: int = 1
    cores_per_cache: int = 8
    gpu_nodes: tuple[int, ...] = (0,)
    """NUMA node of each GPU as the kernel tells it."""
    allowed: frozenset[int] | None = None
    """CPUs that may be used; all if ``None``."""

    @property
    def nodes(self) -> int:
        return self.sockets * self.nodes_per_socket

    @property
    def cores(self) -> int:
        return self.nodes * self.cores_per_node

    @property
    def cpus(self) -> frozenset[int]:
        return self.allowed if self.allowed is not None else frozenset(range(self.cores * self.threads_per_core))

    @property
    def addresses(self) -> list[str]:
        return [f"0000:{0x10 + gpu:02x}:00.0" for gpu in range(len(self.gpu_nodes))]

    def threads_of(self, core: int) -> list[int]:
        """Return the CPUs of a core, numbered as by most firmware: first threads first."""
        return [core + thread * self.cores for thread in range(self.threads_per_core)]

    def build(self, sysfs: Path) -> Path:
        def write(path: str, text: object) -> None:
            (sysfs / path).parent.mkdir(parents=True, exist_ok=True)
            (sysfs / path).write_text(f"{text}\n")

        for node in range(self.nodes):
            cores = range(node * self.cores_per_node, (node + 1) * self.cores_per_node)
            write(
                f"devices/system/node/node{node}/cpulist", _ranges([cpu for c in cores for cpu in self.threads_of(c)])
            )
            for core in cores:
                first = core - (core - cores.start) % self.cores_per_cache
                sharers = range(first, min(first + self.cores_per_cache, cores.stop))
                for cpu in self.threads_of(core):
                    at = f"devices/system/cpu/cpu{cpu}"
                    write(f"{at}/topology/physical_package_id", node // self.nodes_per_socket)
                    write(f"{at}/topology/thread_siblings_list", _ranges(self.threads_of(core)))
                    caches = [
                        (1, "Data", self.threads_of(core)),
                        (1, "Instruction", self.threads_of(core)),
                        (2, "Unified", self.threads_of(core)),
                        (3, "Unified", [cpu for c in sharers for cpu in self.threads_of(c)]),
                        (9, "Instruction", [cpu]),
                    ]
                    for index, (level, kind, shared) in enumerate(caches):
                        write(f"{at}/cache/index{index}/level", level)
                        write(f"{at}/cache/index{index}/type", kind)
                        write(f"{at}/cache/index{index}/shared_cpu_list", _ranges(shared))
                    write(f"{at}/cache/uevent", "")
        write("devices/system/node/possible", _ranges(range(self.nodes)))
        for address, node in zip(self.addresses, self.gpu_nodes, strict=True):
            write(f"bus/pci/devices/{address}/numa_node", node)
        return sysfs


def _ranges(numbers: Any) -> str:
    return binding.format_ranges(list(numbers))


HOSTS = {
    "one node that the kernel calls -1": Host(gpu_nodes=(-1, -1)),
    "hyper-threading": Host(threads_per_core=2, cores_per_cache=4, gpu_nodes=(0, 0)),
    "two sockets": Host(sockets=2, threads_per_core=2, gpu_nodes=(0, 0, 1, 1)),
    "two nodes a socket": Host(sockets=2, nodes_per_socket=2, cores_per_cache=4, gpu_nodes=(0, 1, 2, 3)),
    "gpus in another order than nodes": Host(sockets=2, cores_per_cache=2, gpu_nodes=(1, 0, 1, 0)),
    "three gpus on two nodes": Host(sockets=2, cores_per_cache=3, gpu_nodes=(0, 1, 0)),
    "cores that do not divide": Host(cores_per_node=11, cores_per_cache=3, threads_per_core=2, gpu_nodes=(0,) * 4),
    "more gpus than caches": Host(cores_per_node=16, cores_per_cache=8, gpu_nodes=(0,) * 5),
    "restricted": Host(
        cores_per_node=16, cores_per_cache=4, gpu_nodes=(0, 0), allowed=frozenset({1, 2, 5, 6, 7, 9, 12})
    ),
    "restricted to single threads": Host(threads_per_core=2, gpu_nodes=(0, 0), allowed=frozenset({0, 1, 9, 10, 11, 7})),
    "restricted on two sockets": Host(
        sockets=2, nodes_per_socket=2, gpu_nodes=(0, 3), allowed=frozenset({0, 3, 9, 15, 16, 17, 31})
    ),
    "a gpu without cpus to itself": Host(cores_per_node=2, cores_per_cache=1, gpu_nodes=(0, 0, 0)),
    "a node without usable cpus": Host(sockets=2, gpu_nodes=(0, 1), allowed=frozenset(range(8))),
    "many": Host(
        sockets=2,
        nodes_per_socket=4,
        cores_per_node=24,
        threads_per_core=2,
        cores_per_cache=8,
        gpu_nodes=(3, 3, 1, 1, 7, 7, 5, 5),
    ),
}


def _ours(host: Host, sysfs: Path, gpu: int, mode: str) -> list[int]:
    return _topology.Topology(host.cpus, sysfs).cpus_near(gpu, host.addresses, mode)


def _torchs(host: Host, sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], set[int]]:
    """Return torch's own computation, reading the fake host."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torch.numa.binding")

    def fake(path: str) -> str:
        assert path.startswith("/sys/")
        return str(sysfs / path.removeprefix("/sys/"))

    def fake_open(path: str) -> io.TextIOBase:
        return open(fake(path), encoding="ascii")

    fake_os = SimpleNamespace(
        path=os.path,
        listdir=lambda path: [entry.name for entry in Path(fake(path)).iterdir()],
        sched_getaffinity=lambda _: set(host.cpus),
    )
    properties = [
        SimpleNamespace(pci_domain_id=0, pci_bus_id=int(address.split(":")[1], 16), pci_device_id=0)
        for address in host.addresses
    ]
    monkeypatch.setattr(theirs, "open", fake_open, raising=False)
    monkeypatch.setattr(theirs, "os", fake_os)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties[gpu])
    index = "gpu_index"
    if torch_versions.has("device-index"):
        index = "device_index"
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(properties))
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))

    def compute(gpu: int, mode: str) -> set[int]:
        cpus = theirs._get_logical_cpus_to_bind_to(
            **{index: gpu}, numa_options=theirs.NumaOptions(affinity_mode=theirs.AffinityMode(mode))
        )
        if not cpus:
            raise RuntimeError("Must bind to a non-empty set of CPU indices")
        return set(cpus)

    return compute


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HOSTS)
def test_the_cpus_are_torchs(name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = HOSTS[name]
    host.build(tmp_path)
    torchs = _torchs(host, tmp_path, monkeypatch)
    compared = 0

    for gpu in range(len(host.gpu_nodes)):
        try:
            expected = torchs(gpu, mode)
        except (RuntimeError, ValueError, ZeroDivisionError):
            continue  # torch gives up on some of these hosts: see the tests below
        assert set(_ours(host, tmp_path, gpu, mode)) == expected
        compared += 1

    assert compared or name in ("a gpu without cpus to itself", "a node without usable cpus")


def test_exclusive_shares_are_disjoint_and_whole(tmp_path: Path) -> None:
    host = HOSTS["cores that do not divide"]
    host.build(tmp_path)

    shares = [_ours(host, tmp_path, gpu, "exclusive") for gpu in range(4)]

    assert shares[0] == [0, 1, 2, 11, 12, 13]
    assert shares[3] == [9, 10, 20, 21]
    assert sorted(cpu for share in shares for cpu in share) == list(range(22))


def test_core_complexes_are_given_out_largest_first(tmp_path: Path) -> None:
    host = HOSTS["restricted"]
    host.build(tmp_path)

    assert _ours(host, tmp_path, 0, "core-complex") == [5, 6, 7]
    assert _ours(host, tmp_path, 1, "core-complex") == [1, 2]


def test_socket_skips_nodes_without_cpus(tmp_path: Path) -> None:
    host = Host(sockets=1, nodes_per_socket=2, gpu_nodes=(0,), allowed=frozenset(range(8)))
    host.build(tmp_path)
    (tmp_path / "devices/system/node/possible").write_text("0-5\n")  # 3 to 5 are not there
    (tmp_path / "devices/system/node/node2").mkdir()
    (tmp_path / "devices/system/node/node2/cpulist").write_text("\n")  # memory only

    assert _ours(host, tmp_path, 0, "socket") == list(range(8))


@pytest.mark.parametrize(
    ("host", "gpu", "mode", "text"),
    [
        (Host(gpu_nodes=(0, 0)), 2, "node", "it needs GPU 2, but only 2 are visible"),
        (HOSTS["a gpu without cpus to itself"], 1, "exclusive", "NUMA node 0 has 2 usable cores for 3 GPUs"),
        (HOSTS["a node without usable cpus"], 1, "node", "no CPU near NUMA node 1 is usable"),
        (HOSTS["a node without usable cpus"], 1, "socket", "no CPU near NUMA node 1 is usable"),
        (HOSTS["a node without usable cpus"], 1, "exclusive", "no CPU near NUMA node 1 is usable"),
        (Host(gpu_nodes=(3,)), 0, "node", "failed to read the CPUs of NUMA node 3: No such file"),
    ],
)
def test_a_failed_binding_is_reported(host: Host, gpu: int, mode: str, text: str, tmp_path: Path) -> None:
    host.build(tmp_path)

    with pytest.raises(RuntimeError, match=text):
        _ours(host, tmp_path, gpu, mode)


def test_a_kernel_without_caches_is_reported(tmp_path: Path) -> None:
    host = Host()
    host.build(tmp_path)
    for level in tmp_path.glob("devices/system/cpu/cpu0/cache/index*/type"):
        level.write_text("Instruction\n")

    with pytest.raises(RuntimeError, match="does not report the caches of CPU 0; use --numa-binding=node"):
        _ours(host, tmp_path, 0, "core-complex")


@pytest.fixture
def this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> frozenset[int]:
    """Let the package take this machine for a host of one node with two GPUs; return the CPUs of this process."""
    cpus = frozenset(os.sched_getaffinity(0))
    host = Host(cores_per_node=max(cpus) + 1, cores_per_cache=1, gpu_nodes=(0, 0))
    host.build(tmp_path)
    monkeypatch.setattr(_topology.Topology.__init__, "__defaults__", (tmp_path,))
    gpus = [_devices.Gpu("nvidia", "", address) for address in host.addresses]
    monkeypatch.setattr(_devices, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(binding, "_cached_gpus", None)
    return cpus


def test_no_options_are_no_binding() -> None:
    assert binding.cpus_for_worker(0, None) is None
    binding.bind_current_process(0, None)


@pytest.mark.parametrize("mode", [AffinityMode.NODE, "node"])
def test_cpus_for_worker(this_host: frozenset[int], mode: Any) -> None:
    assert binding.cpus_for_worker(1, NumaOptions(mode)) == sorted(this_host)


def test_any_accelerator_counts_on_a_host_without_gpus(
    this_host: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [gpu._replace(vendor="other") for gpu in _devices.visible_gpus()]
    monkeypatch.setattr(_devices, "visible_gpus", list)
    monkeypatch.setattr(_devices, "other_accelerators", lambda: devices)
    assert binding.cpus_for_worker(1, NumaOptions(AffinityMode.NODE)) == sorted(this_host)


def test_torchs_options_will_do(this_host: frozenset[int]) -> None:
    theirs = pytest.importorskip("torch.numa.binding")

    for mode in theirs.AffinityMode:
        assert theirs.AffinityMode(mode) == AffinityMode(mode.value)
        if mode != "exclusive" or len(this_host) > 1:
            assert binding.cpus_for_worker(0, theirs.NumaOptions(mode))


@pytest.mark.usefixtures("this_host")
def test_a_failure_raises_or_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        RuntimeError, match=r"failed to find the CPUs to bind worker 2 to \(--numa-binding=node\): it needs GPU 2"
    ):
        binding.cpus_for_worker(2, NumaOptions(AffinityMode.NODE))
    assert not caplog.records

    fallible = NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)
    assert binding.cpus_for_worker(2, fallible) is None
    binding.bind_current_process(2, fallible)
    assert ["it needs GPU 2" in record.getMessage() for record in caplog.records] == [True, True]


@pytest.mark.usefixtures("this_host")
def test_an_unknown_mode_is_reported() -> None:
    with pytest.raises(RuntimeError, match="unknown affinity mode 'moon'; use node"):
        binding.cpus_for_worker(0, NumaOptions("moon"))  # type: ignore[arg-type]


def test_the_gpus_are_asked_for_once(this_host: frozenset[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_host
    binding.cpus_for_worker(0, NumaOptions(AffinityMode.NODE))
    monkeypatch.setattr(_devices, "visible_gpus", lambda: pytest.fail("asked again"))
    binding.cpus_for_worker(1, NumaOptions(AffinityMode.NODE))

    monkeypatch.setattr(_devices, "visible_gpus", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a change makes it ask again")
    with pytest.raises(RuntimeError, match="0 are visible"):
        binding.cpus_for_worker(0, NumaOptions(AffinityMode.NODE))


def test_all_threads_are_bound_but_those_that_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    # In a process of its own: a bound test process would stay bound.
    script = textwrap.dedent("""
        import os, threading
        from ferroelastic.numa import binding
        first, second = sorted(os.sched_getaffinity(0))[:2]
        binding._find_cpus = lambda local_rank, options: [first]
        ready, end = threading.Barrier(3), threading.Event()
        seen = {}
        def plain():
            ready.wait(); end.wait(); seen["plain"] = os.sched_getaffinity(0)
        def choosy():
            os.sched_setaffinity(0, [second]); ready.wait(); end.wait(); seen["choosy"] = os.sched_getaffinity(0)
        threads = [threading.Thread(target=plain), threading.Thread(target=choosy)]
        [thread.start() for thread in threads]
        ready.wait()
        binding.bind_current_process(0, binding.NumaOptions("node"))
        end.set()
        [thread.join() for thread in threads]
        assert os.sched_getaffinity(0) == {first}, os.sched_getaffinity(0)
        assert seen == {"plain": {first}, "choosy": {second}}, seen
    """)
    monkeypatch.setenv("PYTHONPATH", str(Path(ferroelastic.__file__).parents[1]))

    subprocess.run([sys.executable, "-c", script], check=True)


def test_cpus_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    missing = max(os.sched_getaffinity(0)) + 1000
    monkeypatch.setattr(binding, "_find_cpus", lambda _rank, _options: [missing])
    before = os.sched_getaffinity(0)

    with pytest.raises(RuntimeError, match=f"failed to bind worker 3 to CPUs {missing}: Invalid argument"):
        binding.bind_current_process(3, NumaOptions(AffinityMode.NODE))
    binding.bind_current_process(3, NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True))

    assert "the worker runs without binding" in caplog.text
    assert os.sched_getaffinity(0) == before
    assert threading.active_count() == 1


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([2, 0, 1], "0-2"), ([0, 2, 3, 9], "0,2-3,9"), ([7, 8], "7-8")]
)
def test_ranges_are_the_kernels(numbers: list[int], text: str) -> None:
    assert binding.format_ranges(numbers) == text
    assert _topology.parse_ranges(f" {text} \n") == set(numbers)
