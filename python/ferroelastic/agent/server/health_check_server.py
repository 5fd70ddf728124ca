"""Mirror of ``torch.distributed.elastic.agent.server.health_check_server``.

Intended difference: this server answers health checks. torch's class is a stub whose ``start`` only logs a warning.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING

from ferroelastic._ports import NO_OWNER, port_owner
from ferroelastic._text import describe_error, endpoint_text
from ferroelastic.utils import _threads
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferroelastic import _rust

__all__ = ["TORCHELASTIC_HEALTH_CHECK_HOST", "HealthCheckServer", "create_healthcheck_server"]

log = get_logger(__name__)

TORCHELASTIC_HEALTH_CHECK_HOST = "TORCHELASTIC_HEALTH_CHECK_HOST"
"""Environment variable (not in torch): host name or address to listen on, ``0.0.0.0`` for all addresses. Default: loopback."""

_LOOPBACK = "127.0.0.1"
_JOIN_S = 1.0
_MAX_PORT = 65535


class _AliveCallbackProxy:
    """An alive callback for a server that is created before the agent. Mirrors torch's ``_AliveCallbackProxy``."""

    def __init__(self) -> None:
        self._delegate: Callable[[], int] | None = None

    def __call__(self) -> int:
        return int(time.time()) if self._delegate is None else self._delegate()

    def set_delegate(self, delegate: Callable[[], int]) -> None:
        """Call ``delegate`` from now on."""
        self._delegate = delegate


class HealthCheckServer:
    """HTTP server for the liveness of the agent. Mirrors torch's ``HealthCheckServer``.

    A native thread answers, even while the interpreter is stuck:

    * ``/livez`` (and ``/``, ``/healthz``): 200, or 503 with the reason. Reasons are no progress for the timeout, a callback that fails or
      takes longer than half a second, or an interpreter in which no Python thread can run.
    * ``/readyz``: 200 while the workers run, else 503.
    * ``/status``: the state as JSON.
    * ``/metrics``: metrics for Prometheus.

    It listens on ``$TORCHELASTIC_HEALTH_CHECK_HOST``, by default on loopback.

    Args:
        alive_callback: returns the time of the agent's last progress, in seconds since the epoch. A separate thread calls it, one call at a
            time.
        port: port to listen on. 0 selects a free one.
        timeout: seconds without progress after which the agent counts as dead.
    """

    def __init__(self, alive_callback: Callable[[], int], port: int, timeout: int) -> None:
        self._alive_callback = alive_callback
        self._port = port
        self._timeout = timeout
        self._native: _rust.HealthServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to listen. Idempotent.

        A failure to listen is logged as an error and does not raise: a job must not fail because of its health checks.
        """
        if self.board is not None:
            return
        host = os.environ.get(TORCHELASTIC_HEALTH_CHECK_HOST) or _LOOPBACK
        try:
            native = _listen(host, self._port, self._timeout)
        except (OSError, ValueError) as error:
            log.error("health checks are disabled: %s", _describe(error, host, self._port))  # noqa: TRY400 - the text has all details
            return
        self._native = native
        _started.add(self)
        _set_fork_hook()
        # Runs before the engine's hook, which was registered earlier: the thread must end before the interpreter does.
        atexit.register(self.stop)
        thread = threading.Thread(target=_answer_questions, args=(native, self), name="ferro-health", daemon=True)
        try:
            _threads.start(thread)
        except RuntimeError as error:
            self.stop()
            log.error("health checks are disabled: %s", error)  # noqa: TRY400 - the text has all details
            return
        self._thread = thread
        log.info("answering health checks on http://%s", endpoint_text(native.host, native.port))

    def stop(self) -> None:
        """Stop listening. The port is free afterwards. Idempotent.

        Waits up to a second for a running callback.
        """
        native, self._native = self._native, None
        thread, self._thread = self._thread, None
        if native is None:
            return
        log.info("Stopping health check server.")
        atexit.unregister(self.stop)
        _started.discard(self)
        native.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)
            if thread.is_alive():
                log.warning(
                    "alive_callback of the health check server did not return within %g s; its thread is left running",
                    _JOIN_S,
                )

    @property
    def alive_callback(self) -> Callable[[], int]:
        """Callback that returns the time of the agent's last progress, in seconds since the epoch."""
        return self._alive_callback

    @property
    def board(self) -> _rust.HealthServer | None:
        """The native server, to which the agent reports its state. ``None`` while the server does not listen. Not in torch."""
        return self._native


def create_healthcheck_server(alive_callback: Callable[[], int], port: int, timeout: int) -> HealthCheckServer:
    """Return a health check server that is not started. Mirrors torch's ``create_healthcheck_server``.

    Args:
        alive_callback: returns the time of the agent's last progress, in seconds since the epoch.
        port: port to listen on. 0 selects a free one.
        timeout: seconds without progress after which the agent counts as dead.
    """
    return HealthCheckServer(alive_callback, port, timeout)


def _listen(host: str, port: int, timeout_s: float) -> _rust.HealthServer:
    from ferroelastic._engine import get_engine

    if not 0 <= port <= _MAX_PORT:
        raise ValueError(f"failed to listen on {endpoint_text(host, port)}: the port must be from 0 to {_MAX_PORT}")
    return get_engine().health_server(host, port, timeout_s)


def _describe(error: Exception, host: str, port: int) -> str:
    import errno

    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    if error.errno != errno.EADDRINUSE:
        return error.strerror or str(error)
    owner = port_owner(port) or NO_OWNER
    return f"failed to listen on {endpoint_text(host, port)}: the port is in use by {owner}; choose another one"


def _answer_questions(native: _rust.HealthServer, server: HealthCheckServer) -> None:
    """Answer the questions of the native server with the callback, until the server is closed."""
    try:
        while native.next_question():
            _answer(native, server)
    except RuntimeError:  # the engine was closed, and the server with it
        log.debug("health check thread ends", exc_info=True)


def _text_of(error: BaseException) -> str:
    return describe_error(error).encode("utf-8", "replace").decode()


def _answer(native: _rust.HealthServer, server: HealthCheckServer) -> None:
    try:
        progress = float(server.alive_callback())
    except BaseException as error:  # noqa: BLE001 - the probe gets every error
        native.answer_failed(_text_of(error))
    else:
        native.answer(progress)


# ---- forked children

_started: weakref.WeakSet[HealthCheckServer] = weakref.WeakSet()
_hook_set = False


def _set_fork_hook() -> None:
    global _hook_set  # noqa: PLW0603 - hooks belong to the interpreter and cannot be removed
    if not _hook_set:
        os.register_at_fork(after_in_child=_forget)
        _hook_set = True


def _forget() -> None:
    """Close the listening sockets in a forked child, where they would receive connections that are never accepted."""
    for server in list(_started):
        native, server._native, server._thread = server._native, None, None  # noqa: SLF001 - this module's class
        atexit.unregister(server.stop)
        if native is not None:
            native.close()
    _started.clear()
