"""Counts devices and finds their PCI addresses, without torch and without CUDA.

NVIDIA GPUs are found through NVML, which creates no CUDA context and keeps forking possible, else in
``/proc/driver/nvidia/gpus``. AMD GPUs are found in the kernel's KFD topology. ``CUDA_VISIBLE_DEVICES``,
``HIP_VISIBLE_DEVICES`` and ``ROCR_VISIBLE_DEVICES`` are interpreted as by ``torch.cuda.device_count``. Other accelerators are found in
sysfs, for the NUMA binding only.

Indexes are in PCI order, as in NVML. CUDA uses the same order with ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` and if all GPUs are
of one model. With mixed models CUDA's default order starts with the fastest GPU, which only CUDA can determine.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ferroelastic._cpus import cpu_count


class Gpu(NamedTuple):
    """One GPU of this host."""

    vendor: Literal["nvidia", "amd", "other"]
    uuid: str
    """``GPU-…`` as the driver reports it (``MIG-…`` for a MIG instance), or ``""`` if it cannot be read."""
    pci_address: str
    """As in ``/sys/bus/pci/devices``, e.g. ``0000:3b:00.0``, or ``""`` if it cannot be read."""


def load_nvml() -> Any:
    """Load the NVML library.

    Raises:
        OSError: the library is missing, because the NVIDIA driver is not installed.
    """
    import ctypes

    return ctypes.CDLL("libnvidia-ml.so.1")


class Sources(NamedTuple):
    """Sources of device information. Tests replace them."""

    root: Path = Path("/")
    """Folder that holds ``sys`` and ``proc``."""
    load_nvml: Callable[[], Any] = load_nvml
    """Returns the NVML library, or raises ``OSError``."""


HOST = Sources()

VISIBILITY_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

# Ordinals that torch.cuda assumes without CUDA_VISIBLE_DEVICES: more than any host has.
_ALL = tuple(range(64))


def gpu_count(environ: Mapping[str, str] | None = None, sources: Sources = HOST) -> int:
    """Return the number of visible NVIDIA GPUs, as ``torch.cuda.device_count``. Without NVIDIA GPUs, count AMD GPUs."""
    return len(visible_gpus(environ, sources))


def visible_gpus(environ: Mapping[str, str] | None = None, sources: Sources = HOST) -> list[Gpu]:
    """Return the visible GPUs by device index: entry 3 is ``cuda:3`` (see the module's docstring for the order).

    Args:
        environ: environment with the visibility variables. ``None`` uses the environment of this process.
        sources: sources of device information.
    """
    environ = os.environ if environ is None else environ
    with _nvml(sources) as nvml:
        nvidia = _nvml_gpus(nvml) if nvml else None
        if nvidia is None:
            nvidia = _proc_gpus(sources.root)
        if nvidia:
            return _visible_nvidia(nvidia, environ.get("CUDA_VISIBLE_DEVICES"), nvml)
    amd = _kfd_gpus(sources.root)
    if "ROCR_VISIBLE_DEVICES" in environ:
        amd = _select(amd, environ["ROCR_VISIBLE_DEVICES"])
    chosen = environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES"))
    return amd if chosen is None else _select(amd, chosen)


def other_accelerators(sources: Sources = HOST) -> list[Gpu]:
    """Return the PCI devices that sysfs shows as accelerators and that are no GPU of NVIDIA or AMD, in PCI order.

    They are the GPUs of Intel, or without one the devices of the kernel's class ``accel``. Visibility variables of their drivers are not
    interpreted.

    Args:
        sources: sources of device information.
    """
    classes = sources.root / "sys/class"
    intel = [device for device in (classes / "drm").glob("renderD*/device") if _is_intel(device / "vendor")]
    found = {device.resolve().name for device in intel or (classes / "accel").glob("accel*/device")}
    return [Gpu("other", "", address) for address in sorted(found)]


def parse_visible_devices(text: str | None) -> list[int] | list[str]:
    """Parse a visibility variable as ``torch.cuda`` does.

    Args:
        text: value of the variable; ``None`` if it is not set.

    Returns:
        Ordinals, or ``GPU-…``/``MIG-…`` ids, up to the first invalid entry. Empty if an entry is repeated.
    """
    if text is None:
        return list(_ALL)
    for prefix in ("GPU-", "MIG-"):
        if text.startswith(prefix):
            ids: list[str] = []
            for entry in text.split(","):
                if entry in ids:
                    return []
                if not entry.startswith(prefix):
                    break
                ids.append(entry)
            return ids
    ordinals: list[int] = []
    for entry in text.split(","):
        ordinal = _leading_int(entry.strip())
        if ordinal in ordinals:
            return []
        if ordinal < 0:
            break
        ordinals.append(ordinal)
    return ordinals


def _leading_int(text: str) -> int:
    """Return the leading integer of ``text``, as ``strtoul``: ``"1gpu"`` is 1. Return -1 if there is none."""
    sign, digits = (text[:1], text[1:]) if text[:1] in ("+", "-") else ("", text)
    end = 0
    while end < len(digits) and "0" <= digits[end] <= "9":
        end += 1
    return int(sign + digits[:end]) if end else -1


def _select(gpus: Sequence[Gpu], text: str) -> list[Gpu]:
    """Apply a visibility variable. The first entry without a GPU ends the list. A repeated GPU empties the list."""
    chosen: list[int] = []
    for entry in parse_visible_devices(text):
        if isinstance(entry, int):
            index = entry if entry < len(gpus) else -1
        else:
            matches = [i for i, gpu in enumerate(gpus) if gpu.uuid.startswith(entry)]
            index = matches[0] if len(matches) == 1 else -1
        if index < 0:
            break
        if index in chosen:
            return []
        chosen.append(index)
    return [gpus[i] for i in chosen]


def _visible_nvidia(gpus: list[Gpu], text: str | None, nvml: Any) -> list[Gpu]:
    if text is None:
        return gpus
    if not text.startswith("MIG-"):
        return _select(gpus, text)
    # A CUDA process sees at most one MIG instance: the first of the list.
    instances = parse_visible_devices(text)
    instance = _nvml_mig(nvml, str(instances[0])) if instances else None
    return [instance] if instance else []


@contextlib.contextmanager
def _nvml(sources: Sources) -> Iterator[Any]:
    """Yield an initialised NVML, or ``None``."""
    try:
        nvml = sources.load_nvml()
        is_initialised = nvml.nvmlInit_v2() == 0
    except (OSError, AttributeError):  # no driver, or a library that is not NVML
        yield None
        return
    if not is_initialised:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _nvml_gpus(nvml: Any) -> list[Gpu] | None:
    """Return the GPUs that NVML reports to this process, or ``None`` if NVML fails."""
    import ctypes

    count = ctypes.c_uint(0)
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return None
    gpus = []
    for index in range(count.value):
        device = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0:
            gpus.append(Gpu("nvidia", _nvml_uuid(nvml, device), _nvml_pci_address(nvml, device)))
        else:
            # A GPU that fell off the bus still has an index in torch's count.
            gpus.append(Gpu("nvidia", "", ""))
    return gpus


def _nvml_uuid(nvml: Any, device: Any) -> str:
    import ctypes

    text = ctypes.create_string_buffer(96)
    if nvml.nvmlDeviceGetUUID(device, text, 96) != 0:
        return ""
    return text.value.decode("ascii", "replace")


def _nvml_pci_address(nvml: Any, device: Any) -> str:
    import ctypes

    class PciInfo(ctypes.Structure):
        """``nvmlPciInfo_t``."""

        _fields_ = (
            ("bus_id_legacy", ctypes.c_char * 16),
            ("domain", ctypes.c_uint),
            ("bus", ctypes.c_uint),
            ("device", ctypes.c_uint),
            ("pci_device_id", ctypes.c_uint),
            ("pci_subsystem_id", ctypes.c_uint),
            ("bus_id", ctypes.c_char * 32),
        )

    info = PciInfo()
    if nvml.nvmlDeviceGetPciInfo_v3(device, ctypes.byref(info)) != 0:
        return ""
    return f"{info.domain:04x}:{info.bus:02x}:{info.device:02x}.0"


def _nvml_mig(nvml: Any, uuid: str) -> Gpu | None:
    """Find a MIG instance. Without NVML it is assumed to exist."""
    if nvml is None:
        return Gpu("nvidia", uuid, "")
    import ctypes

    instance, device = ctypes.c_void_p(), ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(instance)) != 0:
        return None
    if nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance, ctypes.byref(device)) != 0:
        return Gpu("nvidia", uuid, "")
    return Gpu("nvidia", uuid, _nvml_pci_address(nvml, device))


def _proc_gpus(root: Path) -> list[Gpu]:
    """Read ``/proc/driver/nvidia/gpus``: one folder per GPU, named after its PCI address."""
    gpus = []
    with contextlib.suppress(OSError):
        for folder in sorted((root / "proc/driver/nvidia/gpus").iterdir()):
            uuid = ""
            with contextlib.suppress(OSError):
                for line in (folder / "information").read_text().splitlines():
                    key, _, value = line.partition(":")
                    # The driver writes question marks until the GPU is first used.
                    if key.strip() == "GPU UUID" and "?" not in value:
                        uuid = value.strip()
            gpus.append(Gpu("nvidia", uuid, folder.name.lower()))
    return gpus


def _kfd_gpus(root: Path) -> list[Gpu]:
    """Read the KFD topology: nodes with a ``gpu_id`` other than 0. The node of a GPU that is hidden from this container is unreadable."""
    try:
        nodes = sorted((root / "sys/class/kfd/kfd/topology/nodes").iterdir(), key=lambda node: int(node.name))
    except (OSError, ValueError):
        return []
    gpus = []
    for node in nodes:
        try:
            if int((node / "gpu_id").read_text()) == 0:
                continue
            lines = (node / "properties").read_text().splitlines()
            properties = {key: int(value) for key, value in (line.split() for line in lines)}
        except (OSError, ValueError):
            continue
        location = properties.get("location_id", 0)
        address = (
            f"{properties.get('domain', 0):04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"
        )
        unique_id = properties.get("unique_id", 0)
        gpus.append(Gpu("amd", f"GPU-{unique_id:016x}" if unique_id else "", address))
    return gpus


class WorkerCount(NamedTuple):
    """Number of workers that a value of ``--nproc-per-node`` selects."""

    number: int
    device: str
    """Type of the counted devices."""
    remedy: str
    """Remedy if the number is 0."""


def worker_count(what: str, environ: Mapping[str, str] | None = None, sources: Sources = HOST) -> WorkerCount | None:
    """Count the devices of this host. Each gets one worker.

    Args:
        what: ``"cpu"``, ``"gpu"``, ``"xpu"``, ``"auto"``, or the name of a private backend of torch.
        environ: as in :func:`visible_gpus`.
        sources: sources of device information.

    Returns:
        The count, or ``None`` if ``what`` is not a type of device.
    """
    if what == "cpu":
        return WorkerCount(cpu_count(environ, sources.root), "cpu", "")
    if what == "gpu":
        remedy = "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, or use cpu or a number"
        return WorkerCount(gpu_count(environ, sources), "gpu", remedy)
    if what == "xpu":
        from ferroelastic import _torch

        return WorkerCount(_torch.xpu_device_count(), "xpu", "check that torch is installed with XPU support")
    if what == "auto":
        gpus = gpu_count(environ, sources)
        other = None if gpus else _other_accelerators(sources.root)
        return (
            WorkerCount(gpus, "gpu", "") if gpus else other or WorkerCount(cpu_count(environ, sources.root), "cpu", "")
        )
    if not _has_private_backend():
        return None
    from ferroelastic import _torch

    number = _torch.custom_device_count(what)
    return None if number is None else WorkerCount(number, what, f"check the installation of torch's backend {what}")


def _other_accelerators(root: Path) -> WorkerCount | None:
    """Count devices that only torch can count. Imports torch, which takes seconds, only if such a device may exist."""
    intel = any(_is_intel(device) for device in (root / "sys/class/drm").glob("renderD*/device/vendor"))
    if not intel and not _has_private_backend():
        return None
    from ferroelastic import _torch

    device, number = _torch.accelerator_count()
    return WorkerCount(number, device, "") if number else None


def _is_intel(vendor: Path) -> bool:
    try:
        return int(vendor.read_text(), 16) == 0x8086  # noqa: PLR2004 - the vendor's PCI id
    except (OSError, ValueError):
        return False


def _has_private_backend() -> bool:
    """Return whether torch would load an external backend. It loads them by entry point when it is imported."""
    if "torch" in sys.modules:
        return True
    from importlib.metadata import entry_points

    return bool(entry_points(group="torch.backends"))
