"""Nodes of a native rendezvous: how they meet, what they hear of each other, and what they are told when they do not."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing, suppress
from typing import Any

import pytest
from tests.support.native_nodes import Nodes, has_news, is_told, place_of, refuses, store_of, told
from tests.support.ports import free_port
from tests.support.waiting import LONG_S, eventually

from ferroelastic import _rust
from ferroelastic._rust import FailureFacts
from ferroelastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousInfo,
    RendezvousTimeoutError,
)
from ferroelastic.rendezvous._notifying import PlacedRendezvousInfo


class TestOneNode:
    @pytest.mark.parametrize(("backend", "config"), [("c10d", {}), ("static", {"rank": 0})])
    def test_it_is_alone(self, nodes: Nodes, backend: str, config: dict[str, Any]) -> None:
        handler = nodes("127.0.0.1:0", backend=backend, **config)
        assert (handler.get_backend(), handler.get_run_id(), handler.use_agent_store) == (backend, "job", True)
        assert (handler.is_closed(), handler.num_nodes_waiting(), handler.interruption()) == (False, 0, None)
        info = handler.next_rendezvous()
        assert isinstance(info, RendezvousInfo)
        assert not isinstance(info, PlacedRendezvousInfo)
        assert (info.rank, info.world_size) == (0, 1)
        where = info.bootstrap_store_info
        assert (where.master_addr, where.master_port) == ("127.0.0.1", handler._port)
        assert (handler.is_closed(), handler.num_nodes_waiting()) == (False, 0)
        assert not has_news(handler)

    def test_a_node_that_introduces_its_workers_gets_their_ranks(self, nodes: Nodes) -> None:
        handler = nodes()
        handler.introduce("trainer", 4, 3)
        place = place_of(handler.next_rendezvous())
        assert (place.round, place.first_rank, place.world_size, place.first_role_rank, place.role_world_size) == (
            *(0, 0, 4),
            *(0, 4),
        )
        assert (place.failures, place.membership_changes, place.cause) == (0, 0, None)

    def test_a_job_without_an_id_gets_one(self, nodes: Nodes) -> None:
        first, second = nodes(run_id=""), nodes(run_id="")
        assert uuid.UUID(first.get_run_id()) != uuid.UUID(second.get_run_id())
        assert first.get_run_id() == first.get_run_id()

    def test_each_round_begins_with_an_empty_store(self, nodes: Nodes) -> None:
        handler = nodes()
        first = handler.next_rendezvous()
        first.store.set("agents", "1")
        with_worker = _rust.StoreClient("127.0.0.1", handler._port, LONG_S)
        with_worker.set(b"worker", b"1")
        assert with_worker.num_keys() == 2

        second = handler.next_rendezvous()
        assert store_of(second).num_keys() == 0
        assert not store_of(second).check(["agents"])
        assert second.bootstrap_store_info == first.bootstrap_store_info
        for of_the_first in (with_worker.num_keys, lambda: first.store.get("agents")):
            with pytest.raises(ConnectionError):
                of_the_first()

    @pytest.mark.parametrize("rounds", [0, 1])
    def test_shutting_down(self, nodes: Nodes, rounds: int) -> None:
        handler = nodes()
        for _ in range(rounds):
            handler.next_rendezvous()
        assert handler.shutdown() is True
        assert (handler.is_closed(), handler.news_fd, handler.num_nodes_waiting()) == (True, None, 0)
        with pytest.raises(RendezvousClosedError, match="the rendezvous 'job' is closed"):
            handler.next_rendezvous()
        assert refuses(handler._port)
        assert handler.shutdown() is True

    @pytest.mark.parametrize("rounds", [0, 1])
    def test_closing(self, nodes: Nodes, rounds: int) -> None:
        handler = nodes()
        for _ in range(rounds):
            handler.next_rendezvous()
        handler.set_closed()
        assert handler.is_closed()
        with pytest.raises(RendezvousClosedError, match="the rendezvous 'job' is closed"):
            handler.next_rendezvous()

    def test_an_endpoint_of_ipv6(self, nodes: Nodes) -> None:
        if not socket.has_ipv6 or not is_address("::1"):
            pytest.skip("there is no IPv6")
        handler = nodes("[::1]:0")
        info = handler.next_rendezvous()
        assert (info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) == ("::1", handler._port)
        info.store.set("key", "value")
        assert info.store.get("key") == b"value"
        assert refuses(handler._port)
        assert not refuses(handler._port, "::1")

    def test_other_nodes_can_come_where_the_endpoint_is_no_loopback(self, nodes: Nodes) -> None:
        handler = nodes("some-name.invalid:0", is_host=True)
        info = handler.next_rendezvous()
        assert info.bootstrap_store_info.master_addr == "some-name.invalid"
        assert not refuses(handler._port)
        if is_address("::1"):
            assert not refuses(handler._port, "::1")

    def test_the_address_that_workers_take_can_be_given(self, nodes: Nodes) -> None:
        handler = nodes(local_addr="10.1.2.3")
        assert handler.next_rendezvous().bootstrap_store_info.master_addr == "10.1.2.3"


def is_address(address: str) -> bool:
    """Whether this machine has it."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


