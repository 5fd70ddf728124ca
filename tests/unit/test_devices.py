"""Counting devices, on fake drivers; what is visible is held against torch where torch is installed."""

# ruff: noqa: N802 - the fake has NVML's names

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ferroelastic import _devices
from ferroelastic._cpus import cpu_count

UUIDS = [
    "GPU-1a000000-0000-0000-0000-000000000000",
    "GPU-1b000000-0000-0000-0000-000000000000",
    "GPU-2c000000-0000-0000-0000-000000000000",
    "GPU-3d000000-0000-0000-0000-000000000000",
]
MIG = "MIG-5e000000-0000-0000-0000-000000000000"


class FakeNvml:
    """Answers as libnvidia-ml does, for some GPUs of which the first may have one MIG instance."""

    def __init__(self, uuids: list[str], *, init: int = 0, count: int = 0) -> None:
        self.uuids = uuids
        self.open = 0
        self._init = init
        self._count = count

    def nvmlInit_v2(self) -> int:
        self.open += self._init == 0
        return self._init

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, out: Any) -> int:
        out._obj.value = len(self.uuids)
        return self._count

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, out: Any) -> int:
        out._obj.value = index + 1
        return 0

    def nvmlDeviceGetUUID(self, device: Any, out: Any, length: int) -> int:
        assert len(out) == length
        out.value = self.uuids[device.value - 1].encode()
        return 0

    def nvmlDeviceGetPciInfo_v3(self, device: Any, out: Any) -> int:
        out._obj.domain, out._obj.bus, out._obj.device = 1, 0x3A + device.value, 0x1F
        out._obj.bus_id = b"ignored"
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, out: Any) -> int:
        out._obj.value = 99
        return 0 if uuid.decode() == MIG else 6

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance: Any, out: Any) -> int:
        assert instance.value == 99
        out._obj.value = 1
        return 0


def _no_nvml() -> Any:
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


@pytest.fixture
def nvml() -> Iterator[FakeNvml]:
    fake = FakeNvml(UUIDS)
    yield fake
    assert fake.open == 0


def _nvidia(nvml: FakeNvml, root: Path) -> _devices.Sources:
    return _devices.Sources(root=root, load_nvml=lambda: nvml)


def test_without_limits_the_cpus_are_torchs(tmp_path: Path) -> None:
    torch_utils = pytest.importorskip("torch._utils")
    counted = _devices.worker_count("cpu", {}, _devices.Sources(tmp_path, _no_nvml))
    assert counted == _devices.WorkerCount(torch_utils.cpu_count(), "cpu", "")


def test_nvml_gives_count_ids_and_addresses(nvml: FakeNvml, tmp_path: Path) -> None:
    gpus = _devices.visible_gpus({}, _nvidia(nvml, tmp_path))

    assert gpus[0] == _devices.Gpu("nvidia", UUIDS[0], "0001:3b:1f.0")
    assert [gpu.uuid for gpu in gpus] == UUIDS
    assert _devices.gpu_count({}, _nvidia(nvml, tmp_path)) == 4


VISIBLE = [
    None,
    "",
    " ",
    "0",
    "0,1,2,3",
    "3,1",
    " 2 , 0 ",
    "-1",
    "0,-1,1",
    "0,1,-1,1",
    "4",
    "0,4,1",
    "0,0",
    "0,9,9",
    "1gpu2,2ampere",
    "x",
    "0,x,1",
    "+1",
    "0,,1",
    "NoDevFiles",
    UUIDS[2],
    f"{UUIDS[3]},{UUIDS[0]}",
    "GPU-1a,GPU-2c",
    "GPU-1",
    "GPU-2c,GPU-1,GPU-3d",
    "GPU-2,GPU-2c",
    "GPU-2c,GPU-2c",
    "GPU-2c, GPU-3d",
    "GPU-2c,0",
    "0,GPU-2c",
    "GPU-ff",
    f"{MIG},{MIG}",
]


