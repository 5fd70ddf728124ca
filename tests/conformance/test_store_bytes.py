"""The protocol of a ``TCPStore``, byte for byte, on torch's server and on ours."""

from __future__ import annotations

import random
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from tests.conformance.implementations import OURS, TORCH
from tests.conformance.stores import serving
from tests.support.raw_store import (
    ADD,
    APPEND,
    BARRIER,
    CANCEL_WAIT,
    CHECK,
    COMPARE_SET,
    DELETE_KEY,
    GET,
    GET_NUM_KEYS,
    LIST_KEYS,
    MULTI_GET,
    MULTI_SET,
    PING,
    QUEUE_LEN,
    QUEUE_POP,
    QUEUE_PUSH,
    SET,
    VALIDATE,
    WAIT,
    RawClient,
    i64,
    keys,
    request,
    sized,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.implementations import Implementation

READY, NOT_READY = b"\0", b"\1"
STOP_WAITING, WAIT_CANCELED = b"\0", b"\1"


@pytest.fixture
def port(impl: Implementation) -> Iterator[int]:
    """The port of an empty store, of each implementation in turn."""
    with serving(impl.name) as port:
        yield port


class Connections(ExitStack):
    """Opens connections, and closes all of them."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    def __call__(self, hello: bytes = VALIDATE) -> RawClient:
        return self.enter_context(RawClient(self.port, hello=hello))


@pytest.fixture
def connect(port: int) -> Iterator[Connections]:
    with Connections(port) as made:
        yield made


def put(client: RawClient, key: bytes, value: bytes) -> None:
    """Set a key, so that everybody sees it from here on."""
    client.send(request(SET, sized(key), sized(value)))
    assert client.fence() == b""


# In this order in one connection: a name, the request, and the reply.
CONVERSATION: list[tuple[str, bytes, bytes]] = [
    ("ping", request(PING, b"abcd"), b"abcd"),
    ("set", request(SET, sized(b"/k"), sized(b"ab")), b""),
    ("set, as captured", b"\1\2\0\0\0\0\0\0\0/k\2\0\0\0\0\0\0\0ab", b""),
    ("get", request(GET, sized(b"/k")), sized(b"ab")),
    ("get what is missing", request(GET, sized(b"/none")), sized(b"")),
    ("add, as captured", b"\4\2\0\0\0\0\0\0\0/n\xf9" + b"\xff" * 7, i64(-7)),
    ("add", request(ADD, sized(b"/n"), i64(10)), i64(3)),
    ("get a number", request(GET, sized(b"/n")), sized(b"3")),
    ("check", request(CHECK, keys(b"/k", b"/n")), READY),
    ("check what is missing", request(CHECK, keys(b"/k", b"/none")), NOT_READY),
    ("check nothing", request(CHECK, keys()), READY),
    ("wait for nothing", request(WAIT, keys()), STOP_WAITING),
    ("wait for what is there", request(WAIT, keys(b"/k", b"/k", b"/n")), STOP_WAITING),
    ("number of keys", request(GET_NUM_KEYS), i64(2)),
    ("delete", request(DELETE_KEY, sized(b"/n")), i64(1)),
    ("delete what is missing", request(DELETE_KEY, sized(b"/n")), i64(0)),
    ("append", request(APPEND, sized(b"/k"), sized(b"cd")), b""),
    ("append to nothing", request(APPEND, sized(b"/new"), sized(b"x")), b""),
    ("get several", request(MULTI_GET, keys(b"/k", b"/none", b"/new")), sized(b"abcd") + sized(b"") + sized(b"x")),
    ("get none", request(MULTI_GET, keys()), b""),
    ("set several", request(MULTI_SET, i64(2), sized(b"/a"), sized(b"1"), sized(b"/b"), sized(b"")), b""),
    ("set none", request(MULTI_SET, i64(0)), b""),
    ("a value may be empty", request(CHECK, keys(b"/a", b"/b")), READY),
    ("cancel without a wait", request(CANCEL_WAIT), WAIT_CANCELED),
    ("compare and set", request(COMPARE_SET, sized(b"/a"), sized(b"1"), sized(b"2")), sized(b"2")),
    ("compare in vain", request(COMPARE_SET, sized(b"/a"), sized(b"1"), sized(b"3")), sized(b"2")),
    ("compare with nothing", request(COMPARE_SET, sized(b"/c"), sized(b""), sized(b"new")), sized(b"new")),
    ("is told what it expects", request(COMPARE_SET, sized(b"/none"), sized(b"lie"), sized(b"new")), sized(b"lie")),
    ("although it is not there", request(CHECK, keys(b"/none")), NOT_READY),
    (
        "an empty value is no missing one",
        request(COMPARE_SET, sized(b"/b"), sized(b""), sized(b"full")),
        sized(b"full"),
    ),
    ("pop from nothing", request(QUEUE_POP, sized(b"/q")), i64(0)),
    ("length of nothing", request(QUEUE_LEN, sized(b"/q")), i64(0)),
    ("a queue that was asked for is not there", request(CHECK, keys(b"/q")), NOT_READY),
    ("push", request(QUEUE_PUSH, sized(b"/q"), sized(b"x")), b""),
    ("push again", request(QUEUE_PUSH, sized(b"/q"), sized(b"")), b""),
    ("length", request(QUEUE_LEN, sized(b"/q")), i64(2)),
    ("a queue is there", request(CHECK, keys(b"/q")), READY),
    ("and need not be waited for", request(WAIT, keys(b"/q")), STOP_WAITING),
    ("a queue is no key", request(GET_NUM_KEYS), i64(5)),
    ("nor has it a value", request(GET, sized(b"/q")), sized(b"")),
    ("deleting does not touch it", request(DELETE_KEY, sized(b"/q")), i64(0)),
    ("pop", request(QUEUE_POP, sized(b"/q")), i64(2) + sized(b"x")),
    ("pop the last one", request(QUEUE_POP, sized(b"/q")), i64(1) + sized(b"")),
    ("an empty queue is not there", request(CHECK, keys(b"/q")), NOT_READY),
    ("barrier, as captured", b"\x12\2\0\0\0\0\0\0\0/y\1\0\0\0\0\0\0\0", STOP_WAITING),
    ("barrier that is full", request(BARRIER, sized(b"/y"), i64(2)), STOP_WAITING),
    ("barrier for nobody", request(BARRIER, sized(b"/y"), i64(-1)), STOP_WAITING),
    ("its counter", request(GET, sized(b"/y")), sized(b"3")),
    ("a key may be empty", request(SET, sized(b""), sized(b"e")), b""),
    ("and hold anything", request(ADD, sized(bytes(range(256))), i64(1)), i64(1)),
]
STREAM = b"".join(asked for _, asked, _ in CONVERSATION)
REPLIES = b"".join(reply for _, _, reply in CONVERSATION)


@pytest.mark.needs("store-protocol")
class TestConversation:
    def test_one_after_the_other(self, connect: Connections) -> None:
        client = connect()
        for name, asked, reply in CONVERSATION:
            client.send(asked)
            assert client.fence() == reply, name

    def test_pipelined(self, connect: Connections) -> None:
        client = connect()
        client.send(STREAM)
        assert client.fence() == REPLIES

    def test_byte_by_byte(self, connect: Connections) -> None:
        client = connect()
        for byte in STREAM:
            client.send(bytes([byte]))
        assert client.fence() == REPLIES

    def test_cut_anywhere(self, connect: Connections) -> None:
        # One request of every kind, cut at each place, with an exchange of another connection in between: the first part was read.
        other, samples = connect(), {asked[0]: asked for name, asked, _ in CONVERSATION if "nothing" not in name}
        client = connect()
        for asked in samples.values():
            client.send(asked)
        expected = len(client.fence())
        assert expected > 0
        for asked in samples.values():
            for cut in range(1, len(asked)):
                client.send(asked[:cut])
                assert other.fence() == b""
                client.send(asked[cut:])
                client.fence()
        assert client.is_open()

    def test_list_of_keys(self, connect: Connections) -> None:
        client = connect()
        assert client.ask(request(LIST_KEYS), 8) == i64(0)
        names = [b"init/", b"/a", b"", b"\0\xff"]
        for name in names:
            client.send(request(SET, sized(name), sized(b"")))
        client.send(request(QUEUE_PUSH, sized(b"/q"), sized(b"")))
        client.send(request(LIST_KEYS))
        listed = client.fence()
        assert listed[:8] == i64(4)
        found, rest = [], listed[8:]
        while rest:
            (length,) = struct.unpack_from("<Q", rest)
            found.append(rest[8 : 8 + length])
            rest = rest[8 + length :]
        assert sorted(found) == sorted(names)


class TestStart:
    """Of a connection."""

    def test_a_client_of_torch_2_4_sends_no_ping(self, connect: Connections) -> None:
        client = connect()
        assert client.ask(request(ADD, sized(b"init/"), i64(1)), 8) == i64(1)

    def test_with_the_first_request_in_one_segment(self, connect: Connections) -> None:
        assert connect(VALIDATE + request(PING, b"abcd")).receive(4) == b"abcd"

    @pytest.mark.parametrize("cut", range(1, 5))
    def test_in_two_segments(self, impl: Implementation, connect: Connections, cut: int) -> None:
        def is_taken() -> bool:
            other, client = connect(), connect(VALIDATE[:cut])
            assert other.is_open()  # by now the first part was read; by torch's server on most days
            client.send(VALIDATE[cut:])
            return client.is_open()

        always_taken = all(is_taken() for _ in range(5))
        assert always_taken is impl.expect("store-start-in-pieces", torch=False, ours=True)

    def test_of_somebody_else(self, impl: Implementation, connect: Connections) -> None:
        other, client = connect(), connect(b"GET / HTTP/1.1\r\n")
        assert other.is_open()
        if impl.expect("store-strict-start", torch="waits", ours="closed") == "closed":
            assert client.is_closed()

    def test_without_the_first_message(self, impl: Implementation, connect: Connections) -> None:
        other, client = connect(), connect(request(PING, b"abcd"))
        assert other.is_open()
        if impl.expect("store-strict-start", torch="served", ours="closed") == "served":
            assert client.fence() == b"abcd"
        else:
            assert client.is_closed()

    def test_with_a_wrong_number(self, impl: Implementation, connect: Connections) -> None:
        other, client = connect(), connect(b"\0abcd")
        assert other.is_open()
        if impl.expect("store-wrong-number", torch="later", ours="at once") == "later":
            client.send(b"\0")
        assert client.is_closed()

    def test_twice(self, connect: Connections) -> None:
        client = connect()
        client.send(VALIDATE)
        assert client.is_closed()

    @pytest.mark.parametrize("opcode", [19, 100, 0xFE, 0xFF])
    def test_an_opcode_that_is_unknown(self, connect: Connections, opcode: int) -> None:
        client = connect()
        client.send(bytes([opcode]))
        assert client.is_closed()


class TestLimits:
    def test_of_a_key(self, connect: Connections) -> None:
        client = connect()
        put(client, b"k" * 8192, b"v")
        assert client.ask(request(GET, sized(b"k" * 8192)), 9) == sized(b"v")
        client.send(request(GET, sized(b"k" * 8193)))
        assert client.is_closed()

    def test_of_a_value(self, connect: Connections) -> None:
        client, largest = connect(), b"v" * (8 << 20)
        put(client, b"k", largest)
        assert client.ask(request(GET, sized(b"k")), 8 + len(largest)) == sized(largest)
        client.send(request(SET, sized(b"k"), i64(len(largest) + 1)))
        assert client.is_closed()
        # Together they may become larger.
        client = connect()
        client.send(request(APPEND, sized(b"k"), sized(largest)))
        assert client.ask(request(GET, sized(b"k")), 8) == i64(16 << 20)

    @pytest.mark.parametrize("opcode", [CHECK, WAIT, MULTI_GET, MULTI_SET])
    def test_of_a_number_of_keys(self, connect: Connections, opcode: int) -> None:
        client = connect()
        client.send(request(opcode, i64(131_073)))
        assert client.is_closed()

    def test_as_many_keys_as_there_may_be(self, connect: Connections) -> None:
        client = connect()
        put(client, b"", b"")
        for opcode, reply in ((CHECK, READY), (WAIT, STOP_WAITING), (MULTI_GET, sized(b"") * 131_072)):
            assert client.ask(request(opcode, i64(131_072), sized(b"") * 131_072), len(reply)) == reply

    @pytest.mark.parametrize("opcode", [SET, GET, ADD, DELETE_KEY, APPEND, COMPARE_SET, QUEUE_PUSH, QUEUE_POP, BARRIER])
    def test_a_length_that_nothing_has(self, connect: Connections, opcode: int) -> None:
        client = connect()
        client.send(request(opcode, i64(-1)))
        assert client.is_closed()

    @pytest.mark.parametrize("opcode", [ADD, BARRIER])
    def test_a_value_that_is_no_number(self, connect: Connections, opcode: int) -> None:
        client = connect()
        put(client, b"k", b"x")
        client.send(request(opcode, sized(b"k"), i64(1)))
        assert client.is_closed()

    def test_a_list_that_is_not_complete(self, impl: Implementation, connect: Connections) -> None:
        client, other = connect(), connect()
        client.send(request(MULTI_SET, i64(2), sized(b"a"), sized(b"1"), sized(b"b")))
        other.fence()
        expected = impl.expect("store-half-a-list", torch=1, ours=0)
        assert other.ask(request(GET_NUM_KEYS), 8) == i64(expected)


@pytest.mark.needs("store-protocol")
class TestWait:
    def test_a_reply_comes_when_everything_is_there(self, connect: Connections) -> None:
        client, other = connect(), connect()
        client.send(request(WAIT, keys(b"a", b"b", b"a")))
        assert client.fence() == b"", "a ping is answered meanwhile"
        put(other, b"b", b"")
        assert client.fence() == b""
        put(other, b"a", b"")
        assert client.receive(1) == STOP_WAITING
        put(other, b"a", b"")
        assert client.fence() == b""

    @pytest.mark.parametrize(
        "asked",
        [
            request(SET, sized(b"k"), sized(b"")),
            request(ADD, sized(b"k"), i64(0)),
            request(APPEND, sized(b"k"), sized(b"")),
            request(MULTI_SET, i64(1), sized(b"k"), sized(b"")),
            request(COMPARE_SET, sized(b"k"), sized(b""), sized(b"v")),
            request(COMPARE_SET, sized(b"k"), sized(b"no"), sized(b"v")),  # although it sets nothing
            request(QUEUE_PUSH, sized(b"k"), sized(b"")),
            request(BARRIER, sized(b"k"), i64(1)),
        ],
    )
    def test_what_ends_it(self, connect: Connections, asked: bytes) -> None:
        client, other = connect(), connect()
        client.send(request(WAIT, keys(b"k")))
        assert client.fence() == b""
        other.send(asked)
        other.fence()
        assert client.fence() == STOP_WAITING

    @pytest.mark.parametrize(
        "asked",
        [
            request(GET, sized(b"k")),
            request(DELETE_KEY, sized(b"k")),
            request(QUEUE_POP, sized(b"k")),
            request(BARRIER, sized(b"k"), i64(2)),
            request(CHECK, keys(b"k")),
        ],
    )
    def test_what_does_not(self, connect: Connections, asked: bytes) -> None:
        client, other = connect(), connect()
        client.send(request(WAIT, keys(b"k")))
        assert client.fence() == b""
        other.send(asked)
        other.fence()
        assert client.fence() == b""

    def test_it_is_given_up(self, connect: Connections) -> None:
        client, other = connect(), connect()
        for _ in range(3):
            client.send(request(WAIT, keys(b"a", b"b")))
            assert client.ask(request(CANCEL_WAIT), 1) == WAIT_CANCELED
        put(other, b"a", b"")
        put(other, b"b", b"")
        assert client.fence() == b""

    def test_it_is_given_up_too_late(self, connect: Connections) -> None:
        client, other = connect(), connect()
        client.send(request(WAIT, keys(b"a")))
        assert client.fence() == b""
        put(other, b"a", b"")
        assert client.ask(request(CANCEL_WAIT), 2) == STOP_WAITING + WAIT_CANCELED

    def test_a_waiting_client_may_disconnect(self, connect: Connections) -> None:
        client, other = connect(), connect()
        client.send(request(WAIT, keys(b"a", b"b")))
        client.fence()
        client.close()
        put(other, b"a", b"")
        put(other, b"b", b"")
        assert other.is_open()

    def test_it_is_replaced(self, impl: Implementation, connect: Connections) -> None:
        client, other = connect(), connect()
        client.send(request(WAIT, keys(b"a")) + request(WAIT, keys(b"b")))
        assert client.fence() == b""
        put(other, b"a", b"")
        assert client.fence() == impl.expect("store-new-wait", torch=STOP_WAITING, ours=b"")
        put(other, b"b", b"")
        assert client.fence() == impl.expect("store-new-wait", torch=b"", ours=STOP_WAITING)


@pytest.mark.needs("store-protocol")
class TestQueue:
    def test_one_waiting_client_is_answered(self, connect: Connections) -> None:
        first, second, pusher = connect(), connect(), connect()
        for client in (first, second):
            client.send(request(WAIT, keys(b"q")))
            assert client.fence() == b""
        for expected in ((STOP_WAITING, b""), (b"", STOP_WAITING), (b"", b"")):
            pusher.send(request(QUEUE_PUSH, sized(b"q"), sized(b"")))
            pusher.fence()
            assert (first.fence(), second.fence()) == expected

    def test_one_who_can_go_on(self, connect: Connections) -> None:
        first, second, pusher = connect(), connect(), connect()
        for client, names in ((first, keys(b"q", b"k")), (second, keys(b"q"))):
            client.send(request(WAIT, names))
            assert client.fence() == b""
        pusher.send(request(QUEUE_PUSH, sized(b"q"), sized(b"")))
        pusher.fence()
        assert (first.fence(), second.fence()) == (b"", STOP_WAITING)
        put(pusher, b"k", b"")
        assert first.fence() == STOP_WAITING

    def test_a_key_of_that_name_tells_all(self, connect: Connections) -> None:
        clients, pusher = [connect(), connect()], connect()
        for client in clients:
            client.send(request(WAIT, keys(b"q")))
            client.fence()
        put(pusher, b"q", b"")
        assert [client.fence() for client in clients] == [STOP_WAITING] * 2

    def test_one_that_holds_something_and_a_key(self, impl: Implementation, connect: Connections) -> None:
        client, pusher = connect(), connect()
        pusher.send(request(QUEUE_PUSH, sized(b"q"), sized(b"")))
        pusher.fence()
        client.send(request(WAIT, keys(b"q", b"k")))
        assert client.fence() == b""
        put(pusher, b"k", b"")
        assert client.fence() == impl.expect("store-filled-queue", torch=b"", ours=STOP_WAITING)

    def test_one_that_was_waited_for_once(self, impl: Implementation, connect: Connections) -> None:
        client, pusher = connect(), connect()
        client.send(request(WAIT, keys(b"q")))
        client.fence()
        push = request(QUEUE_PUSH, sized(b"q"), sized(b""))
        pusher.send(push)
        assert client.receive(1) == STOP_WAITING
        client.send(request(WAIT, keys(b"k")))
        assert client.fence() == b""
        pusher.send(push)
        pusher.fence()
        assert client.fence() == impl.expect("store-woken-queue", torch=STOP_WAITING, ours=b"")


@pytest.mark.needs("store-protocol")
class TestBarrier:
    def enter(self, client: RawClient, world_size: int) -> bytes:
        client.send(request(BARRIER, sized(b"b"), i64(world_size)))
        return client.fence()

    def test_all_are_told(self, connect: Connections) -> None:
        clients = [connect() for _ in range(5)]
        assert [self.enter(client, 5) for client in clients] == [b""] * 4 + [STOP_WAITING]
        assert [client.fence() for client in clients] == [STOP_WAITING] * 4 + [b""]

    def test_its_counter_stays(self, connect: Connections) -> None:
        clients = [connect() for _ in range(3)]
        assert [self.enter(client, 2) for client in clients] == [b"", STOP_WAITING, STOP_WAITING]
        assert clients[2].ask(request(GET, sized(b"b")), 9) == sized(b"3")
        assert clients[2].ask(request(DELETE_KEY, sized(b"b")), 8) == i64(1)
        assert self.enter(clients[2], 2) == b"", "begins anew"

    def test_a_client_that_cancels_has_been_counted(self, connect: Connections) -> None:
        first, second = connect(), connect()
        assert self.enter(first, 2) == b""
        assert first.ask(request(CANCEL_WAIT), 1) == WAIT_CANCELED
        assert self.enter(second, 2) == STOP_WAITING
        assert first.fence() == b""

    def test_a_client_that_disconnects_has_been_counted(self, connect: Connections) -> None:
        first, second = connect(), connect()
        assert self.enter(first, 2) == b""
        first.close()
        assert self.enter(second, 2) == STOP_WAITING

    def test_a_client_that_waits_for_the_key_is_answered_when_it_is_full(self, connect: Connections) -> None:
        waiting, first, second = connect(), connect(), connect()
        waiting.send(request(WAIT, keys(b"b")))
        assert waiting.fence() == b"", "it waits before there is a barrier"
        assert self.enter(first, 2) == b""
        assert waiting.fence() == b""
        assert self.enter(second, 2) == STOP_WAITING
        assert waiting.fence() == STOP_WAITING

    def test_it_opens_when_somebody_sets_it(self, connect: Connections) -> None:
        client, other = connect(), connect()
        assert self.enter(client, 2) == b""
        put(other, b"b", b"1")
        assert client.fence() == STOP_WAITING


class RandomClients:
    """Random requests of six connections."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def steps(self, count: int) -> list[tuple[int, bytes]]:
        """Who sends what. A client 0 is the only one that waits for a queue, and waits for nothing else."""
        return [(who, self._request(who)) for who in (self._dice.randrange(6) for _ in range(count))]

    def _request(self, who: int) -> bytes:
        dice = self._dice
        key = sized(dice.choice(NAMES))
        names = keys(*dice.choices(NAMES, k=dice.randrange(5)))
        texts = [sized(dice.choice(NUMBERS)) for _ in range(2)]
        pairs = [sized(dice.choice(NAMES)) + sized(dice.choice(NUMBERS)) for _ in range(dice.randrange(4))]
        queue = sized(dice.choice(QUEUES))
        wait = request(WAIT, keys(QUEUES[0])) if who == 0 else request(WAIT, names)
        barrier = request(BARRIER, key, i64(dice.choice([0, 1, 5, 20]))) if who else request(QUEUE_POP, queue)
        return dice.choice(
            [
                *(request(SET, key, texts[0]), request(GET, key), request(COMPARE_SET, key, *texts)),
                *(request(ADD, key, i64(dice.randrange(-5, 5))), request(CHECK, names), request(GET_NUM_KEYS)),
                *(request(DELETE_KEY, key), request(DELETE_KEY, key), request(APPEND, key, texts[0])),
                *(request(MULTI_GET, names), request(MULTI_SET, i64(len(pairs)), *pairs), request(CANCEL_WAIT)),
                *(request(QUEUE_PUSH, queue, texts[0]), request(QUEUE_POP, queue), request(QUEUE_LEN, queue)),
                *(wait, wait, wait, barrier, barrier),
            ]
        )


NAMES = [b"a", b"b", b"c", b"d", b"e"]
NUMBERS = [b"", b"0", b"1", b"2", b" 3x", b"-4"]
QUEUES = [b"q", b"r"]


@pytest.mark.needs("store-protocol")
@pytest.mark.uses_torch
@pytest.mark.parametrize("seed", range(6))
def test_random_requests(seed: int) -> None:
    steps = RandomClients(random.Random(seed)).steps(1000)
    with serving(TORCH) as theirs, serving(OURS) as ours, Connections(theirs) as torchs, Connections(ours) as own:
        sides = [[side() for _ in range(6)] for side in (torchs, own)]
        is_waiting, done = [False] * 6, 0
        for number, (who, asked) in enumerate(steps):
            if is_waiting[who] and asked[0] != CANCEL_WAIT:
                continue  # torch's client is busy until it is told, or gives up
            replies = []
            for clients, reconnect in zip(sides, (torchs, own), strict=True):
                clients[who].send(asked)
                try:
                    said: bytes | None = clients[who].fence()
                except (AssertionError, ConnectionError):
                    said, clients[who] = None, reconnect()
                replies.append([said, *(client.fence() for client in clients)])
            assert replies[0] == replies[1], f"seed {seed}, step {number}: client {who} sends {asked!r}"
            is_waiting[who] = asked[0] in {WAIT, BARRIER} and said == b""
            is_waiting = [waits and told == b"" for waits, told in zip(is_waiting, replies[1][1:], strict=True)]
            done += 1
    assert done > len(steps) / 4
