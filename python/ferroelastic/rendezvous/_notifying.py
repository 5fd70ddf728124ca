"""Capabilities of a rendezvous beyond torch's interface. All checks for them are in this module.

An agent must also work with handlers that were written for torch. Such handlers have none of these members.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, cast

from ferroelastic._compat import newer
from ferroelastic.rendezvous.api import JobFailedError, RendezvousInfo, RendezvousStoreInfo

if TYPE_CHECKING:
    from ferroelastic import _rust
    from ferroelastic.utils._store_types import Store

__all__ = ["Interruption", "NotifyingRendezvous", "PlacedRendezvousInfo", "may_grow", "notifier_of", "renews_store"]


class Interruption(NamedTuple):
    """The event that ended a round while its workers were running."""

    is_failure: bool
    """True for a failed worker; false for a node that joined, left or was lost."""
    is_final: bool
    """True if the job has ended: there will be no further round."""
    text: str
    """Description of the event and its node."""
    exit_code: int = 1
    """Exit code of the job if this event ends it."""
    stop_within_s: float | None = None
    """Time in seconds to stop the workers of this node. Other nodes reuse their ranks afterwards. ``None`` for no deadline."""
    detail: str = ""
    """Explanation of a worker's failure that ends the job, as :meth:`NotifyingRendezvous.report_failure` got it on its node."""
    is_loss: bool = False
    """True if a node was lost or has left."""
    decision: _rust.Decision | None = None
    """Decision of the restart policy on a failure. ``None`` for other events."""

    def as_error(self, more: str = "") -> JobFailedError:
        """Return the error of a job that this event has ended.

        Args:
            more: appended to the text.
        """
        text = f"the job has ended: {self.text}{more}"
        return JobFailedError(text, self.exit_code, detail=self.detail, is_loss=self.is_loss)


class PlacedRendezvousInfo(RendezvousInfo):
    """Outcome of a round with the ranks of the workers. The agents do not have to assign ranks through the store.

    Args:
        place: ranks and sizes of this node.
        store: store of the agents.
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
        """Descriptor that is readable while :meth:`interruption` returns an event; ``None`` before the first round."""

    def begin(self) -> None:
        """Start a new job with the next round if the previous job has ended.

        Raises:
            RendezvousConnectionError: this node hosts the rendezvous and cannot listen on its port.
        """

    def introduce(
        self, role: str, local_world_size: int, max_restarts: int, options: dict[str, str] | None = None
    ) -> None:
        """Set the properties of this node's workers that the assignment of ranks uses.

        Args:
            role: role of the workers.
            local_world_size: number of workers.
            max_restarts: number of restarts, the same on all nodes.
            options: settings of the restart policy by the name of their option, the same on all nodes.
        """

    def interruption(self) -> Interruption | None:
        """Return the event that ended the round; ``None`` while the round lasts."""

    def report_failure(
        self, at_ns: int, text: str, *, exit_code: int = 1, facts: _rust.FailureFacts, detail: str = ""
    ) -> None:
        """Report a failed worker to all agents.

        Args:
            at_ns: time of the failure in nanoseconds since the epoch.
            text: description of the worker and its failure.
            exit_code: exit code of the job if this failure ends it.
            facts: facts for the restart policy of the job.
            detail: explanation of a failure that may be final, for the report on all nodes.
        """

    def report_progress(self) -> None:
        """Report that the workers of this node have made progress in this round."""

    def verdict(self) -> Interruption | None:
        """Wait for the decision on a reported failure.

        Returns:
            The event that ended the round; ``None`` if this node is not in a round.
        """

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
        """Announce that this node will leave, before its workers are stopped. Call :meth:`leave` afterwards.

        Args:
            reason: reason for the other nodes.
            exit_code: exit code of the job if it cannot continue without this node.
        """

    def leave(self, reason: str, exit_code: int = 1) -> None:
        """Leave the job without ending it for the other nodes.

        Args:
            reason: reason for the other nodes.
            exit_code: exit code of the job if it cannot continue without this node.
        """


def notifier_of(handler: object) -> NotifyingRendezvous | None:
    """Return ``handler`` if it reports events of other nodes by itself; ``None`` for handlers with torch's interface only."""
    # Check the value of the marker and not the members, because a mock has every member.
    return cast("NotifyingRendezvous", handler) if newer(handler, "notifies", False) is True else None


def renews_store(handler: object) -> bool:
    """Return whether the workers' store is empty at the start of every round; see :attr:`RendezvousHandler.renews_store`."""
    return newer(handler, "renews_store", False) is True


def may_grow(handler: object) -> bool:
    """Return whether ``num_nodes_waiting()`` must be polled; see :attr:`RendezvousHandler.may_grow`."""
    return bool(newer(handler, "may_grow", True))
