"""Capabilities of a rendezvous beyond torch's interface, and the one place that looks for them.

An agent must also work with handlers that were written for torch. Such handlers have none of the members below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, cast

from ferroelastic._compat import newer
from ferroelastic.rendezvous.api import RendezvousInfo, RendezvousStoreInfo

if TYPE_CHECKING:
    from ferroelastic import _rust
    from ferroelastic.utils._store_types import Store

__all__ = ["Interruption", "NotifyingRendezvous", "PlacedRendezvousInfo", "may_grow", "notifier_of", "renews_store"]


class Interruption(NamedTuple):
    """The reason why a round is over before its workers are."""

    is_failure: bool
    """A worker failed; otherwise a node came, went or was lost."""
    is_final: bool
    """The job has ended: there will be no further round."""
    text: str
    """The event and its node, for people."""
    exit_code: int = 1
    """Exit code of the job, if this event ends it."""
    stop_within_s: float | None = None
    """Deadline in seconds for the workers of this node, after which other nodes reuse their ranks; ``None`` sets no deadline."""


class PlacedRendezvousInfo(RendezvousInfo):
    """Outcome of a round that includes the ranks of the workers, so agents need not agree on them in the store.

    Args:
        place: ranks and sizes of this node.
        store: store that the agents share.
        bootstrap_store_info: address of the workers' store.
    """

    def __init__(self, place: _rust.Place, store: Store, bootstrap_store_info: RendezvousStoreInfo) -> None:
        super().__init__(store, place.group_rank, place.group_world_size, bootstrap_store_info)
        self.place = place


class NotifyingRendezvous(Protocol):
    """A rendezvous handler that reports events of other nodes. torch's handlers are polled with ``num_nodes_waiting()`` instead."""

    notifies: Literal[True]
    """Marks a handler that has all members of this class."""

    @property
    def news_fd(self) -> int | None:
        """Descriptor that is readable while :meth:`interruption` returns a reason; ``None`` before the first round."""

    def begin(self) -> None:
        """Start a new job at the next round if the former job has ended.

        Raises:
            RendezvousConnectionError: this node hosts the rendezvous and cannot listen at its port.
        """

    def introduce(self, role: str, local_world_size: int, max_restarts: int) -> None:
        """Set the properties of this node's workers that their ranks depend on.

        Args:
            role: role of the workers.
            local_world_size: number of workers.
            max_restarts: number of restarts, the same on all nodes.
        """

    def interruption(self) -> Interruption | None:
        """Return why the round is over; ``None`` while it is not."""

    def report_failure(self, at_ns: int, text: str, *, exit_code: int = 1, is_final: bool) -> None:
        """Report a failed worker to all agents.

        Args:
            at_ns: time of the failure in nanoseconds since the epoch.
            text: the worker and its end, for people.
            exit_code: exit code of the job, if this failure ends it.
            is_final: this agent has no restart left.
        """

    def verdict(self) -> Interruption | None:
        """Wait until the rendezvous has decided whether a final failure ends the job; return its reason, or ``None`` outside of a round."""

    def wait_for_others(self, timeout_s: float) -> bool:
        """Report that the workers of this node have succeeded, and wait for those of all other nodes.

        Args:
            timeout_s: timeout in seconds.

        Returns:
            ``True`` if all have succeeded or the job has ended; ``False`` if the round is over and this node has to join again.

        Raises:
            RendezvousTimeoutError: the timeout has passed.
        """

    def say_farewell(self, reason: str, exit_code: int) -> None:
        """Announce that this node leaves, before its workers are stopped. :meth:`leave` follows.

        Args:
            reason: the reason, for the other nodes.
            exit_code: exit code of the job, if it cannot go on without this node.
        """

    def leave(self, reason: str, exit_code: int = 1) -> None:
        """Leave the job without ending it for the other nodes.

        Args:
            reason: the reason, for the other nodes.
            exit_code: exit code of the job, if it cannot go on without this node.
        """


def notifier_of(handler: object) -> NotifyingRendezvous | None:
    """Return ``handler`` if it reports events of other nodes by itself; ``None`` for handlers with torch's interface only."""
    # The marker's value and not the members: a mock has every member.
    return cast("NotifyingRendezvous", handler) if newer(handler, "notifies", False) is True else None


def renews_store(handler: object) -> bool:
    """Tell whether the workers' store is empty at the start of every round; see :attr:`RendezvousHandler.renews_store`."""
    return newer(handler, "renews_store", False) is True


def may_grow(handler: object) -> bool:
    """Tell whether ``num_nodes_waiting()`` has to be polled; see :attr:`RendezvousHandler.may_grow`."""
    return bool(newer(handler, "may_grow", True))
