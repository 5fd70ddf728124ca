"""Mirror of ``torch.distributed.elastic.control_plane``.

Intended difference: an exception in the body is recorded. torch only decorates the function that creates the context manager, and
does not record exceptions of the body.
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
    """Decorate the main function of a worker: record its exceptions and serve torch's debug handlers.

    Mirrors ``torch.distributed.elastic.control_plane.worker_main``. The handlers are served on the unix socket at
    ``$TORCH_WORKER_SERVER_SOCKET``, if the variable is set::

        @worker_main()
        def main(): ...

    Raises:
        ModuleNotFoundError: the variable is set and torch is not installed.
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
