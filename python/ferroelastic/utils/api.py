"""Mirror of ``torch.distributed.elastic.utils.api``; no intended differences."""

from __future__ import annotations

import os
import socket
from string import Template
from typing import Any

__all__ = ["get_env_variable_or_raise", "get_socket_with_port", "macros"]


def get_env_variable_or_raise(env_name: str) -> str:
    """Return the value of an environment variable.

    Args:
        env_name: name of the variable.

    Raises:
        ValueError: the variable is not set.
    """
    value = os.environ.get(env_name)
    if value is None:
        raise ValueError(f"Environment variable {env_name} expected, but not set")
    return value


def get_socket_with_port() -> socket.socket:
    """Return a socket that listens on a free port of localhost.

    The port stays reserved until the caller closes the socket.

    Raises:
        RuntimeError: no address of localhost could be bound.
    """
    last_error: OSError | None = None
    for family, kind, proto, _, _ in socket.getaddrinfo("localhost", None, socket.AF_UNSPEC, socket.SOCK_STREAM):
        try:
            listener = socket.socket(family, kind, proto)
        except OSError as error:  # the kernel does not support the address family
            last_error = error
            continue
        try:
            listener.bind(("localhost", 0))
            listener.listen(0)
        except OSError as error:
            listener.close()
            last_error = error
        else:
            return listener
    raise RuntimeError("Failed to create a socket") from last_error


class macros:  # noqa: N801 - torch's name
    """Macros in the arguments of workers. Mirrors ``torch.distributed.elastic.utils.api.macros``."""

    local_rank = "${local_rank}"

    @staticmethod
    def substitute(args: list[Any], local_rank: str) -> list[Any]:
        """Replace ``${local_rank}`` in every string of ``args``. Other values and unknown macros stay unchanged."""
        return [Template(arg).safe_substitute(local_rank=local_rank) if isinstance(arg, str) else arg for arg in args]
