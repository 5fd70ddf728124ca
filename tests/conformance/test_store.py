"""Torch's client of a ``TCPStore`` on torch's server and on ours: the same replies, and the same errors."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance.implementations import OURS, TORCH
from tests.conformance.stores import connect, serving
from tests.support.raw_store import RawClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conformance.implementations import Implementation

PATIENCE = timedelta(seconds=60)
AT_ONCE = timedelta(milliseconds=1)  # for what cannot come

# All of these are numbers for `add`, but for the last ones, for which the server ends the connection. They are few: to connect takes
# torch's client a look-up of the address, which may take seconds.
TEXTS = [
    "0",
    "7",
    "-7",
    "+7",
    " 12abc",
    "\t\n\v\f\r5",
    "0x10",
    "1_000",
    "1e3",
    "9" * 18,
    str(2**63 - 1),
    str(-(2**63)),
] * 5
TEXTS += ["0" * 40 + "3", "5" + "x" * 3000, "12é", "", "--1", "abc", "9" * 19, "\0"]
KEYS = ["a", "b", "c", "d/e", "", "é", "k" * 2000]
QUEUES = ["q", "r", "a"]
NEVER_FULL = 2**40
METHODS = ["set", "get", "add", "compare_set", "check", "wait", "num_keys", "delete_key", "append", "multi_get"]
METHODS += ["multi_set", "queue_push", "queue_pop", "queue_len", "list_keys", "barrier"]


class Client:
    """A client whose connection the server may end; then the next one is made."""

    def __init__(self, port: int, prefixes: list[str]) -> None:
        self._port = port
        self.prefixes = prefixes
        self.store: Any = None

    def attempt(self, method: str, *args: Any) -> Any:
        """Return what the call returns, or how it fails."""
        from torch.distributed import DistNetworkError, PrefixStore

        if self.store is None:
            self.store = connect(self._port)
            for prefix in self.prefixes:
                self.store = PrefixStore(prefix, self.store)
        try:
            result = getattr(self.store, method)(*args)
        except DistNetworkError as error:
            self.store = None
            # Which system call finds the end of the connection is a matter of time.
            return type(error)
        except RuntimeError as error:
            return type(error), str(error)
        return sorted(result) if method == "list_keys" else result


class Call:
    """One call of one client, the same on both servers."""

    def __init__(self, dice: random.Random) -> None:
        self.client = dice.randrange(5)
        self.method = dice.choice(METHODS)
        key, value = dice.choice(KEYS), dice.choice(TEXTS)
        names = dice.choices(KEYS + QUEUES, k=dice.randrange(4))
        arguments: dict[str, tuple[Any, ...]] = {
            "set": (key, value),
            "get": (key,),
            "add": (key, dice.choice([0, 1, -1, 2**62, -(2**63), dice.randrange(100)])),
            "compare_set": (key, dice.choice(TEXTS), value),
            "check": (names,),
            "wait": (names,),
            "num_keys": (),
            "delete_key": (key,),
            "append": (key, value),
            "multi_get": (names,),
            "multi_set": (names, [dice.choice(TEXTS) for _ in names]),
            "queue_push": (dice.choice(QUEUES), value),
            "queue_pop": (dice.choice(QUEUES), False),
            "queue_len": (dice.choice(QUEUES),),
            "list_keys": (),
            "barrier": (key, dice.choice([1, NEVER_FULL])),
        }
        self.arguments = arguments[self.method]

    def __repr__(self) -> str:
        return f"client {self.client}: {self.method}{self.arguments}"[:300]

    def carry_out(self, clients: list[Client]) -> list[Any]:
        """Do it. Where it would wait for what is not there, it waits for a moment only."""
        client, replies = clients[self.client], []
        args = self.arguments
        if self.method in {"get", "wait", "multi_get"}:
            names = [args[0]] if self.method == "get" else args[0]
            is_there = client.attempt("check", names)
            replies.append(is_there)
            if self.method != "wait" and is_there is not True:
                return replies  # to wait in vain is seen with `wait`, where the time can be given
            if self.method == "wait":
                args = (names, PATIENCE if is_there is True else AT_ONCE)
        elif self.method == "barrier":
            if client.prefixes:
                args = (args[0], 1)  # theirs is made of other calls, and full only by the last one that enters
            count = client.attempt("add", args[0], 0)
            replies.append(count)
            if not isinstance(count, int):
                return replies
            args = (*args, PATIENCE if args[1] == 1 and 0 <= count < 2**60 else AT_ONCE)
        replies.append(client.attempt(self.method, *args))
        # A call without a reply counts once the server has taken it, which is before the reply to another one.
        replies.append(client.attempt("num_keys"))
        return replies


@pytest.mark.needs("store-operations")
@pytest.mark.uses_torch
@pytest.mark.parametrize("seed", range(4))
def test_random_calls(seed: int) -> None:
    prefixes: list[list[str]] = [[], [], [], ["p"], ["in", "p"]]
    dice = random.Random(seed)
    calls = [Call(dice) for _ in range(300)]
    with serving(TORCH) as theirs, serving(OURS) as ours:
        clients = {port: [Client(port, prefix) for prefix in prefixes] for port in (theirs, ours)}
        for number, call in enumerate(calls):
            expected = call.carry_out(clients[theirs])
            assert call.carry_out(clients[ours]) == expected, f"seed {seed}, call {number}: {call}"
        # Whatever the last calls were, the contents are the same.
        everything = [[client[0].attempt(*call) for call in contents(client[0])] for client in clients.values()]
        assert everything[0] == everything[1]


def contents(client: Client) -> list[tuple[Any, ...]]:
    """Return the calls that show all that is in a store."""
    names = client.attempt("list_keys")
    return [("list_keys",), *(("get", name) for name in names), *(("queue_len", name) for name in QUEUES)]


@pytest.fixture
def port(impl: Implementation) -> Iterator[int]:
    """The port of a store, of each implementation in turn."""
    with serving(impl.name) as port:
        yield port


class Meanwhile:
    """Calls that are waiting while the test goes on."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(32)
        self.close = self._pool.shutdown

    def __call__(self, call: Callable[..., Any], *args: Any) -> Any:
        return self._pool.submit(call, *args)


