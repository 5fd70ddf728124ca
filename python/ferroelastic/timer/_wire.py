"""The wire format of timer requests, which is torch's: one line of JSON for each request. The engine has it in ``watchdog/wire.rs``."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["NEVER_S", "VERSION", "encode", "encode_heartbeat", "join"]

VERSION = 1

NEVER_S = 1e9
"""Longest timeout in seconds (30 years). The engine takes it for no deadline."""


def join(version: object, pid: object, scope_id: str, expiration_time: object, signal: object) -> str:
    """Return a request without the line's end. Every argument is the JSON text of a value, or an integer."""
    return (
        f'{{"version": {version}, "pid": {pid}, "scope_id": {scope_id}, '
        f'"expiration_time": {expiration_time}, "signal": {signal}}}'
    )


def encode(version: Any, pid: Any, scope_id: Any, expiration_time: Any, signal: Any) -> str:
    """Return a request with any values that JSON can hold."""
    return join(*map(json.dumps, (version, pid, scope_id, expiration_time, signal)))


def encode_heartbeat(request: str, slot: int, timeout_s: float) -> str:
    """Return ``request`` with a heartbeat, which only servers of this package understand.

    Args:
        request: a request from :func:`encode`.
        slot: index of the slot that the process beats in.
        timeout_s: seconds after a beat at which the timer expires.
    """
    return f"{request[:-1]}, {json.dumps({'heartbeat': {'slot': slot, 'timeout_s': timeout_s}})[1:]}"
