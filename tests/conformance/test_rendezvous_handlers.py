"""Handlers of ``c10d`` and ``static``: what a program sees that meets other nodes through one."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs
from tests.support.ports import free_port
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.implementations import Implementation

PATIENCE_S = 20.0


def handler_of(
    impl: Implementation, port: int, backend: str = "c10d", nodes: tuple[int, int] = (1, 1), **config: Any
) -> Any:
    params = impl.rendezvous.RendezvousParameters(
        backend, f"localhost:{port}", "run", *nodes, local_addr="localhost", **config
    )
    return impl("rendezvous.registry").get_rendezvous_handler(params)


@contextmanager
def meeting(impl: Implementation, backend: str, number: int, **config: Any) -> Iterator[list[Any]]:
    """Handlers of so many nodes, none of which has joined."""
    port = free_port()
    # The static one of torch makes its store when it joins, and the others wait for it.
    if backend == "static":
        config.setdefault("timeout", 60)
    each = [{"rank": rank} if backend == "static" else {"is_host": rank == 0} for rank in range(number)]
    handlers = [handler_of(impl, port, backend, (number, number), **config, **own) for own in each]
    try:
        yield handlers
    finally:
        for handler in reversed(handlers):
            handler.shutdown()


def join(handlers: list[Any]) -> list[Any]:
    """What each node is told of the round; all of them are in it."""
    return stubs.call_in_threads([handler.next_rendezvous for handler in handlers])


@pytest.fixture(params=["c10d", "static"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class TestOneNode:
    def test_before_it_joins(self, impl: Implementation, backend: str) -> None:
        with meeting(impl, backend, 1) as (handler,):
            assert (handler.get_backend(), handler.get_run_id()) == (backend, "run")
            assert (handler.is_closed(), handler.num_nodes_waiting()) == (False, 0)
            assert isinstance(handler, impl.rendezvous.RendezvousHandler)

    def test_its_round(self, impl: Implementation, backend: str) -> None:
        with meeting(impl, backend, 1) as (handler,):
            info = handler.next_rendezvous()
            assert (info.rank, info.world_size) == (0, 1)
            assert isinstance(info, impl.rendezvous.RendezvousInfo)
            master = info.bootstrap_store_info
            assert isinstance(master, impl.rendezvous.RendezvousStoreInfo)
            assert master.master_addr in {"localhost", "127.0.0.1"}
            assert master.master_port > 0
            assert handler.num_nodes_waiting() == 0

    def test_the_store_of_the_agents(self, impl: Implementation, backend: str) -> None:
        with meeting(impl, backend, 1) as (handler,):
            store = handler.next_rendezvous().store
            store.set("key", "value")
            assert store.get("key") == b"value"
            assert (store.add("number", 3), store.add("number", -1)) == (3, 2)
            assert (store.check(["key"]), store.check(["key", "none"])) == (True, False)
            store.wait(["key"], timedelta(seconds=PATIENCE_S))
            with pytest.raises(Exception, match=r"(?i)wait|time"):
                store.wait(["none"], timedelta(milliseconds=10))

    def test_after_it_was_closed(self, impl: Implementation) -> None:
        with meeting(impl, "c10d", 1) as (handler,):
            handler.next_rendezvous()
            handler.set_closed()
            assert handler.is_closed()
            with pytest.raises(impl.rendezvous.RendezvousClosedError):
                handler.next_rendezvous()

    def test_shutting_down(self, impl: Implementation, backend: str) -> None:
        with meeting(impl, backend, 1) as (handler,):
            handler.next_rendezvous()
            assert handler.shutdown() is True

    def test_nobody_else_comes(self, impl: Implementation) -> None:
        with meeting(impl, "c10d", 1) as _:
            handler = handler_of(impl, free_port(), nodes=(2, 2), join_timeout=1, is_host=True)
            try:
                with pytest.raises(impl.rendezvous.RendezvousTimeoutError):
                    handler.next_rendezvous()
            finally:
                handler.shutdown()


class TestTwoNodes:
    def test_they_agree(self, impl: Implementation, backend: str) -> None:
        with meeting(impl, backend, 2) as handlers:
            infos = join(handlers)
            assert sorted(info.rank for info in infos) == [0, 1]
            assert {info.world_size for info in infos} == {2}
            assert len({info.bootstrap_store_info.master_port for info in infos}) == 1
            first, second = sorted(infos, key=lambda info: info.rank)
            second.store.set("from", "second")
            assert first.store.get("from") == b"second"

    def test_given_ranks(self, impl: Implementation) -> None:
        with meeting(impl, "static", 2) as handlers:
            assert [info.rank for info in join(handlers)] == [0, 1]

    def test_a_node_that_comes_back_is_seen_by_the_other(self, impl: Implementation) -> None:
        """It has a worker that failed: so do the workers of the other begin again."""
        with meeting(impl, "c10d", 2) as (one, other):
            join([one, other])

            def follow() -> Any:
                assert eventually(lambda: other.num_nodes_waiting() == 1, PATIENCE_S)
                return other.next_rendezvous()

            infos = stubs.call_in_threads([one.next_rendezvous, follow])
            assert sorted(info.rank for info in infos) == [0, 1]

    @pytest.mark.needs("store-operations")
    def test_keys_of_workers_in_the_second_round(self, impl: Implementation) -> None:
        torch = pytest.importorskip("torch.distributed")
        with meeting(impl, "c10d", 2) as handlers:
            for _ in range(2):
                info = join(handlers)[0]
                port = info.bootstrap_store_info.master_port
                store = torch.TCPStore("localhost", port, is_master=False)
                own = [key for key in store.list_keys() if "left" in key]
                store.set("left behind", "the address of a worker that is dead")
        assert own == impl.expect("empty-store", torch=["left behind"], ours=[])

    def test_one_closes_it_for_both(self, impl: Implementation) -> None:
        with meeting(impl, "c10d", 2) as (one, other):
            join([one, other])
            one.set_closed()
            assert eventually(other.is_closed, PATIENCE_S)
            with pytest.raises(impl.rendezvous.RendezvousClosedError):
                other.next_rendezvous()

    def test_one_goes_while_the_other_works(self, impl: Implementation) -> None:
        with meeting(impl, "c10d", 2) as (one, other):
            join([one, other])
            stubs.call_in_threads([partial(other.shutdown)])
            seen = eventually(lambda: one.num_nodes_waiting() > 0, 0.5)
        assert seen is impl.expect("end-is-news", torch=False, ours=True)