class TestTwoNodes:
    def test_they_share_a_store(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        first, second = nodes.meet(host, guest)
        assert [(info.rank, info.world_size) for info in (first, second)] == [(0, 2), (1, 2)]
        assert first.bootstrap_store_info == second.bootstrap_store_info
        first.store.set("from the host", "1")
        assert second.store.get("from the host") == b"1"
        assert (first.store.add("sum", 1), second.store.add("sum", 2)) == (1, 3)

    def test_over_ipv6(self, nodes: Nodes) -> None:
        if not is_address("::1"):
            pytest.skip("there is no IPv6")
        host = nodes("[::1]:0", (2, 2), is_host=True)
        guest = nodes(f"[::1]:{host._port}", (2, 2), is_host=False)
        first, second = nodes.meet(host, guest)
        assert (first.rank, second.rank) == (0, 1)
        second.store.set("key", "value")
        assert first.store.get("key") == b"value"

    def test_the_first_node_on_one_machine_hosts(self, nodes: Nodes) -> None:
        port = free_port()
        first, second = (nodes(f"localhost:{port}", (2, 2)) for _ in range(2))
        assert (first._is_host, second._is_host) == (True, False)
        assert [info.rank for info in nodes.meet(first, second)] == [0, 1]

    def test_ranks_follow_from_the_workers_of_each_node(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        host.introduce("reader", 1, 3)
        guest.introduce("trainer", 3, 3)
        first, second = (place_of(info) for info in nodes.meet(host, guest))
        assert [(place.first_rank, place.world_size) for place in (first, second)] == [(0, 4), (1, 4)]
        assert [(place.first_role_rank, place.role_world_size) for place in (first, second)] == [(0, 1), (0, 3)]

    def test_given_ranks_are_kept(self, nodes: Nodes) -> None:
        host = nodes("127.0.0.1:0", (2, 2), backend="static", rank=0)
        guest = nodes(f"127.0.0.1:{host._port}", (2, 2), backend="static", rank=1)
        assert [info.rank for info in nodes.meet(guest, host)] == [1, 0]
        assert [info.rank for info in nodes.meet(guest, host)] == [1, 0]

    def test_a_failure_on_one_is_news_to_the_other(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        for handler in (host, guest):
            handler.introduce("trainer", 2, 3)
        first, _ = nodes.meet(host, guest)
        first.store.set("old", "")
        guest.report_failure(time.time_ns(), "rank 3 exited with code 7", facts=FailureFacts(1))
        for handler in (host, guest):
            assert is_told(handler)
            interruption = handler.interruption()
            assert interruption is not None
            assert (interruption.is_failure, interruption.is_final) == (True, False)
            assert "rank 3 exited with code 7" in interruption.text
            assert (handler.num_nodes_waiting(), handler.is_closed()) == (1, False)
        again = nodes.meet(host, guest)
        for info in again:
            place = place_of(info)
            assert (place.round, place.failures, place.membership_changes) == (1, 1, 0)
            assert place.cause is not None
            assert (place.cause.kind, "code 7" in place.cause.text) == ("failure", True)
            assert store_of(info).num_keys() == 0
        assert [has_news(handler) for handler in (host, guest)] == [False, False]

    def test_the_last_failure_is_the_end_for_both(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        guest.report_failure(time.time_ns(), "rank 1 exited with code 7", facts=FailureFacts(1, is_exhausted=True))
        interruption = told(host)
        assert interruption.is_final
        assert "rank 1 exited with code 7" in interruption.text
        assert host.is_closed()
        with pytest.raises(RendezvousClosedError, match=r"the job has ended: .*code 7.*no restart is left"):
            nodes.meet(host)

    def test_closing_it_on_one_closes_it_on_all(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        guest.set_closed()
        assert guest.is_closed()
        assert is_told(host)
        assert eventually(host.is_closed, LONG_S)
        with pytest.raises(RendezvousClosedError, match="its agent has closed the rendezvous"):
            nodes.meet(host)
        with pytest.raises(RendezvousClosedError, match="the rendezvous 'job' is closed"):
            nodes.meet(guest)

    def test_shutting_down_one_is_the_end_for_the_other(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        guest.shutdown()
        assert is_told(host)
        with pytest.raises(RendezvousClosedError, match=r"the job has ended: .*its agent has ended"):
            nodes.meet(host)

    def test_a_node_that_leaves_is_a_change_of_the_membership(self, nodes: Nodes) -> None:
        host = nodes.host((1, 2))
        guest = nodes.guest(host, (1, 2))
        for handler in (host, guest):
            handler.introduce("trainer", 2, 3)
        nodes.meet(host, guest)
        guest.leave("its machine is needed")
        interruption = told(host)
        assert (interruption.is_failure, interruption.is_final) == (False, False)
        assert "left: its machine is needed" in interruption.text
        (info,) = nodes.meet(host)
        place = place_of(info)
        assert (info.world_size, place.failures, place.membership_changes) == (1, 0, 1)

    def test_a_node_that_comes_later_is_one_too(self, nodes: Nodes) -> None:
        host = nodes.host((1, 2), last_call_timeout=1)
        host.introduce("trainer", 2, 3)
        nodes.meet(host)
        late = nodes.guest(host, (1, 2))
        joining = nodes.joins(late)
        assert is_told(host)
        assert host.num_nodes_waiting() == 1
        interruption = host.interruption()
        assert interruption is not None
        assert (interruption.is_failure, "joins" in interruption.text) == (False, True)
        assert not joining.done()  # not before the workers of the host are gone
        (info,) = nodes.meet(host)
        assert (info.rank, joining.result(LONG_S).rank, info.world_size) == (0, 1, 2)
        place = place_of(info)
        assert (place.failures, place.membership_changes) == (0, 1)

    def test_when_no_more_changes_are_allowed_it_waits_as_a_spare(self, nodes: Nodes) -> None:
        host = nodes.host((1, 2), last_call_timeout=1, max_membership_changes=0)
        nodes.meet(host)
        joining = nodes.waits(nodes.guest(host, (1, 2)), host)
        assert host.num_nodes_waiting() == 0
        assert not joining.done()

    def test_when_a_node_is_lost_after_the_last_change_the_job_is_over(self, nodes: Nodes) -> None:
        host = nodes.host((1, 2), max_membership_changes=0)
        guest = nodes.guest(host, (1, 2))
        nodes.meet(host, guest)
        guest.leave("bye")
        interruption = told(host)
        assert interruption.is_final
        assert "after 0 membership changes" in interruption.text

    def test_a_spare_that_is_not_needed_leaves_gracefully(self, nodes: Nodes) -> None:
        host = nodes.host((1, 1))
        nodes.meet(host)
        spare = nodes.guest(host, (1, 1))
        joining = nodes.waits(spare, host)
        assert (host.num_nodes_waiting(), spare.is_closed()) == (0, False)
        assert host.wait_for_others(LONG_S)
        with pytest.raises(
            RendezvousGracefulExitError,
            match="this node was a spare, and no worker was started on it: the job has succeeded",
        ):
            joining.result(LONG_S)
        assert (host.is_closed(), spare.is_closed()) == (True, True)

    def test_the_host_has_left(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        host.leave("its machine is needed")
        with pytest.raises(RendezvousClosedError, match="it hosts the rendezvous, and left: its machine is needed"):
            nodes.meet(guest)

    def test_a_waiting_thread_takes_no_cpu(self, nodes: Nodes) -> None:
        """After a look for remarks the wait does not return at once."""
        host = nodes.host()
        joining = nodes.joins(host)
        assert nodes.has_entered(host)
        (thread,) = nodes.pool._threads
        clock = time.pthread_getcpuclockid(thread.ident or 0)

        def is_idle() -> bool:
            before_s = time.clock_gettime(clock)
            threading.Event().wait(0.2)
            return time.clock_gettime(clock) == before_s

        guest = nodes.guest(host)
        assert eventually(is_idle)
        nodes.meet(guest)
        joining.result(LONG_S)

    def test_a_look_for_remarks_is_no_news(self, nodes: Nodes) -> None:
        host = nodes.host((1, 1))
        nodes.meet(host)
        client = host._get_client()
        before = client.generation
        assert client.take_warnings() == []
        assert client.generation == before


class TestInVain:
    def test_the_others_do_not_come(self, nodes: Nodes) -> None:
        host = nodes.host((3, 3), join_timeout=1)
        text = (
            rf"the rendezvous 'job' at 127.0.0.1:{host._port} timed out after 1 s: at least 3 nodes must join; "
            r"these nodes joined: 127.0.0.1 \(agent \d+\)"
        )
        with pytest.raises(RendezvousTimeoutError, match=text):
            host.next_rendezvous()
        assert not host.is_closed()

    def test_no_host_is_at_the_endpoint(self, nodes: Nodes) -> None:
        port = free_port()
        guest = nodes(f"[::1]:{port}", (2, 2), is_host=False, read_timeout=1)
        text = rf"the host of the rendezvous at \[::1\]:{port} was not reached within 1 s: "
        with pytest.raises(RendezvousConnectionError, match=text):
            guest.next_rendezvous()

    def test_an_unknown_host_name(self, nodes: Nodes) -> None:
        guest = nodes("no-such-host.invalid:29400", (2, 2), read_timeout=1)
        with pytest.raises(RendezvousConnectionError, match=r"host name \"no-such-host\.invalid\" cannot be resolved"):
            guest.next_rendezvous()

    def test_another_jobs_endpoint(self, nodes: Nodes) -> None:
        host = nodes.host()
        stranger = nodes.guest(host, run_id="other")
        text = f"the rendezvous at 127.0.0.1:{host._port} refused this node: the rendezvous belongs to job .job., not to job .other."
        with pytest.raises(RendezvousConnectionError, match=text):
            stranger.next_rendezvous()
        assert not stranger.is_closed()
        # The job itself goes on.
        assert [info.rank for info in nodes.meet(host, nodes.guest(host))] == [0, 1]

    def test_a_job_of_another_size(self, nodes: Nodes) -> None:
        host = nodes.host()
        with pytest.raises(
            RendezvousConnectionError, match="has --nnodes=2:2, this node was started with --nnodes=1:2"
        ):
            nodes.guest(host, (1, 2)).next_rendezvous()

    def test_a_rank_that_is_taken(self, nodes: Nodes) -> None:
        host = nodes("127.0.0.1:0", (3, 3), backend="static", rank=0)
        endpoint = f"127.0.0.1:{host._port}"
        joining = [nodes.joins(host), nodes.joins(nodes(endpoint, (3, 3), backend="static", rank=1))]
        second, third = (nodes(endpoint, (3, 3), backend="static", rank=rank) for rank in (1, 2))
        # The other one may not have come yet.
        joining.append(nodes.joins(second))
        assert eventually(lambda: any(one.done() for one in joining), LONG_S)
        (refused,) = [one for one in joining if one.done()]
        with pytest.raises(RendezvousConnectionError, match=r"node rank 1 is taken by .*: give each node its own"):
            refused.result()
        joining.remove(refused)
        nodes.meet(third)
        assert sorted(one.result(LONG_S).rank for one in joining) == [0, 1]

    def test_a_plain_store_listens_at_the_endpoint(self, nodes: Nodes) -> None:
        with closing(_rust.StoreServer("127.0.0.1")) as server:
            guest = nodes(f"127.0.0.1:{server.port}", (2, 2))
            with pytest.raises(
                RendezvousConnectionError, match="is a TCPStore of torch, started by torchrun or by a script"
            ):
                guest.next_rendezvous()

    def test_another_server_listens_at_the_endpoint(self, nodes: Nodes) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                connection, _ = server.accept()
                with connection, suppress(ConnectionError):
                    connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                    while connection.recv(1024):
                        pass

            answering = nodes.pool.submit(answer)
            guest = nodes(f"127.0.0.1:{server.getsockname()[1]}", (2, 2))
            with pytest.raises(
                RendezvousConnectionError,
                match="is neither a TCPStore nor a ferrorun rendezvous: start all nodes with ferrorun",
            ):
                guest.next_rendezvous()
            answering.result(LONG_S)

    @pytest.mark.parametrize("config", [{"nodes": (1, 1)}, {"nodes": (2, 2), "is_host": True}])
    def test_a_busy_port_names_its_owner(self, nodes: Nodes, config: dict[str, Any]) -> None:
        with subprocess.Popen([sys.executable, "-c", LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            text = rf"hosted at localhost:{port}: the port is in use by pid {process.pid} \(.*\); choose another one"
            with pytest.raises(RendezvousConnectionError, match=text) as caught:
                nodes(f"localhost:{port}", **config)
            assert isinstance(caught.value.__cause__, OSError)
            process.kill()

    def test_a_port_that_this_process_uses(self, nodes: Nodes) -> None:
        host = nodes()
        with pytest.raises(RendezvousConnectionError, match="in use by this process or a process of another user"):
            nodes(f"localhost:{host._port}")


LISTEN = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    sys.stdin.read()
"""


class TestTheAddressOfTheHost:
    def test_workers_have_a_store_of_their_own_if_that_is_asked_for(
        self, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        host = nodes.host()
        guest = nodes.guest(host)
        infos = nodes.meet(host, guest)
        assert not host.use_agent_store
        found = {(info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) for info in infos}
        ((address, port),) = found
        assert address == "127.0.0.1"
        assert port not in {host._port, 0}

    @pytest.mark.parametrize(("address", "is_named"), [("192.0.2.1", True), ("127.0.0.1", False)])
    def test_a_host_at_the_address_of_another_machine_says_so(
        self,
        nodes: Nodes,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        address: str,
        is_named: bool,
    ) -> None:
        monkeypatch.setattr(logging.getLogger("ferroelastic"), "propagate", True)
        host = nodes(f"{address}:0", (2, 2), is_host=True)
        checked = [thread for thread in threading.enumerate() if thread.name == "ferro-address"]
        for thread in checked:
            thread.join(LONG_S)
        assert (f"--rdzv-endpoint names {address}, which is not an address of this machine" in caplog.text) == is_named
        host.shutdown()
