"""The program of a zygote and of its children.

:func:`serve` imports the modules, then forks children at the agent's order. It returns only in a child, when the agent has released it.
A worker sees each import of this module in ``sys.modules``. So the module imports only modules that are loaded in every interpreter, and not
even ``__future__``.
"""

import _io  # `io` is not loaded in every interpreter
import _signal  # type: ignore[import-not-found]  # nor is `signal`
import os
import sys
import time

TYPE_CHECKING = False  # as in `typing`, which a worker may not have loaded
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

_FOLDER = __file__.rpartition("/")[0]

_UNSET = "\1"
"""Stands for a missing ``PYTHONPATH`` in the configuration."""

_CLOCK_TICK_NS = 10_000_000
"""Upper bound of the lag of file times behind the clock."""


class Refusal(Exception):  # noqa: N818 - a decision
    """The process cannot serve as a zygote. The text is the reason, as a fragment of a sentence."""


def serve(import_sitecustomize: "Callable[[], bool]") -> bool:
    """Run the zygote, and return in a released child.

    Args:
        import_sitecustomize: imports the ``sitecustomize`` that the interpreter would have imported; returns whether there is one.

    Returns:
        Whether the environment has a ``sitecustomize`` of its own. It was imported.
    """
    native = _load_native()
    zygote = native.Zygote()
    began_ns = time.time_ns()
    configuration = zygote.receive()
    if configuration is None:
        os._exit(0)
    count, *fields = configuration.decode(errors="surrogateescape").split("\0")
    path = fields[: int(count)]
    python_path, in_background, of_worker, *imports = fields[int(count) :]
    if python_path == _UNSET:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = python_path
    before = dict(os.environ)
    sys._ferroelastic_warm = "zygote"  # type: ignore[attr-defined]  # noqa: SLF001 - read by ferroelastic.warm
    try:
        has_own_policy = bool(in_background) and _lower_priority()
        descriptors = _descriptors()
        folder = os.stat(".")
        has_sitecustomize = import_sitecustomize()
        _forbid_reads(of_worker.split(","), lambda: _import_all(imports, path))
        _check_state(descriptors, folder)
        _flush_streams()
        zygote.report_ready(_imported_files(began_ns))
        _freeze(zygote)
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
                _park(zygote, changed, removed, has_own_policy=has_own_policy)
                return has_sitecustomize


def _load_native() -> "ModuleType":
    """Return the native module. It is not left in ``sys.modules``."""
    import _frozen_importlib as bootstrap
    import _frozen_importlib_external as external
    import _imp

    name = "ferroelastic._rust"
    package = _FOLDER.rpartition("/")[0]
    suffix = next(suffix for suffix in _imp.extension_suffixes() if os.path.exists(f"{package}/_rust{suffix}"))
    path = f"{package}/_rust{suffix}"
    loader = external.ExtensionFileLoader(name, path)
    spec = external.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # noqa: S101 - for the type checker
    module = bootstrap.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules.pop(name, None)
    return module


_kept: "list[ModuleType]" = []


