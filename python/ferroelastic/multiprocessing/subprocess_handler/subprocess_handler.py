"""One worker that runs a command. Mirrors ``torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler``.

Differences:

* ``proc`` is a native process with the methods of ``subprocess.Popen`` that an agent uses.
* ``close`` signals the process group also after its leader has ended, and does not raise for an empty group.
* ``numa_options`` has a default, because torch before 2.9 does not have this argument.
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
        args: arguments of the program, converted to strings.
        env: environment variables, added to the environment of this process.
        stdout: path of a file for standard output, created or truncated. Empty or ``None`` inherits the stream of this process.
        stderr: the same for standard error.
        local_rank_id: local rank of the worker.
        numa_options: NUMA binding; ``None`` does not bind the worker.

    Raises:
        OSError: the program cannot be started, or a file cannot be opened.

    Attributes:
        proc: the process.
        local_rank_id: local rank of the worker.
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
        """Return a handler for one process of a running group. Not in torch.

        Args:
            group: the group.
            index: index of the process in the group, also its local rank.
            argv: argument vector of the process.
        """
        handler = cls.__new__(cls)
        handler._attach(group, index, argv, index)  # noqa: SLF001 - a constructor of this class
        return handler

    def _attach(self, group: _rust.Group, index: int, argv: Sequence[str], local_rank_id: int) -> None:
        self._group = group
        self._index = index
        self.local_rank_id = local_rank_id
        self.proc = NativeProcess(group, index, argv)

    def close(self, death_sig: signal.Signals | None = None) -> None:
        """Send a signal to the whole process group and return without waiting.

        Args:
            death_sig: the signal; SIGTERM by default.
        """
        self._group.signal(self._index, death_sig or signal.SIGTERM)
