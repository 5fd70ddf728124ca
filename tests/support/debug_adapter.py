"""A client of the Debug Adapter Protocol, as far as the tests of debuggers need one."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from typing_extensions import Self

PATIENCE_S = 120.0


class Session:
    """One connection to a debug adapter, attached to one process.

    Args:
        address: host and port of the adapter.
        options: what ``attach`` is told besides.
        source: script with breakpoints.
        lines: where they are.
    """

    def __init__(
        self, address: tuple[str, int], options: dict[str, Any], source: str = "", lines: Sequence[int] = ()
    ) -> None:
        self._socket = socket.create_connection(address, timeout=PATIENCE_S)
        self._stream = self._socket.makefile("rb")
        self._number = 0
        self._events: list[dict[str, Any]] = []
        self._responses: dict[int, dict[str, Any]] = {}
        self.answer_to(self.ask("initialize", adapterID="test", pathFormat="path"))
        attached = self.ask("attach", **options)
        self.event("initialized")
        if source:
            breakpoints = [{"line": line} for line in lines]
            self.answer_to(self.ask("setBreakpoints", source={"path": source}, breakpoints=breakpoints))
        self.answer_to(self.ask("configurationDone"))
        self.answer_to(attached)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()
        self._socket.close()

    def ask(self, command: str, **arguments: Any) -> int:
        """Send a request and return its number."""
        self._number += 1
        message = {"seq": self._number, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(message).encode()
        self._socket.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return self._number

    def answer_to(self, number: int) -> dict[str, Any]:
        """Wait for the answer to a request and return its body."""
        while number not in self._responses:
            self._read()
        response = self._responses.pop(number)
        assert response["success"], response
        return dict(response.get("body") or {})

    def event(self, name: str) -> dict[str, Any]:
        """Wait for the next event of this name and return its body."""
        while True:
            for index, event in enumerate(self._events):
                if event["event"] == name:
                    del self._events[index]
                    return dict(event.get("body") or {})
            self._read()

    def _read(self) -> None:
        length = 0
        while header := self._stream.readline().strip():
            name, _, value = header.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        assert length, "the adapter has closed the connection"
        message = json.loads(self._stream.read(length))
        if message["type"] == "event":
            self._events.append(message)
        elif message["type"] == "response":
            self._responses[message["request_seq"]] = message
