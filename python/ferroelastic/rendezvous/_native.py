"""The rendezvous of this package: ``c10d`` and ``static``, and with them ``--standalone``.

Its counterparts in torch are ``DynamicRendezvousHandler`` over ``C10dRendezvousBackend``, and ``StaticTCPRendezvous``. Intended
differences:

* Agents talk to the one that hosts the endpoint, which decides; nobody polls a state in the store. A join is one message and one answer.
* All agents hear at once of a worker that failed anywhere, of a node that comes, goes or is lost, and of the end of the job.
* The endpoint's port is that of the workers' store as well. Every round begins with it empty.
* A stock torchrun cannot join: it is turned away with an error that says so, as this one is by an endpoint of torchrun.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from ferroelastic._wait import wait_for_event
from ferroelastic.rendezvous._agent_store import AgentStore
from ferroelastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from ferroelastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint
from ferroelastic.utils.ids import random_uuid
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from ferroelastic import _rust
    from ferroelastic.rendezvous.api import RendezvousParameters

__all__ = ["Interruption", "NativeRendezvous", "NativeRendezvousInfo"]

logger = get_logger(__name__)

_DEFAULT_PORT = 29400
_DEFAULT_STATIC_TIMEOUT_S = 600
_LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}
_DEFAULT_SILENCE_S = 5
_LET_THE_OTHERS_GO_S = 2.0
_ENDED = ("closed", "released", "spare")
_KNOWN_OPTIONS = (
    *("join_timeout", "last_call_timeout", "close_timeout", "read_timeout", "heartbeat_timeout", "heartbeat"),
    *(
        "keep_alive_interval",
        "keep_alive_max_attempt",
        "is_host",
        "max_membership_changes",
        "store_type",
        "rank",
        "timeout",
    ),
)


class Interruption(NamedTuple):
    """Why a round is over before its workers are."""

    is_failure: bool
    """A worker failed; otherwise a node came, went or was lost."""
    is_final: bool
    """There will be no other round."""
    text: str
    """What happened, and where."""


class NativeRendezvousInfo(RendezvousInfo):
    """Outcome of a round, with all that the agents need: nobody has to ask the store for ranks.

    Args:
        place: the node's place.
        store: store that the agents share.
        bootstrap_store_info: where the workers find theirs.
    """

    def __init__(self, place: _rust.Place, store: AgentStore, bootstrap_store_info: RendezvousStoreInfo) -> None:
        super().__init__(store, place.group_rank, place.group_world_size, bootstrap_store_info)
        self.place = place


class NativeRendezvous(RendezvousHandler):
    """An agent's part in a rendezvous, and the rendezvous itself on the node that hosts it.

    ``params.config`` takes torch's names: ``join_timeout`` (600 s), ``last_call_timeout`` (30 s), ``heartbeat_timeout`` (5 s: an agent or a
    host that was silent for so long is lost; also ``heartbeat``, or else ``keep_alive_interval`` times ``keep_alive_max_attempt``), ``read_timeout`` (60 s: how long
    it is tried to reach the host), ``is_host``, and for ``static`` ``rank`` and ``timeout``. Besides, ``max_membership_changes``: how often
    nodes may come and go (no limit). ``close_timeout`` is checked and has no use: to close is one message. Of others it is warned.

    Args:
        params: what the user said.

    Raises:
        ValueError: a parameter is wrong.
        RendezvousConnectionError: the port cannot be listened at.
    """

    renews_store = True
    """Each round begins with an empty store: the agent need not see to that."""

    tells_news = True
    """What happens elsewhere is told through :attr:`news_fd` and :meth:`interruption`."""

    may_grow = False
    """So the agent need not ask from time to time."""

    def __init__(self, params: RendezvousParameters) -> None:
        self._backend = params.backend
        self._run_id = params.run_id or random_uuid()
        self._nodes = (params.min_nodes, params.max_nodes)
        self._local_addr = params.local_addr
        settings = _Settings(params)
        self._join_timeout_s = settings.join_timeout_s
        self._connect_timeout_s = settings.connect_timeout_s
        self._node_rank = settings.node_rank
        self._role: tuple[str, int] = ("default", 1)
        self._is_introduced = False
        self._is_closed = False
        self._has_finished = False
        self._client: _rust.RendezvousClient | None = None
        self._server: _rust.StoreServer | None = None
        self._owner_pid = os.getpid()
        host, self._port = settings.host, settings.port
        self._is_host = False
        if settings.may_host:
            self._server = settings.listen(self._run_id, self._nodes, self._local_addr)
            self._is_host = self._server is not None
        if self._server is not None:
            self._port = self._server.port
            place = _place(host, self._port)
            logger.info("process %d hosts the rendezvous of run %s at %s", os.getpid(), self._run_id, place)
        elif self._port == 0:
            raise ValueError(
                f"the endpoint {params.endpoint!r} has port 0, and only the node that hosts the rendezvous can take a free one; "
                "give the port of the host"
            )
        # The numeric address: with the name, a client would try the other family first.
        self._host = _LOOPBACK.get(host, host)

    def get_backend(self) -> str:
        """Return ``c10d`` or ``static``."""
        return self._backend

    @property
    def use_agent_store(self) -> bool:
        """The workers are clients of the store at the endpoint."""
        return True

    def introduce(self, role: str, local_world_size: int) -> None:
        """Say what the workers of this node are, so that the rendezvous can assign their ranks.

        Args:
            role: their role.
            local_world_size: how many there are.
        """
        self._role = (role, local_world_size)
        self._is_introduced = True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next round and take part in it. There must be no workers of the former one.

        Raises:
            RendezvousClosedError: there will be no other round.
            RendezvousGracefulExitError: the job has ended, and this node was a spare.
            RendezvousTimeoutError: not enough nodes came within ``join_timeout``.
            RendezvousConnectionError: the host cannot be reached, is gone, or refuses this node.
        """
        if self._is_closed:
            raise RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed")
        client = self._get_client()
        self._has_finished = False
        while True:
            client.join(*self._role, self._join_timeout_s)
            standing = self._settled(client)
            if standing.state == "placed" and standing.place is not None:
                return self._info(standing.place)
            if self._is_closed:  # by another thread
                raise RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed")
            if standing.state != "over":  # else the round was over before it was looked at: join the next
                raise self._error(standing)

    def _get_client(self) -> _rust.RendezvousClient:
        if self._client is None:
            from ferroelastic import _rust

            min_nodes, max_nodes = self._nodes
            self._client = _rust.RendezvousClient(
                # Its own host it reaches where that listens.
                _LOOPBACK.get(self._host, "127.0.0.1") if self._is_host else self._host,
                self._port,
                self._run_id,
                min_nodes=min_nodes,
                max_nodes=max_nodes,
                name=self._local_addr or (self._host if self._is_host else None),
                node_rank=self._node_rank,
                is_host=self._is_host,
                connect_timeout_s=self._connect_timeout_s,
            )
        return self._client

    def _settled(self, client: _rust.RendezvousClient) -> _rust.Standing:
        """Wait until an agent knows whether it is in a round."""
        while True:
            # Before the look: what comes after it must not be taken for seen.
            generation = client.generation
            standing = client.standing()
            _log_remarks(client)
            if standing.state != "joining":
                return standing
            try:
                wait_for_event(client, generation)
            except RuntimeError:
                if self._client is client:
                    raise
                # Another thread has shut it down.
                raise RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed") from None

    def _info(self, place: _rust.Place) -> RendezvousInfo:
        master = RendezvousStoreInfo(place.address or self._host, self._port)
        prefix = f"torch.rendezvous.{self._run_id}.{place.round}"
        store = AgentStore(self._host, self._port, prefix)
        if not self._is_introduced:
            return RendezvousInfo(store, place.group_rank, place.group_world_size, master)
        return NativeRendezvousInfo(place, store, master)

    def _error(self, standing: _rust.Standing) -> Exception:
        if standing.state == "closed":
            return RendezvousClosedError(f"the job has ended: {standing.text}")
        if standing.state == "spare":
            return RendezvousGracefulExitError(f"this node was a spare: {standing.text}")
        if standing.state == "timed out":
            min_nodes, _ = self._nodes
            return RendezvousTimeoutError(
                f"not enough nodes came to the rendezvous {self._run_id!r} at {_place(self._host, self._port)} within "
                f"{self._join_timeout_s:g} s: it takes {min_nodes}, {standing.text}"
            )
        if standing.state in ("unreachable", "refused"):
            return RendezvousConnectionError(standing.text)
        return RendezvousClosedError(f"the job is over: {standing.state}")

    @property
    def news_fd(self) -> int | None:
        """Descriptor that is readable while :meth:`interruption` has something to say, once the agent takes part."""
        return None if self._client is None else self._client.alarm_fd

    def interruption(self) -> Interruption | None:
        """Return why the round is over, or ``None`` while it is not."""
        client = self._client
        if client is None:
            return None
        _log_remarks(client)
        standing = client.standing()
        if standing.state == "over" and standing.cause is not None:
            return Interruption(standing.cause.kind == "failure", is_final=False, text=standing.text)
        if standing.state == "closed":
            return Interruption(is_failure=True, is_final=True, text=standing.text)
        return None

    def report_failure(self, at_ns: int, text: str, *, is_final: bool) -> None:
        """Tell all agents that a worker has failed.

        Args:
            at_ns: when, in nanoseconds since the epoch.
            text: which one, and how.
            is_final: this agent has no restart left.
        """
        if self._client is not None:
            self._client.fail(at_ns, text, is_final)

    def verdict(self) -> Interruption | None:
        """Wait for what becomes of the job after a last failure: it ends, unless a lost node is why the worker failed.

        The host says so within a moment, and is gone itself after its silence.

        Returns:
            Why the round is over; ``None`` if there was none.
        """
        client = self._client
        while client is not None:
            generation = client.generation
            if client.standing().state != "placed":
                return self.interruption()
            wait_for_event(client, generation)
        return None

    def wait_for_others(self, timeout_s: float) -> bool:
        """Say that the workers of this node have succeeded, and wait until all others have.

        The node that hosts the rendezvous waits for as long as they take: without it they cannot go on.

        Args:
            timeout_s: how long another node waits, in seconds.

        Returns:
            Whether all have, or the job has ended otherwise; ``False`` if the round is over, and this node is to join again.

        Raises:
            RendezvousTimeoutError: they have not in time.
        """
        client = self._get_client()
        deadline = time.monotonic() + timeout_s
        client.finish()
        self._has_finished = True
        left_s: float | None = timeout_s
        while True:
            generation = client.generation
            standing = client.standing()
            _log_remarks(client)
            if standing.state != "placed":
                return standing.state != "over"
            if wait_for_event(client, generation, left_s):
                left_s = None if left_s is None else max(0.0, deadline - time.monotonic())
            elif self._is_host:
                logger.warning(
                    "the workers of other nodes did not succeed within %g s: this node hosts the rendezvous and stays for them",
                    timeout_s,
                )
                left_s = None
            else:
                raise RendezvousTimeoutError(f"the workers of other nodes did not succeed within {timeout_s:g} s")

    def is_closed(self) -> bool:
        """Whether there will be no other round."""
        return self._is_closed or (self._client is not None and self._client.standing().state in _ENDED)

    def set_closed(self) -> None:
        """Let there be no other round: for any node, if this one has taken part, else for this one."""
        self._is_closed = True
        if self._client is not None:
            self._client.end("its agent has closed the rendezvous")

    def num_nodes_waiting(self) -> int:
        """Return 1 if the workers are to be started again: a node waits, a worker of another node has failed, or a node was lost."""
        return int(self.interruption() is not None)

    def get_run_id(self) -> str:
        """Return the id of the job."""
        return self._run_id

    def say_farewell(self, reason: str) -> None:
        """Tell the others that this node goes, before its workers are stopped: so theirs do not seem to fail.

        Args:
            reason: why, for the others.
        """
        if self._client is not None and os.getpid() == self._owner_pid:
            if self._is_host:
                self._client.end(f"it hosts the rendezvous, and left: {reason}")
            self._client.leave(reason)

    def leave(self, reason: str) -> None:
        """Go. The others go on without this node, unless it hosts the rendezvous.

        Args:
            reason: why, for the others.
        """
        self._is_closed = True
        client, self._client = self._client, None
        server, self._server = self._server, None
        if os.getpid() != self._owner_pid:  # a forked child: none of this is its own
            return
        if client is not None:
            if server is not None:
                client.end(f"it hosts the rendezvous, and left: {reason}")
            client.leave(reason)
            client.close()
        if server is not None:
            server.close(_LET_THE_OTHERS_GO_S)

    def shutdown(self) -> bool:
        """Go; if the workers of this node have not succeeded, end the job for all nodes. An exception on its way is told as the reason.

        Returns:
            ``True``.
        """
        error = sys.exc_info()[1]
        reason = "its agent has ended" if error is None else f"its agent has ended: {_first_line(error)}"
        client = self._client
        if client is not None and not self._has_finished and client.standing().state in ("placed", "over"):
            client.end(reason)
        self.leave(reason)
        return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _log_remarks(client: _rust.RendezvousClient) -> None:
    for remark in client.take_remarks():
        logger.warning("%s", remark)


