"""Starts threads on stacks that no ended thread has used.

An agent may run in a forked child. A destructor there may join a thread of the parent. glibc identifies that thread by the address of its
stack, takes it for ended, and reuses such stacks for new threads: the destructor would wait for one of our threads. glibc does not reuse a stack
for a thread that needs a larger one.
"""

from __future__ import annotations

import threading

__all__ = ["start"]

_lock = threading.Lock()


def start(thread: threading.Thread) -> None:
    """Start a thread with a larger stack than other threads have. The additional memory is reserved, not used.

    Args:
        thread: the thread.

    Raises:
        RuntimeError: the thread was started before, or the system cannot start another thread.
    """
    from ferroelastic import _rust

    with _lock:
        # The size is process-wide: a thread that another module starts now gets the larger stack, too.
        former = threading.stack_size(_rust.thread_stack_bytes())
        try:
            thread.start()
        finally:
            threading.stack_size(former)