@pytest.mark.parametrize("text", VISIBLE)
def test_visibility_is_torchs(
    text: str | None, nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = pytest.importorskip("torch.cuda")
    monkeypatch.setattr(cuda, "_raw_device_count_nvml", lambda: len(UUIDS))
    monkeypatch.setattr(cuda, "_raw_device_uuid_nvml", lambda: list(UUIDS))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)

    gpus = _devices.visible_gpus(None, _nvidia(nvml, tmp_path))

    assert len(gpus) == cuda._device_count_nvml()
    assert [UUIDS.index(gpu.uuid) for gpu in gpus] == [cuda._get_nvml_device_index(i) for i in range(len(gpus))]


def test_a_sign_alone_names_no_device(nvml: FakeNvml, tmp_path: Path) -> None:
    assert _devices.gpu_count({"CUDA_VISIBLE_DEVICES": "0,+"}, _nvidia(nvml, tmp_path)) == 1


def test_one_mig_instance_is_visible(nvml: FakeNvml, tmp_path: Path) -> None:
    sources = _nvidia(nvml, tmp_path)

    assert _devices.visible_gpus({"CUDA_VISIBLE_DEVICES": f"{MIG},MIG-other"}, sources) == [
        _devices.Gpu("nvidia", MIG, "0001:3b:1f.0")
    ]
    assert _devices.gpu_count({"CUDA_VISIBLE_DEVICES": "MIG-other"}, sources) == 0


def _proc(root: Path, **gpus: str) -> Path:
    for address, uuid in gpus.items():
        folder = root / "proc/driver/nvidia/gpus" / address.replace("_", ":").replace("x", ".")
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t H200\nGPU UUID: \t {uuid}\nDevice Minor: \t 0\n")
    return root


def test_proc_stands_in_where_nvml_does_not_answer(tmp_path: Path) -> None:
    root = _proc(tmp_path, **{"0000_5D_00x0": "GPU-????????-????", "0000_3b_00x0": UUIDS[0]})
    expected = [_devices.Gpu("nvidia", UUIDS[0], "0000:3b:00.0"), _devices.Gpu("nvidia", "", "0000:5d:00.0")]

    failing: list[Any] = [_no_nvml, object, lambda: FakeNvml([], init=9), lambda: FakeNvml([], count=999)]
    for load in failing:
        assert _devices.visible_gpus({}, _devices.Sources(root, load)) == expected
    sources = _devices.Sources(root, _no_nvml)
    assert _devices.visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, sources) == expected[1:]
    assert _devices.visible_gpus({"CUDA_VISIBLE_DEVICES": MIG}, sources) == [_devices.Gpu("nvidia", MIG, "")]


def test_nvml_that_shows_no_gpu_is_believed(tmp_path: Path) -> None:
    root = _proc(tmp_path, **{"0000_3b_00x0": UUIDS[0]})

    assert _devices.gpu_count({}, _devices.Sources(root, lambda: FakeNvml([]))) == 0


def test_a_host_without_gpus_has_none(tmp_path: Path) -> None:
    assert _devices.visible_gpus({}, _devices.Sources(tmp_path, _no_nvml)) == []
    assert _devices.visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}, _devices.Sources(tmp_path, _no_nvml)) == []


@pytest.fixture
def amd(tmp_path: Path) -> _devices.Sources:
    """Build a host of one CPU node and three GPUs, and one GPU that this container may not use."""
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for number, gpu_id in enumerate([0, 111, 222, 333]):
        node = nodes / str(number + 8)  # two digits among one-digit names: the order is by number
        node.mkdir(parents=True)
        (node / "gpu_id").write_text(f"{gpu_id}\n")
        unique_id = 0xABC0 + number
        (node / "properties").write_text(
            f"cpu_cores_count 0\ndomain 1\nlocation_id {0xC100 + 8 * number}\nunique_id {unique_id}\n"
        )
    hidden = nodes / "12"
    hidden.mkdir()
    (hidden / "gpu_id").mkdir()
    return _devices.Sources(tmp_path, _no_nvml)


