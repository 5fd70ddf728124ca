"""Mirror of ``torch.distributed.elastic.utils.api``; no intended differences."""

from __future__ import annotations

import os
import socket
from string import Template
from typing import Any

from ferroelastic import _torch

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
    """Return a socket that is bound to a free port. The port stays reserved until the caller closes the socket.

    The socket is bound to all addresses of this host, IPv4 and IPv6 if the kernel has both, because the port must be free on each address
    that its user may bind. It does not listen: a peer must not connect to it instead of that user. With torch before 2.15 it listens on
    localhost, as torch's.

    Raises:
        RuntimeError: no address could be bound.
    """
    listens = _torch.is_older_than(2, 15)
    last_error: OSError | None = None
    for family, host in _localhost_addresses() if listens else ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):  # noqa: S104
        try:
            reserved = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # the kernel does not support the address family
            last_error = error
            continue
        try:
            if host == "::":
                reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            reserved.bind((host, 0))
            if listens:
                reserved.listen(0)
        except OSError as error:
            reserved.close()
            last_error = error
        else:
            return reserved
    raise RuntimeError("Failed to create a socket") from last_error


def _localhost_addresses() -> list[tuple[int, str]]:
    found = socket.getaddrinfo("localhost", None, socket.AF_UNSPEC, socket.SOCK_STREAM)
    return [(family, "localhost") for family, *_ in found]


class macros:  # noqa: N801 - torch's name
    """Macros in the arguments of workers. Mirrors ``torch.distributed.elastic.utils.api.macros``."""

    local_rank = "${local_rank}"

    @staticmethod
    def substitute(args: list[Any], local_rank: str) -> list[Any]:
        """Replace ``${local_rank}`` in every string of ``args``. Other values and unknown macros stay unchanged."""
        return [Template(arg).safe_substitute(local_rank=local_rank) if isinstance(arg, str) else arg for arg in args]
