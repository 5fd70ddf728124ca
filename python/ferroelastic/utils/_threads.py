"""Starting threads whose stacks are of no thread that has ended.

An agent may run in a forked child. What is destroyed there may wait for a thread of the parent, which glibc takes for ended and knows by the
address of its stack. glibc gives the stacks of ended threads to new ones: the wait would become one for a thread of ours. A larger stack
than any of those is new memory.
"""

from __future__ import annotations

import threading

__all__ = ["start"]

_lock = threading.Lock()


def start(thread: threading.Thread) -> None:
    """Start a thread on a stack of its own size, which is reserved and not used.

    Args:
        thread: the thread.

    Raises:
        RuntimeError: it was started before, or no thread can be had.
    """
    from ferroelastic import _rust

    with _lock:
        # A thread that somebody else starts at this moment gets a larger stack, too.
        former = threading.stack_size(_rust.thread_stack_bytes())
        try:
            thread.start()
        finally:
            threading.stack_size(former)
