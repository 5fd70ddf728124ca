"""Starting threads whose stacks are of no thread that has ended.

An agent may run in a forked child. What is destroyed there may wait for a thread of the parent, which glibc takes for ended and knows by the
address of its stack. glibc gives the stacks of ended threads to new ones: the wait would become one for a thread of ours. A larger stack
than any of those is new memory.
"""

from __future__ import annotations

import resource
import threading

__all__ = ["start"]

_USUAL_BYTES = 8 << 20
_lock = threading.Lock()


def start(thread: threading.Thread) -> None:
    """Start a thread on a stack of its own: of twice the usual size, which is reserved and not used."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    usual = _USUAL_BYTES if soft == resource.RLIM_INFINITY else min(max(soft, _USUAL_BYTES), 64 * _USUAL_BYTES)
    with _lock:
        # Whoever else starts a thread at this moment gets a larger stack, too.
        former = threading.stack_size(2 * usual)
        try:
            thread.start()
        finally:
            threading.stack_size(former)