def _places(gpus: list[_devices.Gpu]) -> list[int]:
    return [int(gpu.pci_address.split(":")[2].split(".")[0]) for gpu in gpus]


def test_kfd_gives_amd_gpus(amd: _devices.Sources) -> None:
    gpus = _devices.visible_gpus({}, amd)

    assert gpus[0] == _devices.Gpu("amd", "GPU-000000000000abc1", "0001:c1:01.0")
    assert _places(gpus) == [1, 2, 3]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HIP_VISIBLE_DEVICES": "2,0"}, [3, 1]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [2]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, [1]),
        ({"ROCR_VISIBLE_DEVICES": "1,2"}, [2, 3]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, [3]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0,1"}, [2]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-000000000000abc3"}, [3]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
    ],
)
def test_amds_variables(amd: _devices.Sources, variables: dict[str, str], expected: list[int]) -> None:
    assert _places(_devices.visible_gpus(variables, amd)) == expected


def test_nvidia_goes_first_also_when_hidden(amd: _devices.Sources, nvml: FakeNvml) -> None:
    both = amd._replace(load_nvml=lambda: nvml)

    assert _devices.gpu_count({}, both) == 4
    assert _devices.gpu_count({"CUDA_VISIBLE_DEVICES": ""}, both) == 0


def test_worker_count(nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_devices, "_has_private_backend", lambda: False)
    with_gpus, without = _nvidia(nvml, tmp_path), _devices.Sources(tmp_path, _no_nvml)
    cpus = _devices.WorkerCount(cpu_count({}, tmp_path), "cpu", "")

    assert _devices.worker_count("cpu", {}, with_gpus) == cpus
    assert _devices.worker_count("auto", {}, with_gpus) == _devices.WorkerCount(4, "gpu", "")
    assert _devices.worker_count("auto", {}, without) == cpus
    none = _devices.worker_count("gpu", {}, without)
    assert none is not None
    assert (none.number, none.device) == (0, "gpu")
    assert _devices.worker_count("npu", {}, without) is None


def _pci_device(root: Path, kind: str, address: str, vendor: str) -> None:
    folder = root / "sys/devices/pci0000:00" / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (root / "sys/class" / kind).mkdir(parents=True)
    (root / "sys/class" / kind / "device").symlink_to(folder)


def test_other_accelerators_are_those_of_sysfs(tmp_path: Path) -> None:
    sources = _devices.Sources(tmp_path, _no_nvml)
    assert _devices.other_accelerators(sources) == []
    _pci_device(tmp_path, "accel/accel0", "0000:9a:00.0", "0x1da3")
    _pci_device(tmp_path, "accel/accel1", "0000:1a:00.0", "0x1da3")
    _pci_device(tmp_path, "drm/renderD128", "0000:02:00.0", "0x1a03")  # a console, which is no accelerator
    found = _devices.other_accelerators(sources)
    assert [device.pci_address for device in found] == ["0000:1a:00.0", "0000:9a:00.0"]
    _pci_device(tmp_path, "drm/renderD130", "0000:4d:00.0", "0x8086")
    _pci_device(tmp_path, "drm/renderD129", "0000:29:00.0", "0x8086")
    found = _devices.other_accelerators(sources)
    assert [device.pci_address for device in found] == ["0000:29:00.0", "0000:4d:00.0"]


def test_nothing_but_a_sign_of_one_makes_torch_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_devices, "_has_private_backend", lambda: False)
    vendor = tmp_path / "sys/class/drm/renderD128/device/vendor"
    vendor.parent.mkdir(parents=True)

    assert not any(map(_devices._is_intel, [vendor]))
    vendor.write_text("0x1af4\n")
    assert _devices._other_accelerators(tmp_path) is None
    vendor.write_text("0x8086\n")
    assert _devices._is_intel(vendor)
