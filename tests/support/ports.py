"""Ports of the loopback interface."""

from __future__ import annotations

import random
import socket
import threading

_given: set[int] = set()
_lock = threading.Lock()


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_for_one() -> int:
    """A free port outside the range of the kernel's own choice. No other call returns it, and no outgoing connection uses it."""
    with _lock:
        while True:
            port = random.randrange(12_000, 32_000)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            if port not in _given:
                _given.add(port)
                return port
