"""One worker started from a command; mirrors ``torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler``.

Differences: ``proc`` is a native process with the part of ``subprocess.Popen`` that an agent uses, and ``close`` reaches the
process group also after its leader has ended, and does not raise when nobody is left in it. ``numa_options`` has a default: it is
absent in torch before 2.9, and code written for those versions does not pass it.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from ferroelastic.multiprocessing._processes import NativeProcess, make_command, spawn
from ferroelastic.numa.binding import NumaOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferroelastic import _rust

__all__ = ["NumaOptions", "SubprocessHandler"]


class SubprocessHandler:
    """A running worker and its process group. Mirrors torch's ``SubprocessHandler``.

    Args:
        entrypoint: program.
        args: its arguments, turned into strings.
        env: added to this process's environment.
        stdout: file for standard output, made or emptied; empty or ``None`` inherits.
        stderr: likewise for standard error.
        local_rank_id: local rank of the worker.
        numa_options: CPUs to bind it to; ``None`` binds to none.

    Raises:
        OSError: the program cannot be started or a file not opened.
    """

    proc: NativeProcess

    def __init__(
        self,
        entrypoint: str,
        args: tuple[Any, ...],
        env: dict[str, str],
        stdout: str | None,
        stderr: str | None,
        local_rank_id: int,
        numa_options: NumaOptions | None = None,
    ) -> None:
        argv, command = make_command(entrypoint, args, env, stdout, stderr, local_rank_id, numa_options)
        self._groups: list[_rust.Group] = []
        spawn([command], self._groups)
        self._attach(self._groups[0], 0, argv, local_rank_id)

    @classmethod
    def of_group(cls, group: _rust.Group, index: int, argv: Sequence[str]) -> SubprocessHandler:
        """A view on one member of a group that somebody else has started."""
        handler = cls.__new__(cls)
        handler._attach(group, index, argv, index)  # noqa: SLF001 - a constructor of this class
        return handler

    def _attach(self, group: _rust.Group, index: int, argv: Sequence[str], local_rank_id: int) -> None:
        self._group = group
        self._index = index
        self.local_rank_id = local_rank_id
        self.proc = NativeProcess(group, index, argv)

    def close(self, death_sig: signal.Signals | None = None) -> None:
        """Send ``death_sig`` (SIGTERM if not given) to the whole process group; does not wait."""
        self._group.signal(self._index, death_sig or signal.SIGTERM)
