"""The wire format of timer requests: torch's format with one line of JSON per request. The engine parses it in ``watchdog/wire.rs``."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["NEVER_S", "VERSION", "encode", "encode_heartbeat", "join"]

VERSION = 1

NEVER_S = 1e9
"""Longest timeout in seconds (30 years). The engine treats it as no deadline."""


def join(version: object, pid: object, scope_id: str, expiration_time: object, signal: object) -> str:
    """Return a request without the line end. Every argument is the JSON text of a value, or an integer."""
    return (
        f'{{"version": {version}, "pid": {pid}, "scope_id": {scope_id}, '
        f'"expiration_time": {expiration_time}, "signal": {signal}}}'
    )


def encode(version: Any, pid: Any, scope_id: Any, expiration_time: Any, signal: Any) -> str:
    """Return a request without the line end. Every argument is a value that JSON can represent."""
    return join(*map(json.dumps, (version, pid, scope_id, expiration_time, signal)))


def encode_heartbeat(request: str, slot: int, timeout_s: float) -> str:
    """Add a heartbeat to a request. Only servers of this package support heartbeats.

    Args:
        request: a request from :func:`encode`.
        slot: index of the process's heartbeat slot.
        timeout_s: maximum time between two heartbeats in seconds.
    """
    return f"{request[:-1]}, {json.dumps({'heartbeat': {'slot': slot, 'timeout_s': timeout_s}})[1:]}"