@pytest.fixture
def meanwhile() -> Iterator[Meanwhile]:
    made = Meanwhile()
    yield made
    made.close()


class TestWaiting:
    """Each of these ends at once where the server tells those who wait, and after a minute where it does not."""

    def test_a_key_that_comes(self, port: int, meanwhile: Meanwhile) -> None:
        waits = [meanwhile(connect(port).get, "k") for _ in range(8)]
        connect(port).set("k", "v")
        assert [wait.result() for wait in waits] == [b"v"] * 8

    def test_all_of_several_keys(self, port: int, meanwhile: Meanwhile) -> None:
        wait = meanwhile(connect(port).multi_get, ["a", "b", "c", "a"])
        store = connect(port)
        store.append("c", "3")
        store.add("b", 2)
        store.compare_set("a", "", "1")
        assert wait.result() == [b"1", b"2", b"3", b"1"]

    def test_it_can_be_given_up_any_number_of_times(self, port: int) -> None:
        from torch.distributed import DistStoreError

        store = connect(port)
        for _ in range(50):
            with pytest.raises(DistStoreError, match=r"wait timeout after 1ms, keys: /k"):
                store.wait(["k"], AT_ONCE)
        store.set("k", "")
        store.wait(["k"], PATIENCE)

    def test_it_can_be_given_up_while_the_key_comes(self, port: int, meanwhile: Meanwhile) -> None:
        from torch.distributed import DistStoreError

        store, setter = connect(port), connect(port)
        for number in range(200):
            wait = meanwhile(setter.set, f"k{number}", "")
            # Whichever of the two comes first, the next call gets its own answer.
            with ExitStack() as stack:
                stack.callback(wait.result)
                with suppress(DistStoreError):
                    store.wait([f"k{number}"], AT_ONCE)
                assert store.add("count", 1) == number + 1

    @pytest.mark.needs("store-operations")
    def test_a_queue(self, port: int, meanwhile: Meanwhile) -> None:
        pops = [meanwhile(connect(port).queue_pop, "q") for _ in range(8)]
        store = connect(port)
        for number in range(8):
            store.queue_push("q", str(number))
        assert sorted(pop.result() for pop in pops) == [str(number).encode() for number in range(8)]
        assert store.queue_len("q") == 0

    @pytest.mark.needs("store-operations")
    def test_a_barrier(self, port: int, meanwhile: Meanwhile) -> None:
        barriers = [meanwhile(connect(port).barrier, "b", 16, PATIENCE) for _ in range(16)]
        assert [barrier.result() for barrier in barriers] == [None] * 16
        connect(port).barrier("b", 16, PATIENCE)  # is full, and stays it
        assert connect(port).get("b") == b"17"

    def test_everybody_counts(self, port: int, meanwhile: Meanwhile) -> None:
        def count(store: Any) -> list[int]:
            return [store.add("n", 1) for _ in range(200)]

        counts = [meanwhile(count, connect(port)) for _ in range(8)]
        assert sorted(number for wait in counts for number in wait.result()) == list(range(1, 1601))


class TestOneByOne:
    """What the random calls hold too little of."""

    def test_large_values(self, port: int) -> None:
        store = connect(port)
        largest = "v" * (8 << 20)
        store.set("k", largest)
        assert store.get("k") == largest.encode()
        assert store.compare_set("k", largest, "small") == b"small"

    @pytest.mark.needs("store-operations")
    def test_many_keys(self, port: int) -> None:
        store = connect(port)
        names = [f"key/{number}" for number in range(2000)]
        store.multi_set(names, names)
        assert store.multi_get(names) == [name.encode() for name in names]
        assert store.num_keys() == 2000
        assert sorted(store.list_keys()) == sorted(names)

    @pytest.mark.needs("store-operations")
    def test_workers_are_counted(self, port: int) -> None:
        from torch.distributed import TCPStore

        for count in range(1, 4):
            store = TCPStore("127.0.0.1", port, world_size=3, is_master=False, timeout=PATIENCE)
            with RawClient(port) as client:
                length, text = 8, str(count).encode()
                client.send(b"\3\5\0\0\0\0\0\0\0init/")
                assert client.receive(length + 1)[length:] == text
            # It is counted as a key, and is none of the client's.
            assert (store.num_keys(), store.list_keys()) == (1, [])

    @pytest.mark.needs("store-operations")
    def test_a_clone_is_a_client_of_its_own(self, port: int, meanwhile: Meanwhile) -> None:
        store = connect(port)
        clone = store.clone()
        wait = meanwhile(clone.get, "k")
        store.set("k", "v")
        assert wait.result() == b"v"
