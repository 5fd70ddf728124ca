"""What a user can say about the native rendezvous, and where it is hosted."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ferroelastic._ports import NO_OWNER, port_owner
from ferroelastic._text import endpoint_text
from ferroelastic.rendezvous._store_server import LOOPBACK, start_store
from ferroelastic.rendezvous.api import RendezvousConnectionError
from ferroelastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from ferroelastic import _rust
    from ferroelastic.rendezvous.api import RendezvousParameters

__all__ = ["DEFAULT_STATIC_TIMEOUT_S", "NativeSettings"]

logger = get_logger(__name__)

_DEFAULT_PORT = 29400
DEFAULT_STATIC_TIMEOUT_S = 900
"""Default of the option ``timeout`` in seconds.

torch has two defaults: 900 in its launcher, which torchrun and ``elastic_launch`` use, and 600 for parameters that a program makes by
hand. Here it is the launcher's for both.
"""
_OF_C10D = ("join_timeout", "last_call_timeout", "close_timeout", "read_timeout", "is_host", "store_type")
_OF_STATIC = ("rank", "timeout")
_OF_BOTH = ("heartbeat_timeout", "heartbeat", "keep_alive_interval", "keep_alive_max_attempt", "max_membership_changes")
_KNOWN_OPTIONS = (*_OF_C10D, *_OF_STATIC, *_OF_BOTH)


class NativeSettings:
    """What the parameters say, with torch's names and defaults.

    Args:
        params: what the user said.

    Raises:
        ValueError: one is wrong.
    """

    def __init__(self, params: RendezvousParameters) -> None:
        is_static = params.backend == "static"
        host, port = parse_rendezvous_endpoint(params.endpoint, default_port=-1 if is_static else _DEFAULT_PORT)
        self.host, self.port = host, port
        self.node_rank: int | None = None
        self.is_host: bool | None = None
        if is_static:
            self.node_rank = _node_rank(params)
            if not params.endpoint.strip():
                raise ValueError("the static rendezvous has no endpoint; give --master-addr and --master-port")
            if port == -1:
                raise ValueError(f"the endpoint {params.endpoint!r} has no port; give --master-port")
            self.join_timeout_s = self.connect_timeout_s = _seconds(params, "timeout", DEFAULT_STATIC_TIMEOUT_S)
            # All of them or none.
            self.may_host = self.is_host = self.node_rank == 0
        else:
            self.is_host = _truth(params, "is_host")
            self.join_timeout_s = _seconds(params, "join_timeout", 600)
            self.connect_timeout_s = _seconds(params, "read_timeout", 60)
            self.may_host = _matches_machine_hostname(host) if self.is_host is None else self.is_host
        self.last_call_s = _seconds(params, "last_call_timeout", 30)
        self.silence_s = _silence_s(params)
        _seconds(params, "close_timeout", 1)
        what = "number of membership changes; give a whole number from 0"
        self.most_membership_changes = _number(params, "max_membership_changes", None, 0, what)
        self.is_alone = params.max_nodes == 1
        for key in sorted(params.config.keys() - {*_KNOWN_OPTIONS}):
            logger.warning(
                "the rendezvous option %s=%r is none of this rendezvous and has no use; there are %s",
                *(key, params.get(key), ", ".join(_KNOWN_OPTIONS)),
            )

    def listen(self, run_id: str, nodes: tuple[int, int], address: str | None) -> _rust.StoreServer | None:
        """Host the rendezvous; ``None`` if another process of this machine does already.

        Raises:
            RendezvousConnectionError: the port cannot be listened at.
        """
        # Where nobody else can come, if that is what the endpoint and the workers are told.
        loopback = LOOPBACK.get(self.host)
        try:
            return start_store(
                self.port,
                loopback=loopback if LOOPBACK.get(address or self.host) == loopback else None,
                run_id=run_id,
                min_nodes=nodes[0],
                max_nodes=nodes[1],
                last_call_s=self.last_call_s,
                silence_s=self.silence_s,
                address=address,
                most_membership_changes=self.most_membership_changes,
            )
        except OSError as error:
            is_in_use = error.errno == errno.EADDRINUSE
            if is_in_use and self.is_host is None and not self.is_alone:
                # One of several agents on this machine: the first one hosts.
                return None
            reason = _owner_of(self.port) if is_in_use else error
            raise RendezvousConnectionError(
                f"the rendezvous cannot be hosted at {endpoint_text(self.host, self.port)}: {reason}"
            ) from error


def _owner_of(port: int) -> str:
    owner = port_owner(port) or NO_OWNER
    return f"the port is in use by {owner}; choose another one"


def _number(params: RendezvousParameters, key: str, default: int | None, least: int, what: str) -> int | None:
    """Return an option as a number, which is ``least`` or more; ``what`` it is not otherwise, and what to do about it."""
    if params.get(key) is None:
        return default
    try:
        number = params.get_as_int(key)
    except (OverflowError, TypeError, ValueError):
        number = None
    if number is None or number < least:
        raise ValueError(f"the rendezvous option {key}={params.get(key)!r} is no {what}")
    return number


def _seconds(params: RendezvousParameters, key: str, default: int) -> int:
    return _number(params, key, default, 1, "time; give whole seconds from 1") or default


def _silence_s(params: RendezvousParameters) -> int:
    """Return after how many seconds of silence a node is lost. The option that is closest to it counts; the defaults are torch's."""
    attempts = _number(params, "keep_alive_max_attempt", 3, 1, "number of attempts; give a whole number from 1")
    silence_s = _seconds(params, "keep_alive_interval", 5) * (attempts or 1)
    return _seconds(params, "heartbeat_timeout", _seconds(params, "heartbeat", silence_s))


def _truth(params: RendezvousParameters, key: str) -> bool | None:
    try:
        return params.get_as_bool(key)
    except ValueError:
        raise ValueError(
            f"the rendezvous option {key}={params.get(key)!r} is neither true nor false; give 1 or 0"
        ) from None


def _node_rank(params: RendezvousParameters) -> int:
    if params.get("rank") is None:
        raise ValueError("the static rendezvous has no rank of this node; give --node-rank")
    most = params.max_nodes - 1
    rank = _number(params, "rank", None, 0, f"rank of a node; give --node-rank from 0 to {most}")
    if rank is None or rank > most:
        raise ValueError(
            f"the rendezvous option rank={rank} is no rank of {most + 1} nodes; give --node-rank from 0 to {most}"
        )
    return rank
