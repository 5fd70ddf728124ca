"""Mirror of ``torch.distributed.elastic.control_plane``.

Intended difference: an exception in the body is recorded. torch decorates the function that makes the context manager, and records
nothing of what happens within.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ferroelastic.multiprocessing.errors import get_error_handler, record

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["record", "worker_main"]

TORCH_WORKER_SERVER_SOCKET = "TORCH_WORKER_SERVER_SOCKET"


@contextmanager
def worker_main() -> Iterator[None]:
    """Run the main function of a worker with its errors recorded and torch's debug handlers served.

    The handlers are served on the unix socket that the environment variable ``TORCH_WORKER_SERVER_SOCKET`` names, if it is set::

        @worker_main()
        def main(): ...
    """
    handler = get_error_handler()
    handler.initialize()
    socket_path = os.environ.get(TORCH_WORKER_SERVER_SOCKET)
    with ExitStack() as stack:
        if socket_path is not None:
            from ferroelastic import _torch

            stack.callback(_torch.start_worker_server(socket_path).shutdown)
        try:
            yield
        except Exception as error:
            handler.record_exception(error)
            raise
