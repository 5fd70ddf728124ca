"""Mirror of ``torch.distributed.elastic.agent.server.health_check_server``: the interface, which serves nothing yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HealthCheckServer", "create_healthcheck_server"]

log = get_logger(__name__)


class HealthCheckServer:
    """Tells an orchestrator whether the agent is alive; to be extended by what listens on the port.

    Mirrors ``torch.distributed.elastic.agent.server.health_check_server.HealthCheckServer``.

    Args:
        alive_callback: returns when the agent last made progress, in seconds since the epoch.
        port: port to listen on.
        timeout: seconds without progress after which the agent counts as dead.
    """

    def __init__(self, alive_callback: Callable[[], int], port: int, timeout: int) -> None:
        self._alive_callback = alive_callback
        self._port = port
        self._timeout = timeout

    def start(self) -> None:
        """Start to listen. This class does not: it warns that nothing will answer."""
        log.warning("No health check server started: nothing will answer on port %s", self._port)

    def stop(self) -> None:
        """Stop to listen."""
        log.info("Stopping noop health check server.")

    @property
    def alive_callback(self) -> Callable[[], int]:
        """Returns when the agent last made progress, in seconds since the epoch."""
        return self._alive_callback


def create_healthcheck_server(alive_callback: Callable[[], int], port: int, timeout: int) -> HealthCheckServer:
    """Return a health check server, not started.

    Args:
        alive_callback: returns when the agent last made progress, in seconds since the epoch.
        port: port to listen on.
        timeout: seconds without progress after which the agent counts as dead.
    """
    return HealthCheckServer(alive_callback, port, timeout)
