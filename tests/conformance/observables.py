"""Writes everything that a script can see of itself and of its process, as JSON.

    python observables.py FOLDER [MODULE ...]

It imports the modules first. The keys of the result are dotted names. Values that differ between any two processes (ids, addresses) are
replaced by their relations.
"""

initial = dict(globals())

# The modules and the frame before this script has imported or called anything.
import sys  # noqa: E402

modules = sorted(sys.modules)
frame = sys._getframe()
for _name in sys.argv[2:] if __name__ == "__main__" else ():
    __import__(_name)
modules_after_imports = sorted(sys.modules)

import ctypes  # noqa: E402
import fcntl  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import stat  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

FIELDS_OF_STATUS = (
    "Umask",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "VmLck",
    "VmPin",
    "CoreDumping",
    "THP_enabled",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Cpus_allowed",
    "Mems_allowed",
)
PRCTL = {"dumpable": 3, "keep capabilities": 7, "secure bits": 27, "timer slack": 30, "THP": 42}
PRCTL_BY_ADDRESS = {"death signal": 2, "subreaper": 37}


def without_addresses(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def main_module() -> dict[str, Any]:
    seen: dict[str, Any] = {f"vars.{name}": without_addresses(value) for name, value in initial.items()}
    seen["vars"] = list(initial)
    spec = initial["__spec__"]
    if spec is not None:
        for name in ("name", "origin", "cached", "parent", "has_location", "submodule_search_locations"):
            seen[f"spec.{name}"] = getattr(spec, name)
    loader = initial["__loader__"]
    seen["loader.name"], seen["loader.path"] = getattr(loader, "name", None), getattr(loader, "path", None)
    import __main__

    seen["is in sys.modules"] = vars(__main__) is globals()
    seen["builtins"] = sorted(vars(sys.modules["builtins"]))
    seen["modules"], seen["modules after imports"] = modules, modules_after_imports
    seen["frames"] = frames = []
    current: Any = frame
    while current is not None:
        frames.append([current.f_code.co_filename, current.f_code.co_name, current.f_lasti >= 0])
        current = current.f_back
    seen["trace"] = str(frame.f_trace)
    seen["exc_info"] = str(sys.exc_info())
    return seen


def interpreter() -> dict[str, Any]:
    attributes = (
        "argv",
        "orig_argv",
        "path",
        "flags",
        "_xoptions",
        "warnoptions",
        "executable",
        "_base_executable",
        "prefix",
        "base_prefix",
        "exec_prefix",
        "base_exec_prefix",
        "platlibdir",
        "pycache_prefix",
        "dont_write_bytecode",
        "hexversion",
        "byteorder",
        "hash_info",
        "int_info",
        "thread_info",
        "float_repr_style",
        "meta_path",
        "path_hooks",
        "displayhook",
        "excepthook",
        "unraisablehook",
        "breakpointhook",
        "_framework",
    )
    functions = (
        "getrecursionlimit",
        "getswitchinterval",
        "getdlopenflags",
        "getdefaultencoding",
        "getfilesystemencoding",
        "getfilesystemencodeerrors",
        "get_asyncgen_hooks",
        "get_coroutine_origin_tracking_depth",
        "gettrace",
        "getprofile",
        "get_int_max_str_digits",
        "is_finalizing",
        "_is_gil_enabled",
        "is_stack_trampoline_active",
    )
    seen: dict[str, Any] = {name: without_addresses(getattr(sys, name, None)) for name in attributes}
    for name in functions:
        seen[name] = repr(getattr(sys, name, lambda: None)())
    seen["attributes"] = sorted(vars(sys))
    seen["path_importer_cache"] = sorted(
        [path, type(finder).__name__] for path, finder in sys.path_importer_cache.items()
    )
    monitoring = getattr(sys, "monitoring", None)
    seen["monitoring"] = [monitoring.get_tool(tool) for tool in range(6)] if monitoring else None
    import warnings

    seen["warnings"] = repr(warnings.filters)
    seen["gc"] = [gc.isenabled(), gc.get_threshold(), gc.get_debug(), len(gc.garbage), len(gc.callbacks)]
    seen["gc.frozen"] = gc.get_freeze_count() > 0
    import _thread
    import atexit
    import faulthandler
    import locale
    import logging
    import tracemalloc

    seen["atexit"] = atexit._ncallbacks()
    seen["faulthandler"] = faulthandler.is_enabled()
    seen["tracemalloc"] = tracemalloc.is_tracing()
    seen["locale"] = [locale.setlocale(locale.LC_ALL), *locale.getlocale(), locale.getpreferredencoding()]
    seen["timezone"] = [time.tzname, time.timezone]
    seen["logging"] = [logging.root.level, len(logging.root.handlers), len(logging.root.manager.loggerDict)]
    main = threading.main_thread()
    seen["threads"] = [repr(thread.name) for thread in threading.enumerate()] + [threading.active_count()]
    seen["main thread"] = [main is threading.current_thread(), main.ident == threading.get_ident(), main.daemon]
    seen["main thread.id"] = [main.native_id == os.getpid(), _thread.get_native_id() == os.getpid(), _thread._count()]
    seen["stack size"] = threading.stack_size()
    seen["hash seed"] = hash("the seed is chosen when the interpreter starts")
    seen["site"] = [sys.modules["site"].ENABLE_USER_SITE, sys.modules["site"].PREFIXES]
    return seen


def streams() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        attributes = [
            "name",
            "mode",
            "encoding",
            "errors",
            "newlines",
            "line_buffering",
            "write_through",
            "closed",
            "_CHUNK_SIZE",
        ]
        seen[name] = {attribute: repr(getattr(stream, attribute)) for attribute in attributes}
        seen[name] |= {"repr": without_addresses(stream), "isatty": stream.isatty(), "fileno": stream.fileno()}
        seen[name] |= {"seekable": stream.seekable(), "dict": sorted(vars(stream))}
        for layer in (stream.buffer, getattr(stream.buffer, "raw", stream.buffer)):
            kind = type(layer).__name__
            seen[name][kind] = [repr(layer.name), layer.mode, layer.closed, sys.getsizeof(layer), layer.readable()]
            seen[name][f"{kind}.closefd"] = getattr(layer, "closefd", None)
            seen[name][f"{kind}.dict"] = sorted(getattr(layer, "__dict__", ()))
        seen[name]["is the first"] = stream is getattr(sys, f"__{name}__")
    return {f"{name}.{key}": value for name, values in seen.items() for key, value in values.items()}


def environment() -> dict[str, Any]:
    kernel = [entry for entry in Path("/proc/self/environ").read_bytes().split(b"\0") if entry]
    environ = [name + b"=" + value for name, value in os.environb.items()]
    posix: Any = sys.modules["posix"]
    libc = ctypes.CDLL(None)
    pointers = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, "environ")
    native: list[bytes] = []
    while (entry := pointers[len(native)]) is not None:
        native.append(entry)
    # The kernel's area of arguments and environment: `setproctitle` overwrites it where it finds it through `environ`.
    area = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47])
    return {
        "is in the area": ctypes.POINTER(ctypes.c_void_p).in_dll(libc, "environ")[0] == area,
        "variables": dict(os.environ),
        "kernel": kernel == environ,
        "C library": native == environ,
        "posix": [name + b"=" + value for name, value in posix.environ.items()] == environ,
    }


