"""Compares the store with torch's libuv store: the same clients, each server in its own process.

    just bench-store               # all figures
    just bench-store --only latency

Every reply is checked. Prints a Markdown table: median and range of both sides, and their ratio.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from side_by_side import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERVERS = {
    "torch": "from torch.distributed import TCPStore as S; s = S('127.0.0.1', 0, is_master=True, wait_for_workers=False)",
    "ferroelastic": "from ferroelastic._rust import StoreServer as S; s = S('127.0.0.1')",
}
CALLS = 3000
KEYS = 16_384
ARRIVALS = 1000
CROWD = 256

VALIDATE = b"\0" + struct.pack("<I", 0x3C85F7CE)
PING = b"\x0dping"


@contextmanager
def serving(side: str) -> Iterator[int]:
    """Serve an empty store and yield its port."""
    program = f"{SERVERS[side]}\nimport sys\nprint(s.port, flush=True)\nsys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.communicate()
    assert server.returncode == 0


def client(port: int) -> Any:
    """Return torch's client, which both servers are measured with."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=120))


def micros(call: Callable[[int], object], expected: Callable[[int], object]) -> list[float]:
    samples = []
    for number in range(CALLS):
        began = time.perf_counter_ns()
        result = call(number)
        samples.append((time.perf_counter_ns() - began) / 1e3)
        assert result == expected(number), (number, result)
    return samples


def measure_latency(side: str) -> dict[str, list[float]]:
    """Return the microseconds of calls of one client."""
    with serving(side) as port:
        store = client(port)

        def set_and_get(number: int) -> bytes:
            store.set("k", str(number))
            return bytes(store.get("k"))

        return {
            "set and get, us": micros(set_and_get, lambda number: str(number).encode()),
            "get, us": micros(lambda _: store.get("k"), lambda _: str(CALLS - 1).encode()),
            "add, us": micros(lambda _: store.add("n", 1), lambda number: number + 1),
            "wait for a key that is there, us": micros(lambda _: store.wait(["k"]), lambda _: None),
        }


def measure_large(side: str) -> dict[str, list[float]]:
    """Return the milliseconds of requests with many keys."""
    names = [f"torchelastic/assigned_ranks/{number}" for number in range(KEYS)]
    values = [f'["worker", {number}]' for number in range(KEYS)]
    with serving(side) as port:
        store = client(port)
        began = time.perf_counter()
        store.multi_set(names, values)
        assert store.num_keys() == KEYS  # waits for the server, because multi_set has no reply
        set_s = time.perf_counter() - began
        began = time.perf_counter()
        got = store.multi_get(names)
        got_s = time.perf_counter() - began
        assert got == [value.encode() for value in values]
        figures = {"multi_set of 16,384 keys, ms": [set_s * 1e3], "multi_get of 16,384 keys, ms": [got_s * 1e3]}
        return figures | measure_large_bytes(port, names, values)


def sized(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def measure_large_bytes(port: int, names: list[str], values: list[str]) -> dict[str, list[float]]:
    """Return the same figures without torch's client, which writes requests and reads replies in small pieces."""
    count = struct.pack("<Q", KEYS)
    setting = b"\x0b" + count + b"".join(sized(name) + sized(value) for name, value in zip(names, values, strict=True))
    getting = b"\x0a" + count + b"".join(map(sized, names))
    expected = b"".join(map(sized, values))
    with socket.create_connection(("127.0.0.1", port)) as connection:

        def ask(request: bytes, expected: bytes) -> float:
            began = time.perf_counter()
            connection.sendall(request)
            reply = bytearray()
            while len(reply) < len(expected) and (more := connection.recv(1 << 20)):
                reply += more
            elapsed_s = time.perf_counter() - began
            assert reply == expected
            return elapsed_s * 1e3

        ask(VALIDATE + PING, PING[1:])
        return {
            "multi_set of 16,384 keys, as bytes, ms": [ask(setting + PING, PING[1:])],
            "multi_get of 16,384 keys, as bytes, ms": [ask(getting, expected)],
        }


def replies(sockets: dict[int, socket.socket], expected: bytes) -> None:
    """Wait until each socket has received the expected reply."""
    poll = select.epoll()
    with poll:
        for number in sockets:
            poll.register(number, select.EPOLLIN)
        missing = len(sockets)
        while missing:
            ready = poll.poll(120)
            assert ready, f"{missing} of {len(sockets)} got no reply"
            for number, _ in ready:
                reply = sockets[number].recv(64)
                assert reply == expected, reply
                poll.unregister(number)
                missing -= 1


def connections(stack: ExitStack, port: int, count: int) -> dict[int, socket.socket]:
    made = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(count)]
    for connection in made:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return {connection.fileno(): connection for connection in made}


def measure_arrivals(side: str) -> dict[str, list[float]]:
    """Return the milliseconds from the first connection to the reply on the last one."""
    with serving(side) as port, ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(ARRIVALS)]
        began = time.perf_counter()
        for connection in made:
            connection.connect(("127.0.0.1", port))
            connection.send(VALIDATE)
            connection.send(PING)
        replies({connection.fileno(): connection for connection in made}, PING[1:])
        elapsed_s = time.perf_counter() - began
    return {"1,000 connections until all are answered, ms": [elapsed_s * 1e3]}


def measure_barrier(side: str) -> dict[str, list[float]]:
    """Return the milliseconds from the first arrival at a barrier to the last departure."""
    samples = []
    with serving(side) as port, ExitStack() as stack:
        crowd = connections(stack, port, CROWD)
        for connection in crowd.values():
            connection.send(VALIDATE + PING)
        replies(crowd, PING[1:])
        for number in range(20):
            key = f"/barrier/{number}".encode()
            request = b"\x12" + struct.pack("<Q", len(key)) + key + struct.pack("<q", CROWD)
            began = time.perf_counter()
            for connection in crowd.values():
                connection.send(request)
            replies(crowd, b"\0")
            samples.append((time.perf_counter() - began) * 1e3)
    return {"barrier of 256, ms": samples}


def main() -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Torch's client and server resolve the name of every peer address, which may take long. Most resolvers refuse TCP, and after the first
    # failure torch does not resolve again. The figures then show the store only.
    os.environ.setdefault("RES_OPTIONS", "use-vc timeout:1 attempts:1")
    measurements = {
        "latency": (measure_latency, 5),
        "large": (measure_large, 5),
        "arrivals": (measure_arrivals, 10),
        "barrier": (measure_barrier, 5),
    }
    compare(("torch", "ferroelastic"), measurements, __doc__ or "")


if __name__ == "__main__":
    main()