class _Settings:
    """What the parameters say.

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
            self.join_timeout_s = self.connect_timeout_s = _seconds(params, "timeout", _DEFAULT_STATIC_TIMEOUT_S)
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
        from ferroelastic import _rust

        error: OSError | None = None
        for host in self._addresses(address):
            try:
                return _rust.StoreServer(
                    host,
                    self.port,
                    run_id=run_id,
                    min_nodes=nodes[0],
                    max_nodes=nodes[1],
                    last_call_s=self.last_call_s,
                    silence_s=self.silence_s,
                    address=address,
                    most_membership_changes=self.most_membership_changes,
                )
            except OSError as failed:  # noqa: PERF203 - two addresses at most
                error = failed
                if failed.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    break
        is_in_use = error is not None and error.errno == errno.EADDRINUSE
        if is_in_use and self.is_host is None and not self.is_alone:
            # One of several agents on this machine: the first one hosts.
            return None
        reason = _owner_of(self.port) if is_in_use else error
        raise RendezvousConnectionError(
            f"the rendezvous cannot be hosted at {_place(self.host, self.port)}: {reason}"
        ) from error

    def _addresses(self, address: str | None) -> list[str]:
        """Where to listen: where everybody can come, or where nobody else can if that is what the endpoint and the workers are told."""
        loopback = _LOOPBACK.get(self.host)
        if loopback is None or _LOOPBACK.get(address or self.host) != loopback:
            return ["::", "0.0.0.0"]  # noqa: S104 - the other nodes come from anywhere
        return [loopback]


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _owner_of(port: int) -> str:
    from ferroelastic._report import port_owner

    owner = port_owner(port) or "this process or one of another user"
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
    """Return after how many seconds of silence a node is lost. The option that is closest to it counts."""
    attempts = _number(params, "keep_alive_max_attempt", 3, 1, "number of attempts; give a whole number from 1")
    silence_s = _seconds(params, "keep_alive_interval", 5) * (attempts or 1)
    if params.get("keep_alive_interval") is None and params.get("keep_alive_max_attempt") is None:
        silence_s = _DEFAULT_SILENCE_S
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