def descriptors() -> dict[str, Any]:
    seen = {}
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        try:
            status = os.fstat(number)
        except OSError:  # the descriptor of the listing
            continue
        target = os.readlink(f"/proc/self/fd/{number}")
        kind = target if target.startswith("/") else target.partition(":")[0]
        flags = [fcntl.fcntl(number, fcntl.F_GETFL), fcntl.fcntl(number, fcntl.F_GETFD)]
        seen[name] = [kind, stat.filemode(status.st_mode), *flags]
    return seen


def signals() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for number in sorted(signal.valid_signals()):
        handler = signal.getsignal(number)
        seen[str(int(number))] = getattr(handler, "__name__", None) or repr(handler)
    seen["mask"] = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    seen["wakeup"] = signal.set_wakeup_fd(-1)
    timers = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
    seen["timers"] = [signal.getitimer(timer) for timer in timers]
    seen["alarm"] = signal.alarm(0)
    return seen


def process() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in FIELDS_OF_STATUS:
            seen[f"status.{name}"] = value.split()
    libc = ctypes.CDLL(None, use_errno=True)
    for name, option in PRCTL.items():
        seen[f"prctl.{name}"] = libc.prctl(option, 0, 0, 0, 0)
    for name, option in PRCTL_BY_ADDRESS.items():
        result = ctypes.c_int(-1)
        libc.prctl(option, ctypes.byref(result), 0, 0, 0)
        seen[f"prctl.{name}"] = result.value
    seen["personality"] = libc.personality(0xFFFFFFFF)
    seen["io priority"] = libc.syscall({"x86_64": 252, "aarch64": 31}[os.uname().machine], 1, 0)
    for name in [
        "comm",
        "cmdline",
        "oom_score_adj",
        "autogroup",
        "cgroup",
        "coredump_filter",
        "limits",
        "loginuid",
        "timers",
        "timerslack_ns",
    ]:
        try:
            text = Path("/proc/self", name).read_bytes().decode()
        except OSError as error:
            text = repr(error)
        seen[f"proc.{name}"] = re.sub(r"autogroup-\d+", "autogroup", text)
    for name in ("exe", "cwd", "root"):
        seen[f"proc.{name}"] = os.readlink(f"/proc/self/{name}")
    for name in sorted(os.listdir("/proc/self/ns")):
        seen[f"namespace.{name}"] = os.readlink(f"/proc/self/ns/{name}")
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    own = str(os.getpid())
    seen["session"] = [fields[2] == own, fields[3] == own, os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()]
    seen["terminal"] = fields[4:6]
    seen["scheduling"] = [os.sched_getscheduler(0), os.sched_getparam(0).sched_priority, os.nice(0), fields[15:17]]
    seen["affinity"] = sorted(os.sched_getaffinity(0))
    seen["exit signal"] = fields[35]
    seen["limits"] = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT_" in name}
    seen["ids"] = [os.getresuid(), os.getresgid(), os.getgroups()]
    seen["cwd"] = os.getcwd()
    mask = os.umask(0o22)
    os.umask(mask)
    seen["umask"] = mask
    seen["parent"] = Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    seen["tasks"] = len(os.listdir("/proc/self/task"))
    seen["children"] = Path(f"/proc/self/task/{own}/children").read_text().split()
    seen["had children"] = any(resource.getrusage(resource.RUSAGE_CHILDREN))
    mapped = re.findall(r"(/\S+)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    seen["mapped"] = sorted({os.path.basename(path) for path in mapped})
    seen["program name"] = ctypes.c_char_p.in_dll(libc, "program_invocation_name").value.decode()  # type: ignore[union-attr]
    return seen


def doubled(number: int) -> int:
    return 2 * number


def randomness() -> dict[str, Any]:
    """Draws, which differ between all processes."""
    import random
    import tempfile
    import uuid
    from multiprocessing import process as multiprocessing_process

    own = multiprocessing_process.current_process()
    seen = {
        "authkey": own.authkey.hex(),
        "random": random.random(),
        "SystemRandom": random.SystemRandom().random(),
        "tempfile": next(tempfile._get_candidate_names()),  # type: ignore[attr-defined]
        "uuid4": str(uuid.uuid4()),
    }
    if "numpy.random" in sys.modules:
        seen["numpy"] = sys.modules["numpy.random"].random()
    if "torch" in sys.modules:
        seen["torch"] = sys.modules["torch"].rand(1).item()
    return seen


def of_torch() -> dict[str, Any]:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), len(os.listdir("/proc/self/task"))],
        "sum": torch.ones(1000, 1000).sum().item(),
        "defaults": [
            torch.is_grad_enabled(),
            str(torch.get_default_dtype()),
            torch.are_deterministic_algorithms_enabled(),
        ],
        "autograd": torch.ones(2, requires_grad=True).sum().backward(),
        "cuda": [torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()],
    }