def _is_of_user(module: "ModuleType") -> bool:
    """Whether the module is not part of Python or of an installed package."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or "/site-packages/" in file or "/dist-packages/" in file:
        return False
    return not file.startswith((f"{sys.prefix}/", os.path.dirname(os.__file__)))


def _freeze(zygote: "Any") -> None:
    """Keep the garbage collector of the children away from the objects of the zygote, whose memory pages all share.

    When the interpreter ends, it could then not delete the objects that the script keeps in modules, such as files with unwritten data. So
    the script's own module is given back to the collector. References keep the modules of the user, whose dictionaries the interpreter then
    clears without the collector.
    """
    _kept.extend(module for module in sys.modules.values() if _is_of_user(module))
    is_loaded = "gc" in sys.modules
    import gc

    gc.collect()
    gc.freeze()
    if not is_loaded:
        del sys.modules["gc"]
    zygote.track_module(sys.modules["__main__"])


def _lower_priority() -> bool:
    """Let the workers of the first round run first. Return whether the scheduling policy has changed.

    A process without privileges cannot take back a higher nice value. It can take back the nice value of its session's scheduling group,
    and a child leaves this group with its own session. Both calls have no effect on kernels without them.
    """
    try:
        with open("/proc/self/autogroup", "w") as autogroup:
            autogroup.write("19")
    except OSError:
        pass
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False  # the workers have this policy too
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        return False
    return True


def _forbid_reads(names: list[str], body: "Callable[[], None]") -> None:
    """Call ``body``, during which Python code must not look up the environment variables ``names``.

    Raises:
        Refusal: a variable was looked up. A module has the value of none of the workers then.
    """
    kind: Any = type(os.environ)
    former = kind.__getitem__
    read: list[str] = []

    def look_up(self: "Any", name: str) -> str:
        if name in names:
            read.append(name)
        value: str = former(self, name)
        return value

    kind.__getitem__ = look_up
    try:
        body()
    finally:
        kind.__getitem__ = former
    if read:
        raise Refusal(f"the imports have read the environment variable {read[0]}, which is set for each worker")


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
        try:
            import_target(target)
        except BaseException as error:  # noqa: BLE001, PERF203 - an import may raise anything
            what = describe(error)
            raise Refusal(
                f"calling {target} failed: {what}" if ":" in target else f"importing {target} failed: {what}"
            ) from None
    for entry in path:
        sys.path.remove(entry)
    if is_function and sys.path != before:
        raise Refusal("the imports have changed sys.path, which multiprocessing replaces in its processes")


def import_target(target: str) -> None:
    """Import a module, or with ``package.module:function`` also call the function."""
    name, _, function = target.partition(":")
    __import__(name)
    called: Any = sys.modules[name]
    for part in function.split(".") if function else ():
        called = getattr(called, part)
    if function:
        called()


def describe(error: BaseException) -> str:
    """Return type, text and last frame of an exception in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    trace, last = error.__traceback__, None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "importlib" not in file and not file.startswith(f"{_FOLDER}/"):
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


def _loaded_files() -> set[str]:
    """Return the files of programs and libraries that are mapped into this process."""
    with open("/proc/self/maps") as maps:
        mappings = [line.rstrip("\n").split(maxsplit=5) for line in maps]
    return {path[0] for _, permissions, _, _, _, *path in mappings if path and "x" in permissions}


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
        # libffi, which `ctypes` loads, may keep its own file open to map it again. Nobody reads from such a descriptor.
        if descriptors.get(number) != target and target not in _loaded_files():
            raise Refusal(f"the imports have left descriptor {number} open ({target})")
    _check_processes()
    tools = getattr(sys, "monitoring", None)
    if sys.gettrace() or sys.getprofile() or (tools and any(tools.get_tool(number) for number in range(6))):
        raise Refusal("a tracer, profiler or coverage tool runs in the interpreter")
    now = os.stat(".")
    if (now.st_dev, now.st_ino) != (folder.st_dev, folder.st_ino):
        raise Refusal("the imports have changed the working directory")
    for timer in (_signal.ITIMER_REAL, _signal.ITIMER_VIRTUAL, _signal.ITIMER_PROF):
        if _signal.getitimer(timer)[0]:
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
            f"the imports have started {len(names)} thread(s) ({', '.join(names)}), which a fork does not copy; "
            "OMP_NUM_THREADS=1 prevents those of math libraries"
        )
    try:
        with open(f"/proc/self/task/{own}/children") as file:
            children = file.read().split()
    except OSError:  # a kernel without this file
        return
    if children:
        raise Refusal(f"the imports have started process {children[0]}, which would not be a child of the worker")


