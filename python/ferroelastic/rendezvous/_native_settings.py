"""Options of the native rendezvous, and the start of its server."""

from __future__ import annotations

import errno
import math
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

torch has two defaults: 900 s in its launcher (torchrun and ``elastic_launch``) and 600 s in its handler. This package uses 900 s for both.
"""
_C10D_OPTIONS = (
    "join_timeout",
    "last_call_timeout",
    "close_timeout",
    "read_timeout",
    "is_host",
    "node_rank",
    "store_type",
    "cas_backoff_max_seconds",
)
_STATIC_OPTIONS = ("rank", "timeout")
_COMMON_OPTIONS = (
    "heartbeat_timeout",
    "heartbeat",
    "keep_alive_interval",
    "keep_alive_max_attempt",
    "max_membership_changes",
)
_KNOWN_OPTIONS = (*_C10D_OPTIONS, *_STATIC_OPTIONS, *_COMMON_OPTIONS)


class NativeSettings:
    """Checked parameters, with torch's option names and defaults.

    Args:
        params: parameters of the rendezvous.

    Raises:
        ValueError: a parameter is not valid.
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
            self.may_host = self.is_host = self.node_rank == 0
        else:
            self.is_host = _boolean(params, "is_host")
            # Not torch's name "rank", which c10d ignores.
            self.node_rank = _number(params, "node_rank", None, 0, "node rank; give a whole number from 0")
            self.join_timeout_s = _seconds(params, "join_timeout", 600)
            self.connect_timeout_s = _seconds(params, "read_timeout", 60)
            self.may_host = _matches_machine_hostname(host) if self.is_host is None else self.is_host
            _check_backoff(params)
        self.last_call_s = _seconds(params, "last_call_timeout", 30)
        self.heartbeat_timeout_s = _heartbeat_timeout_s(params)
        _seconds(params, "close_timeout", 1)
        what = "number of membership changes; give a whole number from 0"
        self.max_membership_changes = _number(params, "max_membership_changes", None, 0, what)
        self.is_alone = params.max_nodes == 1
        for key in sorted(params.config.keys() - {*_KNOWN_OPTIONS}):
            logger.warning(
                "ignoring unknown rendezvous option %s=%r; known options: %s",
                *(key, params.get(key), ", ".join(_KNOWN_OPTIONS)),
            )

    def listen(self, run_id: str, nodes: tuple[int, int], address: str | None) -> _rust.StoreServer | None:
        """Host the rendezvous; return ``None`` if another process of this machine hosts it.

        Args:
            run_id: run id of the job.
            nodes: minimum and maximum number of nodes.
            address: address of this node.

        Raises:
            RendezvousConnectionError: this process cannot listen on the port.
        """
        # Listen on loopback only if both the endpoint and the address for the workers are loopback.
        loopback = LOOPBACK.get(self.host)
        try:
            return start_store(
                self.port,
                loopback=loopback if LOOPBACK.get(address or self.host) == loopback else None,
                run_id=run_id,
                min_nodes=nodes[0],
                max_nodes=nodes[1],
                last_call_s=self.last_call_s,
                silence_s=self.heartbeat_timeout_s,
                address=address,
                max_membership_changes=self.max_membership_changes,
            )
        except OSError as error:
            is_in_use = error.errno == errno.EADDRINUSE
            if is_in_use and self.is_host is None and not self.is_alone:
                # Another agent on this machine hosts the rendezvous.
                return None
            reason = _port_in_use(self.port) if is_in_use else error
            raise RendezvousConnectionError(
                f"the rendezvous cannot be hosted at {endpoint_text(self.host, self.port)}: {reason}"
            ) from error


def _port_in_use(port: int) -> str:
    owner = port_owner(port) or NO_OWNER
    return f"the port is in use by {owner}; choose another one"


def _number(params: RendezvousParameters, key: str, default: int | None, minimum: int, what: str) -> int | None:
    """Return an option as a whole number.

    Args:
        params: parameters of the rendezvous.
        key: name of the option.
        default: value of an option that is not set.
        minimum: smallest valid value.
        what: text after "is not a valid" in the error message: the meaning of the number, and the valid values.

    Raises:
        ValueError: the option is not a whole number, or is less than ``minimum``.
    """
    if params.get(key) is None:
        return default
    try:
        number = params.get_as_int(key)
    except (OverflowError, TypeError, ValueError):
        number = None
    if number is None or number < minimum:
        raise ValueError(f"the rendezvous option {key}={params.get(key)!r} is not a valid {what}")
    return number


def _seconds(params: RendezvousParameters, key: str, default: int) -> int:
    return _number(params, key, default, 1, "time; give whole seconds from 1") or default


def _heartbeat_timeout_s(params: RendezvousParameters) -> int:
    """Return the heartbeat timeout in seconds, from the most specific option that is set. The defaults are torch's."""
    attempts = _number(params, "keep_alive_max_attempt", 3, 1, "number of attempts; give a whole number from 1")
    keep_alive_s = _seconds(params, "keep_alive_interval", 5) * (attempts or 1)
    return _seconds(params, "heartbeat_timeout", _seconds(params, "heartbeat", keep_alive_s))


def _check_backoff(params: RendezvousParameters) -> None:
    """Check the option ``cas_backoff_max_seconds`` as torch does, and report that it has no effect.

    Raises:
        ValueError: the option is not a finite number of seconds from 0.
    """
    value = params.get("cas_backoff_max_seconds", 0.0)
    try:
        backoff_s = float(value)
    except (TypeError, ValueError):
        backoff_s = math.nan
    if not math.isfinite(backoff_s) or backoff_s < 0:
        raise ValueError(
            f"the rendezvous option cas_backoff_max_seconds={value!r} is not a valid time; give finite seconds from 0"
        )
    if backoff_s > 0:
        logger.warning(
            "the rendezvous option cas_backoff_max_seconds=%s has no effect: only the host writes the state of this rendezvous, "
            "so no write fails and is repeated; remove the option",
            value,
        )


def _boolean(params: RendezvousParameters, key: str) -> bool | None:
    try:
        return params.get_as_bool(key)
    except ValueError:
        raise ValueError(
            f"the rendezvous option {key}={params.get(key)!r} is neither true nor false; give 1 or 0"
        ) from None


def _node_rank(params: RendezvousParameters) -> int:
    if params.get("rank") is None:
        raise ValueError("the static rendezvous has no rank of this node; give --node-rank")
    max_rank = params.max_nodes - 1
    rank = _number(params, "rank", None, 0, f"node rank; give --node-rank from 0 to {max_rank}")
    if rank is None or rank > max_rank:
        raise ValueError(
            f"the rendezvous option rank={rank} is not a rank of {max_rank + 1} nodes; give --node-rank from 0 to {max_rank}"
        )
    return rank
