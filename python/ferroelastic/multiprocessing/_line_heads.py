"""The text before each line of a worker on the console."""

from __future__ import annotations

import json
import re
import socket
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MACROS", "TIME", "global_ranks", "json_heads", "prefix_of", "unknown_macros", "with_pids"]

TIME = "${time}"
"""Stands in a prefix for the time of the line. The engine replaces it."""
_PID = "${pid}"
"""Stands in a prefix for the process id of the worker until the worker has started."""

MACROS = ("role_name", "rank", "local_rank", "hostname", "pid", "round", "time")
"""Names in a template. The last three are not in torch."""


def unknown_macros(template: str) -> list[str]:
    """Return the parts of a template that look like a macro but are none, in order. They stay unchanged in the prefix."""
    return [
        template[found.start() : found.start() + 20] if found["invalid"] is not None else found[0]
        for found in re.finditer(Template.pattern, template)
        if found["escaped"] is None and (found["named"] or found["braced"]) not in MACROS
    ]


def prefix_of(template: str, role: str, rank: int, local_rank: int, restarts: int) -> str:
    """Return the prefix of a worker's lines, in which ``${time}`` and ``${pid}`` remain.

    Args:
        template: text with macros. Unknown ones stay unchanged.
        role: role of the worker.
        rank: global rank.
        local_rank: local rank.
        restarts: number of restarts after failures.
    """
    # The short name: a qualified one takes space in each line, and may be a record of the reverse lookup.
    return Template(template).safe_substitute(
        role_name=role,
        rank=rank,
        local_rank=local_rank,
        hostname=socket.gethostname(),
        round=restarts,
        pid=_PID,
        time=TIME,
    )


def with_pids(prefixes: Mapping[int, str], pids: Mapping[int, int]) -> dict[int, str]:
    """Replace ``${pid}`` in prefixes by local rank."""
    return {rank: prefix.replace(_PID, str(pids.get(rank, ""))) for rank, prefix in prefixes.items()}


def global_ranks(envs: Mapping[int, Mapping[str, str]]) -> dict[int, int]:
    """Return the global ranks of workers by local rank, from their environments. Without ``RANK``, it is the local rank."""
    return {local_rank: int(env.get("RANK", local_rank)) for local_rank, env in envs.items()}


def json_heads(stream: str, envs: Mapping[int, Mapping[str, str]]) -> dict[int, str]:
    """Return the beginnings of JSON objects for the lines of workers, by local rank. The content of the line follows.

    Args:
        stream: name of the stream.
        envs: environments of the workers by local rank.
    """
    host = socket.gethostname()
    return {
        local_rank: json.dumps(
            {
                "time": TIME,
                "rank": rank,
                "local_rank": local_rank,
                "host": host,
                "stream": stream,
                "round": int(envs[local_rank].get("TORCHELASTIC_RESTART_COUNT", 0)),
                "message": "",
            },
            separators=(",", ":"),
        ).removesuffix('"}')
        for local_rank, rank in global_ranks(envs).items()
    }
