"""The rendezvous of this package: ``c10d`` and ``static``, and with them ``--standalone``.

Its counterparts in torch are ``DynamicRendezvousHandler`` over ``C10dRendezvousBackend``, and ``StaticTCPRendezvous``. Intended
differences:

* Agents talk to the one that hosts the endpoint, which decides; nobody polls a state in the store. A join is one message and one answer.
* All agents hear at once of a worker that failed anywhere, of a node that comes, goes or is lost, and of the end of the job.
* The endpoint's port is that of the workers' store as well. Every round begins with it empty.
* A stock torchrun cannot join: it is turned away with an error that says so, as this one is by an endpoint of torchrun.
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

_LET_THE_OTHERS_GO_S = 2.0
_NEXT_HOST_PAUSE_S = 0.25
_OWN_STORE_ENV = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_ENDED = ("closed", "released", "spare")


class NativeRendezvous(RendezvousHandler):
    """An agent's part in a rendezvous, and the rendezvous itself on the node that hosts it.

    ``params.config`` takes torch's names: ``join_timeout`` (600 s), ``last_call_timeout`` (30 s), ``heartbeat_timeout`` (15 s: an agent or a
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
        self._must_be_equal: dict[str, str] = {"--rdzv-backend": self._backend}
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
                f"the endpoint {params.endpoint!r} has port 0, and only the node that hosts the rendezvous can take a free one; "
                "give the port of the host"
            )
        # The numeric address: with the name, a client would try the other family first.
        self._host = LOOPBACK.get(host, host)

    def _try_to_host(self) -> None:
        self._server = self._settings.listen(self._run_id, self._nodes, self._local_addr)
        self._is_host = self._server is not None
        if self._server is not None:
            self._port = self._server.port
            place = endpoint_text(self._settings.host, self._port)
            logger.info("process %d hosts the rendezvous of run %s at %s", os.getpid(), self._run_id, place)
            if self._settings.is_host and self._nodes[1] > 1:
                # To ask a resolver may take its time.
                name = "ferro-address"
                _threads.start(threading.Thread(target=self._check_own_address, name=name, daemon=True))

    def _check_own_address(self) -> None:
        host = self._settings.host
        if not _matches_machine_hostname(host):
            option = "--master-addr" if self._backend == "static" else "--rdzv-endpoint"
            logger.warning(
                "this node hosts the rendezvous, but %s names %s, which is no address of this machine: other nodes look for the "
                "rendezvous there; give them the address of this machine",
                *(option, host),
            )

    def get_backend(self) -> str:
        """Return ``c10d`` or ``static``."""
        return self._backend

    @property
    def use_agent_store(self) -> bool:
        """Whether the workers are clients of the store at the endpoint: not with ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` (c10d only, as in torch)."""
        return self._backend == "static" or os.environ.get(_OWN_STORE_ENV, "0") != "1"

    def introduce(self, role: str, local_world_size: int, max_restarts: int) -> None:
        """See :meth:`NotifyingRendezvous.introduce`. Nodes with another ``max_restarts`` are refused."""
        self._role = (role, local_world_size)
        self._must_be_equal["--max-restarts"] = str(max_restarts)
        self._is_introduced = True

    def begin(self) -> None:
        """See :meth:`NotifyingRendezvous.begin`. The node that hosted the former job hosts the next one at the same port."""
        client, server = self._client, self._server
        if self._is_closed or client is None or client.standing().state not in _ENDED:
            return
        self._client = self._server = None
        client.close()
        if server is not None:
            server.close(_LET_THE_OTHERS_GO_S)
            self._settings.port = self._port  # the endpoint may have said 0
            self._try_to_host()

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next round and take part in it. There must be no workers of the former one.

        An agent that comes when the job at the endpoint has ended looks for the next host, for as long as it waits for other nodes.

        Raises:
            JobFailedError: the job has failed.
            RendezvousClosedError: there will be no other round.
            RendezvousGracefulExitError: the job has succeeded, and this node was a spare.
            RendezvousTimeoutError: not enough nodes came within ``join_timeout``, or no next host did.
            RendezvousConnectionError: the host cannot be reached, is gone, or refuses this node.
        """
        if self._is_closed:
            raise RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed")
        self._has_finished = False
        deadline, ended = 0.0, ""  # of the look for the next host
        while True:
            client = self._get_client()
            client.join(*self._role, max(0.0, deadline - time.monotonic()) if ended else self._join_timeout_s)
            standing = self._settled(client)
            if standing.state == "placed" and standing.place is not None:
                return self._info(standing.place)
            if self._is_closed:  # by another thread
                raise RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed")
            if standing.state == "late" and not ended:
                self._say_that_it_is_late(standing.text)
                deadline, ended = time.monotonic() + self._join_timeout_s, standing.text
            if ended and standing.state in ("late", "unreachable", "timed out"):
                self._look_for_the_next_host(ended, deadline)
            elif standing.state != "over":  # else the round was over before it was looked at: join the next
                raise self._error(standing)

    def _say_that_it_is_late(self, text: str) -> None:
        logger.warning(
            "the job %r at %s had ended when this node came (%s): waiting for the next host there, for %g s",
            *(self._run_id, endpoint_text(self._host, self._port), text, self._join_timeout_s),
        )

    def _look_for_the_next_host(self, ended: str, deadline: float) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
        if time.monotonic() >= deadline:
            raise RendezvousTimeoutError(
                f"the job {self._run_id!r} at {endpoint_text(self._host, self._port)} had ended when this node came ({ended}), and "
                f"no other host came within {self._join_timeout_s:g} s"
            )
        time.sleep(_NEXT_HOST_PAUSE_S)
        if self._settings.may_host and self._server is None:
            with suppress(RendezvousConnectionError):  # the former host still has the port
                self._try_to_host()

    def _get_client(self) -> _rust.RendezvousClient:
        if self._client is None:
            from ferroelastic import _rust

            min_nodes, max_nodes = self._nodes
            self._client = _rust.RendezvousClient(
                # Its own host it reaches where that listens.
                LOOPBACK.get(self._host, "127.0.0.1") if self._is_host else self._host,
                self._port,
                self._run_id,
                min_nodes=min_nodes,
                max_nodes=max_nodes,
                name=self._local_addr or (self._host if self._is_host else None),
                node_rank=self._node_rank,
                is_host=self._is_host,
                connect_timeout_s=self._connect_timeout_s,
                settings=self._must_be_equal,
            )
            if _leftovers.current() is not None:
                # Its guard ends the workers in time, also while this process is suspended.
                get_engine().watch_lease(self._client)
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

    def _error(self, standing: _rust.Standing) -> Exception:
        if standing.state == "closed":
            return JobFailedError(f"the job has ended: {standing.text}", standing.exit_code or 1)
        if standing.state == "spare":
            return RendezvousGracefulExitError(
                f"this node was a spare, and no worker was started on it: {standing.text}"
            )
        if standing.state == "timed out":
            min_nodes, _ = self._nodes
            return RendezvousTimeoutError(
                f"not enough nodes came to the rendezvous {self._run_id!r} at {endpoint_text(self._host, self._port)} within "
                f"{self._join_timeout_s:g} s: it takes {min_nodes}, {standing.text}"
            )
        if standing.state in ("unreachable", "refused"):
            error = RendezvousConnectionError(standing.text)
            # For ferrorun: whoever refuses a node is the rendezvous, and has said what to do.
            error.was_refused = standing.state == "refused"  # type: ignore[attr-defined]
            return error
        return RendezvousClosedError(f"the job is over: {standing.state}")

    @property
    def news_fd(self) -> int | None:
        """See :attr:`NotifyingRendezvous.news_fd`."""
        return None if self._client is None else self._client.alarm_fd

    def interruption(self) -> Interruption | None:
        """See :meth:`NotifyingRendezvous.interruption`."""
        client = self._client
        if client is None:
            return None
        _log_remarks(client)
        standing = client.standing()
        if standing.state == "over" and standing.cause is not None:
            is_failure, exit_code = standing.cause.kind == "failure", standing.cause.exit_code
            return Interruption(is_failure, False, standing.text, exit_code, client.stop_within_s)
        if standing.state == "closed":
            return Interruption(True, True, standing.text, standing.exit_code or 1)
        return None

    def report_failure(self, at_ns: int, text: str, *, exit_code: int = 1, is_final: bool) -> None:
        """See :meth:`NotifyingRendezvous.report_failure`."""
        if self._client is not None:
            self._client.fail(at_ns, text, exit_code, is_final)

    def verdict(self) -> Interruption | None:
        """See :meth:`NotifyingRendezvous.verdict`.

        A final failure ends the job, unless a lost node is its cause. The host decides that within a moment; a host that does not answer
        counts as lost after its heartbeat timeout.
        """
        client = self._client
        while client is not None:
            generation = client.generation
            if client.standing().state != "placed":
                return self.interruption()
            wait_for_event(client, generation)
        return None

    def wait_for_others(self, timeout_s: float) -> bool:
        """See :meth:`NotifyingRendezvous.wait_for_others`.

        The timeout applies to nodes that do not host the rendezvous. The host stays until all nodes have finished, unless a signal ends it,
        because they need it.
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
            if standing.state in ("unreachable", "refused"):
                logger.warning("whether the workers of other nodes succeed is not known: %s", standing.text)
            if standing.state != "placed":
                return standing.state != "over"
            if wait_for_event(client, generation, left_s):
                left_s = None if left_s is None else max(0.0, deadline - time.monotonic())
            elif self._is_host and _signals.received() is None:
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
            self._client.end("its agent has closed the rendezvous", 1)

    def num_nodes_waiting(self) -> int:
        """Return 1 if the workers are to be started again: a node waits, a worker of another node has failed, or a node was lost."""
        return int(self.interruption() is not None)

    def get_run_id(self) -> str:
        """Return the id of the job."""
        return self._run_id

    def say_farewell(self, reason: str, exit_code: int) -> None:
        """See :meth:`NotifyingRendezvous.say_farewell`. A node that hosts the rendezvous ends the job."""
        if self._client is not None and os.getpid() == self._owner_pid:
            if self._is_host:
                self._client.end(f"it hosts the rendezvous, and left: {reason}", exit_code)
            self._client.leave(reason)

    def leave(self, reason: str, exit_code: int = 1) -> None:
        """See :meth:`NotifyingRendezvous.leave`. A node that hosts the rendezvous ends the job."""
        self._is_closed = True
        client, self._client = self._client, None
        server, self._server = self._server, None
        if os.getpid() != self._owner_pid:  # a forked child: none of this is its own
            return
        if client is not None:
            if server is not None:
                client.end(f"it hosts the rendezvous, and left: {reason}", exit_code)
            client.leave(reason)
            client.close()
        if server is not None:
            server.close(_LET_THE_OTHERS_GO_S)

    def shutdown(self) -> bool:
        """Go; if the workers of this node have not succeeded, end the job for all nodes. An exception on its way is told as the reason.

        Returns:
            ``True``.
        """
        if os.getpid() != self._owner_pid:  # a forked child: none of this is its own
            return True
        error = sys.exc_info()[1]
        reason = "its agent has ended" if error is None else f"its agent has ended: {_first_line(error)}"
        client = self._client
        if client is not None and not self._has_finished and client.standing().state in ("placed", "over"):
            client.end(reason, 1)
        self.leave(reason)
        return True


def _first_line(error: BaseException) -> str:
    return (message_of(error).strip() or type(error).__name__).splitlines()[0]


def _log_remarks(client: _rust.RendezvousClient) -> None:
    for remark in client.take_remarks():
        logger.warning("%s", remark)


if TYPE_CHECKING:
    # `notifier_of` relies on it.
    _: type[NotifyingRendezvous] = NativeRendezvous
