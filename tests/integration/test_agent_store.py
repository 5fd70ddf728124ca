"""The store that agents share, over a real connection."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from tests.support.ports import port_for_one

from ferroelastic import _rust
from ferroelastic.rendezvous._agent_store import AgentStore
from ferroelastic.utils.store import DistStoreError, synchronize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SOON = timedelta(milliseconds=1)
SHORT = timedelta(milliseconds=200)
"""A timeout within which a server answers on a busy machine. A store's own timeout is also the timeout of each answer."""


@contextmanager
def meanwhile(call: Callable[[], object]) -> Iterator[None]:
    """Do something in another thread while a ``with`` block waits for it."""
    thread = threading.Thread(target=call)
    thread.start()
    yield
    thread.join()


@pytest.fixture
def port() -> Iterator[int]:
    with closing(_rust.StoreServer("127.0.0.1")) as server:
        yield server.port


@pytest.fixture
def store(port: int) -> Iterator[AgentStore]:
    store = AgentStore("127.0.0.1", port, "round.0")
    yield store
    store._connected = None


def test_values(store: AgentStore) -> None:
    store.set("text", "ü")
    store.set("bytes", b"\0\xff")
    store.set("empty", "")
    assert (store.get("text"), store.get("bytes"), store.get("empty")) == ("ü".encode(), b"\0\xff", b"")
    store.set("text", "other")
    assert store.get("text") == b"other"


def test_numbers(store: AgentStore) -> None:
    assert [store.add("sum", amount) for amount in (3, 0, -5)] == [3, 3, -2]
    assert store.get("sum") == b"-2"


def test_appending(store: AgentStore) -> None:
    store.append("log", "one")
    store.append("log", b" two")
    assert store.get("log") == b"one two"


def test_compare_and_set(store: AgentStore) -> None:
    assert store.compare_set("owner", "", "me") == b"me"
    assert store.compare_set("owner", "", b"you") == b"me"
    assert store.compare_set("owner", b"me", "you") == b"you"


def test_existing_and_missing_keys(store: AgentStore) -> None:
    store.set("a", "1")
    assert (store.check(["a"]), store.check(["a", "b"]), store.check([])) == (True, False, True)
    assert store.num_keys() == 1
    assert (store.delete_key("a"), store.delete_key("a")) == (True, False)
    assert (store.check(["a"]), store.num_keys()) == (False, 0)


def test_several_at_once(store: AgentStore) -> None:
    store.multi_set(["a", "b"], ["1", b"2"])
    assert store.multi_get(["b", "a"]) == [b"2", b"1"]
    assert store.multi_get([]) == []
    with pytest.raises(ValueError, match="shorter"):
        store.multi_set(["a", "b"], ["1"])


def test_a_prefix_keeps_rounds_apart(store: AgentStore, port: int) -> None:
    other = AgentStore("127.0.0.1", port, "round.1")
    store.set("key", "0")
    assert not other.check(["key"])
    other.set("key", "1")
    assert (store.get("key"), other.get("key")) == (b"0", b"1")
    assert store.num_keys() == 2  # of the whole store, as in torch


def test_getting_and_waiting_wait_for_others(store: AgentStore) -> None:
    with meanwhile(lambda: store.clone().multi_set(["a", "b"], ["1", "2"])):
        store.wait(["a", "b"])
    with meanwhile(lambda: store.clone().set("late", "3")):
        assert store.get("late") == b"3"


def test_a_wait_ends_in_time_and_names_the_keys(store: AgentStore) -> None:
    store.set("there", "")
    with pytest.raises(DistStoreError, match=r"wait timeout after 1ms, keys: /round\.0/there, /round\.0/missing"):
        store.wait(["there", "missing"], SOON)
    # No time at all is not the default of five minutes.
    with pytest.raises(DistStoreError, match="wait timeout after 0ms"):
        store.wait(["missing"], timedelta(0))
    store.set_timeout(SHORT)
    assert store.timeout == SHORT
    for wait in (lambda: store.get("missing"), lambda: store.multi_get(["missing"]), lambda: store.wait(["missing"])):
        with pytest.raises(DistStoreError, match=r"after 200ms, keys: /round\.0/missing"):
            wait()
    # The connection is as good as before.
    assert store.get("there") == b""


def test_a_clone_has_a_connection_of_its_own(store: AgentStore) -> None:
    store.set_timeout(timedelta(seconds=7))
    clone = store.clone()
    assert (clone.timeout, clone._prefix) == (store.timeout, store._prefix)
    # While one waits, the other is served.
    with meanwhile(lambda: store.wait(["said"], timedelta(seconds=60))):
        clone.set("said", "")
    assert clone._client is not store._client


def test_it_connects_when_it_is_used() -> None:
    port = port_for_one()
    store = AgentStore("127.0.0.1", port, "round.0", SOON)
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} failed: Connection refused"):
        store.set("a", "")
    store.set_timeout(timedelta(seconds=60))
    with closing(_rust.StoreServer("127.0.0.1", port)):
        store.set("a", "")
        assert store.check(["a"])


def test_an_address_of_ipv6_is_in_brackets() -> None:
    port = port_for_one()
    with pytest.raises(ConnectionError, match=rf"store at \[::1\]:{port} failed"):
        AgentStore("::1", port, "round.0", SOON).set("a", "")


def test_a_store_that_is_gone() -> None:
    with closing(_rust.StoreServer("127.0.0.1")) as server:
        store = AgentStore("127.0.0.1", server.port, "round.0")
        store.set("a", "")
        assert store.check(["a"])
    with pytest.raises(ConnectionError, match=r"the connection to the store at .* failed"):
        store.get("a")


def test_agents_exchange_data_through_it(store: AgentStore) -> None:
    outcomes: dict[int, Sequence[bytes]] = {}

    def exchange(rank: int) -> None:
        outcomes[rank] = synchronize(store.clone(), f"data of {rank}".encode(), rank, 2, "exchange", 60)

    with meanwhile(lambda: exchange(1)):
        exchange(0)
    assert outcomes == {rank: [b"data of 0", b"data of 1"] for rank in range(2)}


def test_torchs_clients_see_the_same_keys(store: AgentStore, port: int) -> None:
    distributed = pytest.importorskip("torch.distributed")
    theirs = distributed.PrefixStore("round.0", distributed.TCPStore("127.0.0.1", port, is_master=False))
    store.set("ours", "1")
    theirs.set("theirs", "2")
    assert (theirs.get("ours"), store.get("theirs")) == (b"1", b"2")
