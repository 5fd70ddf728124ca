"""The program of a zygote and of its children.

:func:`serve` imports the modules, then forks children at the agent's order. It returns only in a child, when the agent has released it.
The modules ``os``, ``sys`` and ``io`` are loaded in every interpreter; the functions import others late, because the worker would see them.
"""

from __future__ import annotations

import io
import os
import sys

TYPE_CHECKING = False  # as in `typing`, which a worker may not have loaded
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

_UNSET = "\1"
"""Stands for a missing ``PYTHONPATH`` in the configuration."""

_CLOCK_TICK_NS = 10_000_000
"""Upper bound of the lag of file times behind the clock."""


class Refusal(Exception):  # noqa: N818 - a decision
    """The process cannot serve as a zygote. The text is the reason, as a fragment of a sentence."""


def serve() -> bool:
    """Run the zygote, and return in a released child.

    Returns:
        Whether the environment has a ``sitecustomize`` of its own. It was imported.
    """
    native = _load_native()
    zygote = native.Zygote()
    began_ns = _now_ns()
    configuration = zygote.receive()
    if configuration is None:
        os._exit(0)
    count, *fields = configuration.decode(errors="surrogateescape").split("\0")
    path = fields[: int(count)]
    python_path, in_background, *imports = fields[int(count) :]
    if python_path == _UNSET:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = python_path
    before = dict(os.environ)
    sys._ferroelastic_warm = "zygote"  # type: ignore[attr-defined]  # noqa: SLF001 - read by ferroelastic.warm
    try:
        if in_background:
            _lower_priority()
        descriptors = _descriptors()
        folder = os.stat(".")
        has_sitecustomize = _import_sitecustomize()
        _import_all(imports, path)
        _check_state(descriptors, folder)
        zygote.report_ready(_imported_files(began_ns))
        import gc

        gc.collect()
        gc.freeze()
    except BaseException as error:  # noqa: BLE001 - an import may raise anything
        zygote.report_refusal(str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}")
        os._exit(1)
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    removed = list(before.keys() - os.environ.keys())
    while True:
        count = zygote.next_order()
        if count is None:
            os._exit(0)
        for _ in range(count):
            try:
                is_child = zygote.fork()
            except OSError as error:
                zygote.report_shortage(str(error))
                break
            if is_child:
                _park(zygote, changed, removed)
                return has_sitecustomize


def _load_native() -> ModuleType:
    """Return the native module. It is not left in ``sys.modules``."""
    import _frozen_importlib as bootstrap
    import _frozen_importlib_external as external
    import _imp

    name = "ferroelastic._rust"
    package = __file__.rpartition("/")[0].rpartition("/")[0]
    suffix = next(suffix for suffix in _imp.extension_suffixes() if os.path.exists(f"{package}/_rust{suffix}"))
    path = f"{package}/_rust{suffix}"
    loader = external.ExtensionFileLoader(name, path)
    spec = external.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # noqa: S101 - for the type checker
    module = bootstrap.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules.pop(name, None)
    return module


def _now_ns() -> int:
    import time

    return time.time_ns()


def _lower_priority() -> None:
    """Let the workers of the first round run first.

    A process without privileges cannot take back a higher nice value. It can take back the nice value of its session's scheduling group,
    and a child leaves this group with its own session. Both calls have no effect on kernels without them.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        with open("/proc/self/autogroup", "w") as autogroup:
            autogroup.write("19")
    except OSError:
        pass


def _import_sitecustomize() -> bool:
    """Import the ``sitecustomize`` that the interpreter would have imported; return whether there is one."""
    sys.modules.pop("sitecustomize", None)
    try:
        __import__("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        return False
    return True


def _import_all(imports: list[str], path: list[str]) -> None:
    """Import modules and call functions, with the ``sys.path`` of the worker."""
    before = list(sys.path)
    sys.path[:0] = path
    is_function = sys.argv[:1] == ["-c"]
    if is_function:
        imports = [*imports, "multiprocessing.spawn", "ferroelastic.multiprocessing._entry"]
    elif sys.argv[:1] == ["-m"]:
        imports = [*imports, "runpy"]  # the interpreter itself imports it
    for target in imports:
        name, _, function = target.partition(":")
        try:
            __import__(name)
            called: Any = sys.modules[name]
            for part in function.split(".") if function else ():
                called = getattr(called, part)
            if function:
                called()
        except BaseException as error:  # noqa: BLE001 - an import may raise anything
            raise Refusal(f"{'calling' if function else 'importing'} {target} failed: {_describe(error)}") from None
    for entry in path:
        sys.path.remove(entry)
    if is_function and sys.path != before:
        raise Refusal("the imports have changed sys.path, which multiprocessing replaces in its processes")


def _describe(error: BaseException) -> str:
    """Return type, text and last frame of an exception in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    trace, last = error.__traceback__, None
    while trace is not None:
        if "importlib" not in trace.tb_frame.f_code.co_filename and trace.tb_frame.f_globals is not globals():
            last = trace
        trace = trace.tb_next
    if last is None:
        return text
    return f"{text} ({last.tb_frame.f_code.co_filename}:{last.tb_lineno})"


