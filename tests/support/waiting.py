"""Waiting for facts that nothing reports."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ferroelastic.utils.process_state import read_proc_state

if TYPE_CHECKING:
    from collections.abc import Callable

LONG_S = 60.0
"""Upper bound for a fact that must come. A passing test never waits this long."""
SETTLE_S = 5.0
PARKED_S = 0.06
"""A process that sleeps this long has finished its work and waits."""


def eventually(condition: Callable[[], bool], timeout_s: float = SETTLE_S) -> bool:
    """Whether ``condition`` becomes true within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def is_alive(pid: int) -> bool:
    """Whether a process runs. An orphan may stay a zombie where the init process of a container reaps nothing."""
    return read_proc_state(pid) not in {None, "Z", "X"}


def is_parked(pid: int) -> bool:
    """Whether a process sleeps for ``PARKED_S`` without a break."""
    until = time.monotonic() + PARKED_S
    while time.monotonic() < until:
        if read_proc_state(pid) != "S":
            return False
        time.sleep(PARKED_S / 10)
    return True
