"""Advice for causes that are certain from the collected facts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ferroelastic._failure.model import Advice

if TYPE_CHECKING:
    from ferroelastic._failure.model import FirstFailure

__all__ = ["HELPERS_KILLED", "SHM_FULL", "advice_for"]

_PORT = re.compile(r"(?:EADDRINUSE|[Aa]ddress already in use)")
_PORT_NUMBER = re.compile(r"port[: ]+(\d{2,5})\b")
_SHM = "/dev/shm"  # noqa: S108 - the name of the file system, not of a file
_SHM_FULL = re.compile(
    rf"{_SHM}[^\n]*No space left on device|No space left on device[^\n]*{_SHM}"
    r"|unable to (?:write to|resize|allocate shared memory\(shm\) for) file </torch_[^\n]*No space"
    rf"|dataloader's workers are out of shared memory|creating shared memory segment {_SHM}|insufficient shared memory \(shm\)"
)
_NCCL_TIMEOUT = re.compile(r"Watchdog caught collective operation timeout: WorkNCCL\([^)\n]*\)")
_NCCL_OPERATION = re.compile(r"OpType=(\w+)")
# torch's exception for a process of a data loader.
_LOADER_KILLED = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\)[^\n]*killed by signal: Killed")
_MISSING = re.compile(r"No module named '?([\w.]+)'?")
_RUNPY_MISSING = re.compile(r"^\S+: No module named (\S+)$", re.MULTILINE)

HELPERS_KILLED = "the kernel's OOM killer has ended"
"""Beginning of the reason of a failure if the OOM killer has ended other processes of the workers in the same round."""
SHM_FULL = f"{_SHM} is full"
"""Reason of a failure by SIGBUS while the file system of shared memory has no space."""
_SHM_ADVICE = Advice(
    "shm_full",
    f"{_SHM} is full: enlarge it (docker run --shm-size, or an emptyDir of medium Memory), or use fewer data-loader processes",
)


def advice_for(first: FirstFailure) -> Advice | None:
    """Return one line of advice if the cause is certain; ``None`` otherwise.

    Args:
        first: the first failure of the job.
    """
    sender = first.sender
    if sender is not None and sender.kind == "oom_killer":
        limit = "of the cgroup" if sender.scope == "cgroup" else "of the host"
        return _out_of_memory(limit, ", or raise the limit" if sender.scope == "cgroup" else "")
    exception = first.exception
    if exception is not None:
        found = _for_exception(exception.type.rpartition(".")[2], exception.message, first.reason or "")
        if found is not None:
            return found
    output = "\n".join(first.stderr)
    timeout = _NCCL_TIMEOUT.search(output) or (exception and _NCCL_TIMEOUT.search(exception.message))
    if timeout:
        operation = _NCCL_OPERATION.search(timeout[0])
        return Advice(
            "nccl_timeout",
            f"the collective {operation[1] if operation else 'operation'} did not complete in time: look in the logs for a rank that is "
            "behind, has ended, or calls another collective",
        )
    if first.signal == "SIGBUS" and (_SHM_FULL.search(output) or first.reason == SHM_FULL):
        return _SHM_ADVICE
    missing = _RUNPY_MISSING.search(output) if exception is None and first.exit_code == 1 else None
    if missing:
        return _missing_module(missing[1])
    return None


def _for_exception(name: str, message: str, reason: str) -> Advice | None:
    if name in ("ModuleNotFoundError", "ImportError"):
        missing = _MISSING.match(message)
        return _missing_module(missing[1]) if missing else None
    if name == "OutOfMemoryError" and message.startswith(
        ("CUDA out of memory", "HIP out of memory", "XPU out of memory")
    ):
        return Advice(
            "cuda_out_of_memory",
            "the GPU's memory was used up: use a smaller batch, or check with nvidia-smi whether another process uses this GPU",
        )
    if _LOADER_KILLED.search(message) and reason.startswith(HELPERS_KILLED):
        return _out_of_memory("of the workers", "")
    if name in ("RuntimeError", "OSError") and _SHM_FULL.search(message):
        return _SHM_ADVICE
    if _PORT.search(message) and name in ("OSError", "RuntimeError", "DistNetworkError", "DistStoreError"):
        port = _PORT_NUMBER.search(message)
        which = f"port {port[1]}" if port else "the port"
        return Advice("port_in_use", f"{which} is in use by another process: end that process, or choose another port")
    return None


def _out_of_memory(limit: str, more: str) -> Advice:
    return Advice(
        "oom_killer",
        f"the memory {limit} was used up: use fewer workers or data-loader processes, or smaller batches{more}",
    )


def _missing_module(name: str) -> Advice:
    package = name.partition(".")[0]
    return Advice("missing_module", f"install {package} for the Python that runs the workers, or correct the import")
