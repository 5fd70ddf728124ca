"""Mirror of ``torch.distributed.elastic.multiprocessing.subprocess_handler.handlers``; no intended differences."""

from __future__ import annotations

from typing import Any

from ferroelastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from ferroelastic.numa.binding import NumaOptions

__all__ = ["NumaOptions", "get_subprocess_handler"]


def get_subprocess_handler(
    entrypoint: str,
    args: tuple[Any, ...],
    env: dict[str, str],
    stdout: str,
    stderr: str,
    local_rank_id: int,
    numa_options: NumaOptions | None = None,
) -> SubprocessHandler:
    """Start one worker. Mirrors torch's ``get_subprocess_handler``. The arguments are those of :class:`SubprocessHandler`."""
    return SubprocessHandler(entrypoint, args, env, stdout, stderr, local_rank_id, numa_options)
