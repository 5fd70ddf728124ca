"""Processes of the start method ``spawn`` that were parked in a pool of warm workers."""

from __future__ import annotations

import copyreg
import io
import os
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnProcess, set_spawning_popen
from typing import TYPE_CHECKING, Any

from ferroelastic._warm.target import PIPE_FD, TRACKER_FD, spawn_command

if TYPE_CHECKING:
    from ferroelastic import _rust

__all__ = ["WarmProcess"]


class WarmProcess(SpawnProcess):
    """A process of the start method ``spawn``. It is a parked process of a pool, or a new process if none is parked.

    Args:
        pool: zygote and parked processes for function workers.
        arguments: arguments of ``multiprocessing.Process``.
    """

    def __init__(self, pool: _rust.WarmPool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.name = self.name.replace(WarmProcess.__name__, SpawnProcess.__name__)
        self._pool = pool

    def __reduce__(self) -> tuple[Any, ...]:
        # The worker has an object of the usual class.
        state = {name: value for name, value in vars(self).items() if name != "_pool"}
        return copyreg._reconstructor, (SpawnProcess, object, None), state  # type: ignore[attr-defined] # noqa: SLF001

    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:  # noqa: N802 - the name in multiprocessing
        return _Popen(process_obj)


class _Popen(popen_spawn_posix.Popen):
    """The start of a process. It equals that of the base class, except for the source of the process."""

    _fds: list[int]

    def _launch(self, process_obj: Any) -> None:
        tracker_fd: Any = resource_tracker.getfd()
        preparation = spawn.get_preparation_data(process_obj._name)  # noqa: SLF001 - as the base class does
        data = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, data)
            reduction.dump(process_obj, data)
        finally:
            set_spawning_popen(None)
        parent_r, child_w = os.pipe()
        own, of_child = [parent_r], [child_w]
        try:
            child_r, parent_w = os.pipe()
            own.append(parent_w)
            of_child.append(child_r)
            self._fds.append(child_w)
            self.pid = self._start(process_obj._pool, tracker_fd, child_r)  # noqa: SLF001 - of this module
            self.sentinel = parent_r
            with open(parent_w, "wb", closefd=False) as pipe:
                pipe.write(data.getbuffer())
        finally:
            self.finalizer = util.Finalize(self, util.close_fds, own)  # type: ignore[attr-defined]
            for fd in of_child:
                os.close(fd)

    def _start(self, pool: _rust.WarmPool, tracker_fd: int, pipe_fd: int) -> int:
        from ferroelastic import _rust

        if max(self._fds) < TRACKER_FD:
            descriptors = {**{fd: fd for fd in self._fds}, TRACKER_FD: tracker_fd, PIPE_FD: pipe_fd}
            pid = pool.release(_rust.Command(spawn_command(), dict(os.environ)), descriptors)
            if pid is not None:
                return pid
        command = spawn.get_command_line(tracker_fd=tracker_fd, pipe_handle=pipe_fd)
        executable: Any = spawn.get_executable()
        return util.spawnv_passfds(executable, command, [*self._fds, tracker_fd, pipe_fd])