def _descriptors() -> dict[int, str]:
    """Return the open descriptors and their files."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # noqa: PERF203 - the descriptor of the listing itself
            continue
    return found


def _check_state(descriptors: dict[int, str], folder: os.stat_result) -> None:
    """Check that a fork has the state that a new process with these imports has.

    Raises:
        Refusal: the imports have left something that a fork does not copy, or copies although it must not be shared.
    """
    torch = sys.modules.get("torch")
    for device in ("cuda", "xpu"):
        module = getattr(torch, device, None)
        if module is not None and module.is_initialized():
            raise Refusal(f"the imports have initialised {device}, which a forked process cannot use")
    for number, target in _descriptors().items():
        if descriptors.get(number) != target:
            raise Refusal(f"the imports have left descriptor {number} open ({target})")
    _check_processes()
    tools = getattr(sys, "monitoring", None)
    if sys.gettrace() or sys.getprofile() or (tools and any(tools.get_tool(number) for number in range(6))):
        raise Refusal("a tracer, profiler or coverage tool runs in the interpreter")
    now = os.stat(".")
    if (now.st_dev, now.st_ino) != (folder.st_dev, folder.st_ino):
        raise Refusal("the imports have changed the working directory")
    import signal

    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        if signal.getitimer(timer)[0]:
            raise Refusal("the imports have started a timer of the process, which a fork does not copy")


def _check_processes() -> None:
    """Check that the imports have left neither threads nor child processes."""
    own = str(os.getpid())
    threads = [thread for thread in os.listdir("/proc/self/task") if thread != own]
    names = []
    for thread in threads:
        with open(f"/proc/self/task/{thread}/comm") as comm:
            names.append(comm.read().strip())
    if names:
        raise Refusal(
            f"the imports have started {len(names)} thread(s) ({', '.join(names)}), which a fork does not copy"
        )
    try:
        with open(f"/proc/self/task/{own}/children") as file:
            children = file.read().split()
    except OSError:  # a kernel without this file
        return
    if children:
        raise Refusal(f"the imports have started process {children[0]}, which would not be a child of the worker")


def _imported_files(began_ns: int) -> list[str]:
    """Return the files of all modules and of the interpreter.

    Raises:
        Refusal: a file has changed since the start of this process.
    """
    files = {sys.executable}
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        origin = getattr(spec, "origin", None) if getattr(spec, "has_location", False) else None
        if isinstance(origin, str) and origin.startswith("/"):
            files.add(origin)
    for file in files:
        try:
            changed_ns = os.stat(file).st_mtime_ns
        except OSError:
            continue
        if changed_ns >= began_ns - _CLOCK_TICK_NS:
            raise Refusal(f"{file} has changed during the imports")
    return sorted(files)


def _park(zygote: Any, changed: dict[str, str], removed: list[str]) -> None:
    """Wait in a child for the release, and take over the worker's command. Returns in a worker."""
    try:
        zygote.separate()
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        _renew_secrets()
        _rehearse()
        command = zygote.park()
    except BaseException as error:  # noqa: BLE001 - nothing may reach the script
        _fail(error)
    if command is None:
        os._exit(0)
    argv, env = command
    try:
        _set_environment({**dict(env), **changed}, removed)
        # The interpreter's own options come before the script or module, and are those of the zygote.
        first = len(sys.orig_argv) - len(sys.argv) + 1
        sys.argv[1:] = argv[first:]
        sys.orig_argv[:] = argv
        _open_streams()
        sys._ferroelastic_warm = "worker"  # type: ignore[attr-defined]  # noqa: SLF001 - as above
    except BaseException as error:  # noqa: BLE001 - as above
        _fail(error)
    functions = sys.modules.get("ferroelastic.warm")
    if functions is not None:
        try:
            functions._call_all()  # noqa: SLF001 - the other half of this module
        except BaseException as error:  # noqa: BLE001 - a function may raise anything
            os.write(
                2,
                f"ferroelastic: a function of at_release failed, starting without warm imports: {_describe(error)}\n".encode(),
            )
            os.execve(argv[0], argv, dict(env))  # noqa: S606 - no shell is wanted


def _fail(error: BaseException) -> None:
    """End a child that cannot become a worker. Standard error is the worker's, or ``/dev/null``."""
    os.write(2, f"ferroelastic: a warm worker failed to start: {type(error).__name__}: {error}\n".encode())
    os._exit(127)


def _renew_secrets() -> None:
    """Give the child the random states that a new process has. Python's ``random`` renews its own state after a fork.

    torch's generators start with a fixed seed in every process.
    """
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)


def _rehearse() -> None:
    """Do the work of a release once, so that its memory pages are the child's own."""
    _open_streams()
    _set_environment(dict(os.environ), [])
    exec(compile("_ = 0", "<rehearsal>", "exec"), {})  # noqa: S102 - the interpreter compiles the script in the same way


def _set_environment(env: dict[str, str], removed: list[str]) -> None:
    os.environ.clear()
    for name, value in env.items():
        if name not in removed:
            os.environ[name] = value


def _open_streams() -> None:
    """Create ``sys.stdin``, ``sys.stdout`` and ``sys.stderr`` for the current descriptors, as the interpreter does at its start."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = _open_stream(number, name, mode)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _open_stream(number: int, name: str, mode: str) -> io.TextIOWrapper:
    former = getattr(sys, f"__{name}__")
    is_unbuffered = bool(getattr(sys.__stdout__, "write_through", False))  # no attribute of `sys.flags` tells it
    buffering = 0 if is_unbuffered and mode == "w" else -1
    buffer: Any = io.open(number, f"{mode}b", buffering, closefd=False)  # noqa: SIM115, UP020 - `open` may have been replaced
    raw: Any = getattr(buffer, "raw", buffer)
    raw.name = f"<{name}>"
    stream: Any = io.TextIOWrapper(
        buffer,
        former.encoding,
        former.errors,
        newline="\n",
        line_buffering=not is_unbuffered and (raw.isatty() or number == 2),  # noqa: PLR2004 - standard error
        write_through=is_unbuffered,
    )
    stream.mode = mode
    return stream  # type: ignore[no-any-return]  # attributes of it are set, which its type forbids
