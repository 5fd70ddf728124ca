"""Mirror of ``torch.distributed.elastic.agent.server.health_check_server``.

Intended difference: the server serves. torch's is an interface, whose ``start`` says that nothing was started.
"""

from __future__ import annotations

import atexit
import os
import threading
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
"""Environment variable (not in torch): host name or address to listen on, ``0.0.0.0`` for all; unset listens on loopback only."""

_LOOPBACK = "127.0.0.1"
_JOIN_S = 1.0
_MOST_PORT = 65535


class HealthCheckServer:
    """Tells an orchestrator over HTTP whether the agent is alive. Mirrors torch's ``HealthCheckServer``.

    It answers from a native thread, also while the interpreter is stuck: ``/livez`` (and ``/``, ``/healthz``) with 200, or with 503 and the
    reason if there was no progress for the timeout, the callback fails or does not return within half a second, or no Python thread can
    run; ``/readyz`` with 200 while the workers run; ``/status`` as JSON; ``/metrics`` for Prometheus. It listens on loopback unless
    ``TORCHELASTIC_HEALTH_CHECK_HOST`` says otherwise.

    Args:
        alive_callback: returns when the agent last made progress, in seconds since the epoch. It is called in a thread of its own, never twice
            at once.
        port: port to listen on; 0 takes a free one.
        timeout: seconds without progress after which the agent counts as dead.
    """

    def __init__(self, alive_callback: Callable[[], int], port: int, timeout: int) -> None:
        self._alive_callback = alive_callback
        self._port = port
        self._timeout = timeout
        self._native: _rust.HealthServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to listen. Doing so again does nothing.

        Where nobody can listen, that is logged as an error, once, and nothing else happens: a job does not fail for want of a health check.
        """
        if self.board is not None:
            return
        host = os.environ.get(TORCHELASTIC_HEALTH_CHECK_HOST) or _LOOPBACK
        try:
            native = _listen(host, self._port, self._timeout)
        except (OSError, ValueError) as error:
            log.error("no health checks will be answered: %s", _describe(error, host, self._port))  # noqa: TRY400 - the text says all
            return
        self._native = native
        _started.add(self)
        _set_fork_hook()
        # Before the engine's own hook, which was registered earlier: the thread has to be gone when the interpreter is.
        atexit.register(self.stop)
        thread = threading.Thread(target=_answer_questions, args=(native, self), name="ferro-health", daemon=True)
        try:
            _threads.start(thread)
        except RuntimeError as error:
            self.stop()
            log.error("no health checks will be answered: %s", error)  # noqa: TRY400 - the text says all
            return
        self._thread = thread
        log.info("health checks are answered on http://%s", endpoint_text(native.host, native.port))

    def stop(self) -> None:
        """Stop to listen; the port is free afterwards. Doing so again does nothing.

        A callback that does not return is left behind after a second.
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
                log.warning("alive_callback of the health check server does not return: its thread is left behind")

    @property
    def alive_callback(self) -> Callable[[], int]:
        """Returns when the agent last made progress, in seconds since the epoch."""
        return self._alive_callback

    @property
    def board(self) -> _rust.HealthServer | None:
        """The native server, for the agent to say what it is doing; ``None`` while nothing listens (not in torch)."""
        return self._native


def create_healthcheck_server(alive_callback: Callable[[], int], port: int, timeout: int) -> HealthCheckServer:
    """Return a health check server, not started.

    Args:
        alive_callback: returns when the agent last made progress, in seconds since the epoch.
        port: port to listen on.
        timeout: seconds without progress after which the agent counts as dead.
    """
    return HealthCheckServer(alive_callback, port, timeout)


def _listen(host: str, port: int, timeout_s: float) -> _rust.HealthServer:
    from ferroelastic._engine import get_engine

    if not 0 <= port <= _MOST_PORT:
        raise ValueError(f"failed to listen on {endpoint_text(host, port)}: a port is a number from 0 to {_MOST_PORT}")
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
    """Ask the callback for every probe that wants to know, until the server is closed."""
    try:
        while native.next_question():
            _answer(native, server)
    except RuntimeError:  # the engine has ended, and with it the server
        log.debug("health check thread ends", exc_info=True)


def _text_of(error: BaseException) -> str:
    return describe_error(error).encode("utf-8", "replace").decode()


def _answer(native: _rust.HealthServer, server: HealthCheckServer) -> None:
    try:
        progress = float(server.alive_callback())
    except BaseException as error:  # noqa: BLE001 - whatever it is, the probe is told
        native.answer_failed(_text_of(error))
    else:
        native.answer(progress)


# ---- forked children

_started: weakref.WeakSet[HealthCheckServer] = weakref.WeakSet()
_hook_set = False


def _set_fork_hook() -> None:
    global _hook_set  # noqa: PLW0603 - hooks belong to the interpreter and cannot be taken back
    if not _hook_set:
        os.register_at_fork(after_in_child=_forget)
        _hook_set = True


def _forget() -> None:
    """Let go of the listening sockets in a forked child, where they would take connections that nobody accepts."""
    for server in list(_started):
        native, server._native, server._thread = server._native, None, None  # noqa: SLF001 - this module's class
        atexit.unregister(server.stop)
        if native is not None:
            native.close()
    _started.clear()