def _imported_files(began_ns: int) -> list[str]:
    """Return the files of all modules and of the interpreter. An archive stands for the modules that it contains.

    Raises:
        Refusal: a file has changed since the start of this process.
    """
    paths: list[Any] = [sys.executable]
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        if getattr(spec, "has_location", False):
            paths.append(getattr(spec, "origin", None))
    # The importer of an archive keeps the places of all modules in it. A worker may import further ones.
    paths += [path for path, importer in sys.path_importer_cache.items() if hasattr(importer, "archive")]
    files = set()
    for path in {path for path in paths if isinstance(path, str) and path.startswith("/")}:
        file, changed_ns = _file_of(path)
        if changed_ns is None:
            continue
        if changed_ns >= began_ns - _CLOCK_TICK_NS:
            raise Refusal(f"{file} has changed during the imports")
        files.add(file)
    return sorted(files)


def _file_of(path: str) -> "tuple[str, int | None]":
    """Return the file at a path, or the archive that contains the path, and its modification time. ``None`` if there is neither."""
    try:
        return path, os.stat(path).st_mtime_ns
    except NotADirectoryError:  # a part of the path is a file
        return _file_of(os.path.dirname(path))
    except OSError:
        return path, None


def _park(zygote: "Any", changed: dict[str, str], removed: list[str], *, has_own_policy: bool) -> None:
    """Wait in a child for the release, and take over the worker's command. Returns in a worker."""
    try:
        zygote.separate()
        if has_own_policy:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        _renew_state()
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
        _renew_streams()
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
                f"ferroelastic: a function of at_release failed, starting without warm imports: {describe(error)}\n".encode(),
            )
            os.execve(argv[0], argv, dict(env))  # noqa: S606 - no shell is wanted


def _fail(error: BaseException) -> None:
    """End a child that cannot become a worker. Standard error is the worker's, or ``/dev/null``."""
    os.write(2, f"ferroelastic: a warm worker failed to start: {type(error).__name__}: {error}\n".encode())
    os._exit(127)


def _renew_state() -> None:
    """Give the child the random states and ids that a new process has. Python's ``random`` renews its own state after a fork."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)
    threading = sys.modules.get("threading")
    if threading is not None:
        threading.main_thread()._set_native_id()  # noqa: SLF001 - a fork keeps the id of the zygote's thread


def _rehearse() -> None:
    """Do the work of a release once, so that its memory pages are the child's own."""
    _renew_streams()
    _set_environment(dict(os.environ), [])
    exec(compile("_ = 0", "<rehearsal>", "exec"), {})  # noqa: S102 - the interpreter compiles the script in the same way


def _set_environment(env: dict[str, str], removed: list[str]) -> None:
    os.environ.clear()
    for name, value in env.items():
        if name not in removed:
            os.environ[name] = value


def _renew_streams() -> None:
    """Open ``sys.stdin``, ``sys.stdout`` and ``sys.stderr`` again for the current descriptors, as the interpreter does at its start.

    The objects stay the same, because imported modules may have kept them or have wrapped them. Only the raw files are new: they remember
    whether they are seekable.
    """
    for number, mode, stream in ((0, "r", sys.__stdin__), (1, "w", sys.__stdout__), (2, "w", sys.__stderr__)):
        if isinstance(stream, _io.TextIOWrapper) and not stream.closed:
            _renew_stream(stream, number, mode)


def _renew_stream(stream: _io.TextIOWrapper, number: int, mode: str) -> None:
    buffer: Any = stream.buffer
    is_unbuffered = stream.write_through  # no attribute of `sys.flags` tells it
    raw: Any = _io.FileIO(number, mode, closefd=False)
    raw.name = stream.name
    if isinstance(buffer, _io.FileIO):
        buffer = raw
    else:
        size = raw._blksize  # noqa: SLF001 - as `open` does
        if sys.version_info >= (3, 14):
            size = max(min(size, 8 * 1024 * 1024), _io.DEFAULT_BUFFER_SIZE)
        buffer.__init__(raw, size)
    is_line_buffered = stream.line_buffering or (not is_unbuffered and (raw.isatty() or number == 2))  # noqa: PLR2004
    arguments = (buffer, stream.encoding, stream.errors, "\n", is_line_buffered, is_unbuffered)
    stream.__init__(*arguments)  # type: ignore[misc]


def _flush_streams() -> None:
    """Write the output of the imports, which each child would write otherwise."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.closed:
            stream.flush()
