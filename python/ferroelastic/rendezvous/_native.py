"""The native rendezvous for the backends ``c10d`` and ``static``, and for ``--standalone``.

Replaces torch's ``DynamicRendezvousHandler`` with ``C10dRendezvousBackend``, and ``StaticTCPRendezvous``. Intended differences:

* The agent at the endpoint (the host) makes all decisions. No agent polls a state in the store. A join is one request and one reply.
* The host notifies all agents immediately of a failed worker, of nodes that join, leave or are lost, and of the end of the job.
* The workers' store uses the same port as the rendezvous. It is empty at the start of every round.
* Agents of torchrun and of this package cannot join the same rendezvous. The host rejects an agent of torchrun with an error that names the
  cause. An agent of this package reports an endpoint of torchrun as an error.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from ferroelastic import _leftovers, _signals
from ferroelastic._engine import get_engine
from ferroelastic._text import endpoint_text, message_of
from ferroelastic._wait import wait_for_event
from ferroelastic.rendezvous._agent_store import AgentStore
from ferroelastic.rendezvous._native_settings import NativeSettings
from ferroelastic.rendezvous._notifying import Interruption, PlacedRendezvousInfo
from ferroelastic.rendezvous._store_server import LOOPBACK
from ferroelastic.rendezvous.api import (
    JobFailedError,
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from ferroelastic.rendezvous.utils import _matches_machine_hostname
from ferroelastic.utils import _interruptible, _threads
from ferroelastic.utils._ids import random_uuid
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from ferroelastic import _rust
    from ferroelastic.rendezvous._notifying import NotifyingRendezvous
    from ferroelastic.rendezvous.api import RendezvousParameters

__all__ = ["NativeRendezvous"]

logger = get_logger(__name__)

_DISCONNECT_TIMEOUT_S = 2.0
_NEW_HOST_RETRY_S = 0.25
_OWN_STORE_ENV = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_ENDED = ("closed", "released", "spare")


class NativeRendezvous(RendezvousHandler):
    """The membership of an agent in a rendezvous. On the host it also runs the rendezvous server.

    ``params.config`` has torch's options, with times in whole seconds:

    * ``join_timeout`` (600): timeout of a join.
    * ``last_call_timeout`` (30): wait for further nodes after the minimum is reached.
    * ``heartbeat_timeout`` (15): an agent or host without a heartbeat for this time is lost. Without it, ``heartbeat`` applies, then
      ``keep_alive_interval`` times ``keep_alive_max_attempt``.
    * ``read_timeout`` (60): timeout for reaching the host.
    * ``is_host``: whether this node hosts the rendezvous. By default it does if the endpoint names this machine.
    * ``rank`` and ``timeout`` (900): node rank and join timeout of ``static``.
    * ``node_rank``: position of this node among the nodes of ``c10d``. By default the host decides. Not in torch.
    * ``max_membership_changes`` (no limit): number of rounds that may end because nodes join, leave or are lost. Not in torch.
    * ``store_type``: ``tcp``. For another type, torch's handler is used.
    * ``close_timeout``: checked and ignored, because closing is one message.

    Other options are ignored with a warning.

    Args:
        params: parameters of the rendezvous.

    Raises:
        ValueError: a parameter is not valid.
        RendezvousConnectionError: this process cannot listen on the port.
    """

    renews_store = True
    may_grow = False
    notifies: Literal[True] = True

    def __init__(self, params: RendezvousParameters) -> None:
        self._backend = params.backend
        self._run_id = params.run_id or random_uuid()
        self._nodes = (params.min_nodes, params.max_nodes)
        self._local_addr = params.local_addr
        self._settings = settings = NativeSettings(params)
        self._join_timeout_s = settings.join_timeout_s
        self._connect_timeout_s = settings.connect_timeout_s
        self._node_rank = settings.node_rank
        self._role: tuple[str, int] = ("default", 1)
        self._common_settings: dict[str, str] = {"--rdzv-backend": self._backend}
        self._is_introduced = False
        self._is_closed = False
        self._has_finished = False
        self._client: _rust.RendezvousClient | None = None
        self._server: _rust.StoreServer | None = None
        self._owner_pid = os.getpid()
        host, self._port = settings.host, settings.port
        self._is_host = False
        if settings.may_host:
            self._try_to_host()
        if self._server is None and self._port == 0:
            raise ValueError(
                f"the endpoint {params.endpoint!r} has port 0, but only the host of the rendezvous can choose a free port; "
                "give the port of the host"
            )
        # The numeric address, because a client of "localhost" would try IPv6 first.
        self._host = LOOPBACK.get(host, host)

    def _try_to_host(self) -> None:
        self._server = self._settings.listen(self._run_id, self._nodes, self._local_addr)
        self._is_host = self._server is not None
        if self._server is not None:
            self._port = self._server.port
            place = endpoint_text(self._settings.host, self._port)
            logger.info("process %d hosts the rendezvous of run %s at %s", os.getpid(), self._run_id, place)
            if self._settings.is_host and self._nodes[1] > 1:
                # In a thread, because the resolver may block.
                name = "ferro-address"
                _threads.start(threading.Thread(target=self._check_own_address, name=name, daemon=True))

    def _check_own_address(self) -> None:
        host = self._settings.host
        if not _matches_machine_hostname(host):
            option = "--master-addr" if self._backend == "static" else "--rdzv-endpoint"
            logger.warning(
                "this node hosts the rendezvous, but %s names %s, which is not an address of this machine: other nodes connect to that "
                "address; give all nodes the address of this machine",
                *(option, host),
            )

    def get_backend(self) -> str:
        """Return the name of the backend: ``c10d`` or ``static``."""
        return self._backend

    @property
    def use_agent_store(self) -> bool:
        """Whether the workers use the store at the endpoint.

        ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` disables this for ``c10d``, as in torch.
        """
        return self._backend == "static" or os.environ.get(_OWN_STORE_ENV, "0") != "1"

    def introduce(
        self, role: str, local_world_size: int, max_restarts: int, options: dict[str, str] | None = None
    ) -> None:
        """See :meth:`NotifyingRendezvous.introduce`. The host rejects nodes with other settings."""
        self._role = (role, local_world_size)
        self._common_settings["--max-restarts"] = str(max_restarts)
        self._common_settings.update(options or {})
        self._is_introduced = True

    def begin(self) -> None:
        """See :meth:`NotifyingRendezvous.begin`. The host of the previous job hosts the next job at the same port."""
        client, server = self._client, self._server
        if self._is_closed or client is None or client.membership().state not in _ENDED:
            return
        self._client = self._server = None
        client.close()
        if server is not None:
            server.close(_DISCONNECT_TIMEOUT_S)
            self._settings.port = self._port  # the port in the endpoint may be 0
            self._try_to_host()

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round and wait until it is complete. Workers of the previous round must have ended.

        If the job at the endpoint has already ended, the call waits up to ``join_timeout`` for a new host at the endpoint.

        Returns:
            Rank of this node, number of nodes and stores of the round.

        Raises:
            JobFailedError: the job has failed.
            RendezvousClosedError: there will be no further round.
            RendezvousGracefulExitError: the job has succeeded, and this node was a spare.
            RendezvousTimeoutError: not enough nodes joined, or no new host appeared, within ``join_timeout``.
            RendezvousConnectionError: the host cannot be reached, is lost, or rejects this node.
        """
        if self._is_closed:
            raise RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed")
        self._has_finished = False
        deadline, ended = 0.0, ""  # of the wait for a new host
        while True:
            client = self._get_client()
            client.join(*self._role, max(0.0, deadline - time.monotonic()) if ended else self._join_timeout_s)
            membership = self._wait_for_outcome(client)
            if membership.state == "placed" and membership.place is not None:
                return self._info(membership.place)
            if self._is_closed:  # by another thread
                raise RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed")
            if membership.state == "late" and not ended:
                self._warn_job_ended(membership.text)
                deadline, ended = time.monotonic() + self._join_timeout_s, membership.text
            if ended and membership.state in ("late", "unreachable", "timed out"):
                self._wait_for_new_host(ended, deadline)
            elif membership.state != "over":  # "over": the round ended before this poll, so join the next round
                raise self._error(membership)

    def _warn_job_ended(self, text: str) -> None:
        logger.warning(
            "the job %r at %s ended before this node joined (%s): waiting for a new host at this endpoint for %g s",
            *(self._run_id, endpoint_text(self._host, self._port), text, self._join_timeout_s),
        )

    def _wait_for_new_host(self, ended: str, deadline: float) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
        if time.monotonic() >= deadline:
            raise RendezvousTimeoutError(
                f"the job {self._run_id!r} at {endpoint_text(self._host, self._port)} ended before this node joined ({ended}), and "
                f"no new host appeared within {self._join_timeout_s:g} s"
            )
        time.sleep(_NEW_HOST_RETRY_S)
        if self._settings.may_host and self._server is None:
            with suppress(RendezvousConnectionError):  # the previous host still uses the port
                self._try_to_host()

    def _get_client(self) -> _rust.RendezvousClient:
        if self._client is None:
            from ferroelastic import _rust

            min_nodes, max_nodes = self._nodes
            self._client = _rust.RendezvousClient(
                # The host connects to itself over loopback.
                LOOPBACK.get(self._host, "127.0.0.1") if self._is_host else self._host,
                self._port,
                self._run_id,
                min_nodes=min_nodes,
                max_nodes=max_nodes,
                name=self._local_addr or (self._host if self._is_host else None),
                node_rank=self._node_rank,
                is_host=self._is_host,
                connect_timeout_s=self._connect_timeout_s,
                settings=self._common_settings,
            )
            if _leftovers.current() is not None:
                # With a lease, the guard process ends the workers in time even if this process is suspended.
                get_engine().watch_lease(self._client)
        return self._client

    def _wait_for_outcome(self, client: _rust.RendezvousClient) -> _rust.Membership:
        """Wait until a join has an outcome."""
        while True:
            # Read before the membership: a later event must end the wait.
            generation = client.generation
            membership = client.membership()
            _log_warnings(client)
            if membership.state != "joining":
                return membership
            try:
                wait_for_event(client, generation)
            except RuntimeError:
                if self._client is client:
                    raise
                # Another thread has shut the client down.
                raise RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed") from None

    def _info(self, place: _rust.Place) -> RendezvousInfo:
        prefix = f"torch.rendezvous.{self._run_id}.{place.round}"
        store = AgentStore(self._host, self._port, prefix)
        if self.use_agent_store:
            master = RendezvousStoreInfo(place.address or self._host, self._port)
        else:
            own_address = self._local_addr or self._get_client().address
            master = _interruptible.call(RendezvousStoreInfo.build, place.group_rank, store, own_address)
        if not self._is_introduced:
            return RendezvousInfo(store, place.group_rank, place.group_world_size, master)
        return PlacedRendezvousInfo(place, store, master)

    def _error(self, membership: _rust.Membership) -> Exception:
        if membership.state == "closed":
            text, code = f"the job has ended: {membership.text}", membership.exit_code or 1
            return JobFailedError(text, code, detail=membership.detail, is_loss=membership.is_loss)
        if membership.state == "spare":
            return RendezvousGracefulExitError(
                f"this node was a spare, and no worker was started on it: {membership.text}"
            )
        if membership.state == "timed out":
            min_nodes, _ = self._nodes
            return RendezvousTimeoutError(
                f"the rendezvous {self._run_id!r} at {endpoint_text(self._host, self._port)} timed out after "
                f"{self._join_timeout_s:g} s: at least {min_nodes} nodes must join; {membership.text}"
            )
        if membership.state in ("unreachable", "refused"):
            error = RendezvousConnectionError(membership.text)
            # ferrorun prints a rejection as it is, because the text has the remedy.
            error.was_refused = membership.state == "refused"  # type: ignore[attr-defined]
            return error
        return RendezvousClosedError(f"the job has ended (state of the rendezvous: {membership.state})")

    @property
    def news_fd(self) -> int | None:
        """See :attr:`NotifyingRendezvous.news_fd`."""
        return None if self._client is None else self._client.alarm_fd

    def interruption(self) -> Interruption | None:
        """See :meth:`NotifyingRendezvous.interruption`."""
        client = self._client
        if client is None:
            return None
        _log_warnings(client)
        membership = client.membership()
        if membership.state == "over" and membership.cause is not None:
            is_failure, exit_code = membership.cause.kind == "failure", membership.cause.exit_code
            within_s = client.stop_within_s
            return Interruption(
                is_failure,
                False,
                membership.text,
                exit_code,
                within_s,
                membership.detail,
                membership.is_loss,
                membership.decision,
            )
        if membership.state == "closed":
            code, is_loss = membership.exit_code or 1, membership.is_loss
            return Interruption(
                True, True, membership.text, code, None, membership.detail, is_loss, membership.decision
            )
        return None

    def report_failure(
        self, at_ns: int, text: str, *, exit_code: int = 1, facts: _rust.FailureFacts, detail: str = ""
    ) -> None:
        """See :meth:`NotifyingRendezvous.report_failure`."""
        if self._client is not None:
            self._client.fail(at_ns, text, exit_code, facts, detail=detail)

    def report_progress(self) -> None:
        """See :meth:`NotifyingRendezvous.report_progress`."""
        if self._client is not None:
            self._client.progress()

    def verdict(self) -> Interruption | None:
        """See :meth:`NotifyingRendezvous.verdict`.

        The host decides on a restart at once. A final failure ends the job within a fraction of a second, unless a lost node is its cause.
        A host that does not answer is lost after the heartbeat timeout.
        """
        client = self._client
        while client is not None:
            generation = client.generation
            if client.membership().state != "placed":
                return self.interruption()
            wait_for_event(client, generation)
        return None

    def wait_for_others(self, timeout_s: float) -> bool:
        """See :meth:`NotifyingRendezvous.wait_for_others`.

        The timeout does not apply to the host, because the other nodes need the host. It waits until all nodes have finished or a signal
        arrives.
        """
        client = self._get_client()
        deadline = time.monotonic() + timeout_s
        client.finish()
        self._has_finished = True
        remaining_s: float | None = timeout_s
        while True:
            generation = client.generation
            membership = client.membership()
            _log_warnings(client)
            if membership.state in ("unreachable", "refused"):
                logger.warning("the outcome of the workers on other nodes is unknown: %s", membership.text)
            if membership.state != "placed":
                return membership.state != "over"
            if wait_for_event(client, generation, remaining_s):
                remaining_s = None if remaining_s is None else max(0.0, deadline - time.monotonic())
            elif self._is_host and _signals.received() is None:
                logger.warning(
                    "the workers of other nodes did not succeed within %g s: this node hosts the rendezvous and keeps waiting for them",
                    timeout_s,
                )
                remaining_s = None
            else:
                raise RendezvousTimeoutError(f"the workers of other nodes did not succeed within {timeout_s:g} s")

    def is_closed(self) -> bool:
        """Return whether the rendezvous is closed: there will be no further round."""
        return self._is_closed or (self._client is not None and self._client.membership().state in _ENDED)

    def set_closed(self) -> None:
        """Close the rendezvous: for all nodes if this node has joined it, else for this node only."""
        self._is_closed = True
        if self._client is not None:
            self._client.end("its agent has closed the rendezvous", 1)

    def num_nodes_waiting(self) -> int:
        """Return 1 if the workers must restart: a node waits, a worker of another node has failed, or a node was lost. Otherwise 0."""
        return int(self.interruption() is not None)

    def get_run_id(self) -> str:
        """Return the run id of the job."""
        return self._run_id

    def say_farewell(self, reason: str, exit_code: int) -> None:
        """See :meth:`NotifyingRendezvous.say_farewell`. If this node hosts the rendezvous, the job ends."""
        if self._client is not None and os.getpid() == self._owner_pid:
            if self._is_host:
                self._client.end(f"it hosts the rendezvous, and left: {reason}", exit_code)
            self._client.leave(reason)

    def leave(self, reason: str, exit_code: int = 1) -> None:
        """See :meth:`NotifyingRendezvous.leave`. If this node hosts the rendezvous, the job ends."""
        self._is_closed = True
        client, self._client = self._client, None
        server, self._server = self._server, None
        if os.getpid() != self._owner_pid:  # a forked child does not own the connection
            return
        if client is not None:
            if server is not None:
                client.end(f"it hosts the rendezvous, and left: {reason}", exit_code)
            client.leave(reason)
            client.close()
        if server is not None:
            server.close(_DISCONNECT_TIMEOUT_S)

    def shutdown(self) -> bool:
        """Leave the rendezvous. If the workers of this node have not succeeded, the job ends for all nodes.

        The reason for the other nodes is the exception that the caller is handling, if any.

        Returns:
            ``True``.
        """
        if os.getpid() != self._owner_pid:  # a forked child does not own the connection
            return True
        error = sys.exc_info()[1]
        reason = "its agent has ended" if error is None else f"its agent has ended: {_first_line(error)}"
        client = self._client
        if client is not None and not self._has_finished and client.membership().state in ("placed", "over"):
            client.end(reason, 1)
        self.leave(reason)
        return True


def _first_line(error: BaseException) -> str:
    return (message_of(error).strip() or type(error).__name__).splitlines()[0]


def _log_warnings(client: _rust.RendezvousClient) -> None:
    for warning in client.take_warnings():
        logger.warning("%s", warning)


if TYPE_CHECKING:
    # Type check for `notifier_of`: the class has all members of the protocol.
    _: type[NotifyingRendezvous] = NativeRendezvous
