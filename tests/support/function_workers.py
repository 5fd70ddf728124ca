"""Workers that run a function: contexts that end with a ``with`` block, and workers that are held after they returned."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.support.waiting import eventually

from ferroelastic.multiprocessing import DefaultLogsSpecs, MultiprocessContext, RunProcsResult, Std, start_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

METHODS = ["fork", "spawn", "forkserver"]
NUMBER_OF_READ = 0 if platform.machine() == "x86_64" else 63


@contextmanager
def started(
    log_dir: Path, method: str, function: Callable[..., Any], *args: tuple[Any, ...], **options: Any
) -> Iterator[MultiprocessContext]:
    env = options.pop("env", {})
    specs = DefaultLogsSpecs(str(log_dir / "logs"), options.pop("redirects", Std.NONE), options.pop("tee", Std.NONE))
    context = start_processes(
        name="fn",
        entrypoint=function,
        args=dict(enumerate(args)),
        envs={rank: {"RANK": str(rank), **env} for rank in range(len(args))},
        logs_specs=specs,
        start_method=method,
        **options,
    )
    assert isinstance(context, MultiprocessContext)
    try:
        yield context
    finally:
        context.close(signal.SIGKILL, 0)


def finished(context: MultiprocessContext) -> RunProcsResult:
    result = context.wait(120)
    assert result is not None
    return result


def run(
    log_dir: Path, method: str, function: Callable[..., Any], *args: tuple[Any, ...], **options: Any
) -> RunProcsResult:
    with started(log_dir, method, function, *args, **options) as context:
        return finished(context)


def content(path: str | Path) -> str:
    with open(path) as file:
        return file.read()


def show_pid_and_sleep(path: str) -> None:
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(1000)


def is_held(pid: int) -> bool:
    """Whether a process waits in the read of an eventfd."""
    with suppress(OSError, ValueError):  # it has ended; it runs
        with open(f"/proc/{pid}/syscall") as file:
            number, descriptor, *_ = file.read().split()
        return (
            number == str(NUMBER_OF_READ)
            and os.readlink(f"/proc/{pid}/fd/{int(descriptor, 16)}") == "anon_inode:[eventfd]"
        )
    return False


def return_or_follow(folder: str, how: str) -> None:
    """All ranks but the last return, with a handler for SIGTERM that does nothing. The last one waits at a FIFO, and does ``how``."""
    rank = int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, lambda *_: None)
    if rank < int(os.environ["LAST"]):
        with open(os.path.join(folder, f"pid of {rank}"), "w") as file:
            file.write(str(os.getpid()))
        if how == "exits":
            sys.exit(0)
        if how == "is killed":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    with open(os.path.join(folder, "gate")):
        pass
    if how == "fails":
        sys.exit(7)
    if how == "leaves":
        os._exit(0)


@contextmanager
def held(folder: Path, method: str, how: str, number: int = 3, **options: Any) -> Iterator[MultiprocessContext]:
    """Workers of which all but the last have returned and are held."""
    os.mkfifo(folder / "gate")
    arguments = [(str(folder), how)] * number
    with started(folder, method, return_or_follow, *arguments, env={"LAST": str(number - 1)}, **options) as context:
        for rank in range(number - 1):
            pid = context.pids()[rank]
            assert eventually(partial(is_held, pid), 60), rank
        yield context
