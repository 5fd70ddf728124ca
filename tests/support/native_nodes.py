"""Nodes that meet over loopback, in threads of one process and without workers."""

from __future__ import annotations

import select
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tests.support.waiting import LONG_S, eventually

from ferroelastic.rendezvous import (
    RendezvousInfo,
    RendezvousParameters,
)
from ferroelastic.rendezvous._agent_store import AgentStore
from ferroelastic.rendezvous._native import NativeRendezvous
from ferroelastic.rendezvous._notifying import Interruption, PlacedRendezvousInfo
from ferroelastic.rendezvous.registry import get_rendezvous_handler

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ferroelastic import _rust
HERE = "localhost:0"


def parameters(
    endpoint: str = HERE, nodes: tuple[int, int] = (1, 1), run_id: str = "job", backend: str = "c10d", **config: Any
) -> RendezvousParameters:
    return RendezvousParameters(backend, endpoint, run_id, *nodes, **config)


class Nodes:
    """Handlers of nodes; each waits for its rounds in a thread of its own."""

    def __init__(self) -> None:
        self.handlers: list[NativeRendezvous] = []
        self.pool = ThreadPoolExecutor()

    def __call__(self, *args: Any, **kwargs: Any) -> NativeRendezvous:
        handler = get_rendezvous_handler(parameters(*args, **kwargs))
        assert isinstance(handler, NativeRendezvous)
        self.handlers.append(handler)
        return handler

    def host(self, nodes: tuple[int, int] = (2, 2), **config: Any) -> NativeRendezvous:
        return self(nodes=nodes, is_host=True, **config)

    def guest(self, host: NativeRendezvous, nodes: tuple[int, int] = (2, 2), **config: Any) -> NativeRendezvous:
        return self(f"localhost:{host._port}", nodes, is_host=False, **config)

    def joins(self, handler: NativeRendezvous) -> Future[RendezvousInfo]:
        """Let a node wait for its next round."""
        return self.pool.submit(handler.next_rendezvous)

    def meet(self, *handlers: NativeRendezvous) -> list[RendezvousInfo]:
        """Let nodes wait for the next round, all of which are in it."""
        return [joining.result(LONG_S) for joining in [self.joins(handler) for handler in handlers]]

    def has_entered(self, handler: NativeRendezvous) -> bool:
        """Whether a node has come to the host in time."""

        def is_there() -> bool:
            client = handler._client  # the thread that waits has made it
            return client is not None and client.address is not None

        return eventually(is_there, LONG_S)

    def waits(self, handler: NativeRendezvous, host: NativeRendezvous) -> Future[RendezvousInfo]:
        """Let a node wait until the host knows it, as one too many."""
        joining = self.joins(handler)
        client = host._get_client()
        assert eventually(lambda: any("waits as a spare" in remark for remark in client.take_warnings()), LONG_S)
        return joining

    def close(self) -> None:
        for handler in reversed(self.handlers):
            handler.shutdown()
        self.pool.shutdown()
        self.handlers.clear()


def is_told(handler: NativeRendezvous) -> bool:
    """Whether the descriptor of a node that is in a round becomes readable."""
    assert handler.news_fd is not None
    return bool(select.select([handler.news_fd], [], [], LONG_S)[0])


def told(handler: NativeRendezvous) -> Interruption:
    """Wait until a node that is in a round is told why it is over."""
    assert is_told(handler)
    interruption = handler.interruption()
    assert interruption is not None
    return interruption


def has_news(handler: NativeRendezvous) -> bool:
    assert handler.news_fd is not None
    return bool(select.select([handler.news_fd], [], [], 0)[0])


def refuses(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port)).close()
    except ConnectionRefusedError:
        return True
    return False


def place_of(info: RendezvousInfo) -> _rust.Place:
    assert isinstance(info, PlacedRendezvousInfo)
    return info.place


def store_of(info: RendezvousInfo) -> AgentStore:
    assert isinstance(info.store, AgentStore)
    return info.store
