"""Starts threads on stacks that no other thread has used.

An agent may run in a forked child, where a destructor may join a thread of the parent. glibc identifies threads by the address of their
stack. After a fork it reuses the stacks of the parent's threads, so the destructor could wait for a thread of this package. glibc does not
reuse a stack for a thread that needs a larger one.
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
        # The size is process-wide: a thread that another module starts at the same time also gets the larger stack.
        previous = threading.stack_size(_rust.thread_stack_bytes())
        try:
            thread.start()
        finally:
            threading.stack_size(previous)