def of_multiprocessing() -> dict[str, Any]:
    """Children of the worker's own."""
    import multiprocessing

    own = multiprocessing.current_process()
    seen: dict[str, Any] = {"name": own.name, "identity": list(own._identity)}
    seen["parent"], seen["children"] = multiprocessing.parent_process(), multiprocessing.active_children()
    seen["start method"] = multiprocessing.get_start_method(allow_none=True)
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            seen[method] = pool.map(doubled, [21])
    return seen


def observe() -> dict[str, Any]:
    parts = (main_module, environment, descriptors, signals, process, streams, interpreter, of_torch)
    seen = {part.__name__: part() for part in parts}
    return {f"{part}.{name}": value for part, values in seen.items() for name, value in values.items()}


def wait_for_parked(number: int) -> None:
    """Wait until the agent of this worker has warm children, so that the next attempt is warm."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        count = 0
        for task in os.listdir("/proc"):
            try:
                fields = Path("/proc", task, "stat").read_text() if task.isdigit() else ""
            except OSError:
                continue
            # Parked children lead their own sessions, as the zygote does.
            count += "(ferro-warm)" in fields and fields.rpartition(")")[2].split()[1] == str(os.getppid())
        if count > number:
            time.sleep(0.05)  # a child that has just been forked still has to park
            return
        time.sleep(0.01)
    raise TimeoutError


def main() -> None:
    seen = observe()
    seen["randomness"] = randomness()
    seen["multiprocessing"] = of_multiprocessing()
    attempt, workers = os.environ["TORCHELASTIC_RESTART_COUNT"], int(os.environ["WORLD_SIZE"])
    folder = Path(sys.argv[1])
    file = folder / f"{os.environ['RANK']}-{attempt}.json"
    file.with_suffix(".new").write_text(json.dumps(seen))
    file.with_suffix(".new").rename(file)
    if attempt == "0" and os.environ["TORCHELASTIC_MAX_RESTARTS"] == "1":
        while len(list(folder.glob("*-0.json"))) < workers:
            time.sleep(0.01)
        if os.environ["RANK"] == "0":
            wait_for_parked(workers)
            sys.exit(1)
        time.sleep(60)


if __name__ == "__main__":
    main()
