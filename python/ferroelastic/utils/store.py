"""Mirror of ``torch.distributed.elastic.utils.store``, for any object with the methods of a store.

Intended differences:

* :func:`store_timeout` restores the previous timeout also if its body raises.
* :class:`DistStoreError` is a class of this package. torch's class of this name is handled in the same way.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from ferroelastic._compat import TorchCompatible, family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ferroelastic.utils._store_types import Store

__all__ = ["DistStoreError", "barrier", "get_all", "store_timeout", "synchronize"]

_NUM_MEMBERS = "/num_members"
_LAST_MEMBER_CHECKIN = "/last_member"
_TRACE = "/TRACE"
_TRACING_GATE = "/TRACING_GATE"
_IGNORED = "<val_ignored>"
_MAX_TRACE_MISSING_RANKS = 16


class DistStoreError(TorchCompatible, RuntimeError):
    """A store did not answer in time. Mirrors ``torch.distributed.DistStoreError``."""

    __torch_class__: ClassVar[tuple[str, str]] = ("torch._C", "_DistStoreError")


@contextmanager
def store_timeout(store: Store, timeout: float) -> Iterator[None]:
    """Set the timeout of a store inside a ``with`` block. Mirrors torch's ``store_timeout``.

    Args:
        store: the store.
        timeout: timeout in seconds.

    Raises:
        DistStoreError: the block raised torch's class of this name. The new error is an instance of both classes.
    """
    from datetime import timedelta

    previous = store.timeout
    store.set_timeout(timedelta(seconds=timeout))
    try:
        yield
    except family(DistStoreError) as error:
        if isinstance(error, DistStoreError):
            raise
        raise DistStoreError(*error.args) from error
    finally:
        store.set_timeout(previous)


def get_all(store: Store, rank: int, prefix: str, world_size: int) -> Sequence[bytes]:
    """Wait for the values of ``{prefix}0`` to ``{prefix}{world_size - 1}`` and return them. Mirrors torch's ``get_all``.

    Rank 0 returns last, because it often hosts the store.

    Args:
        store: the shared store.
        rank: rank of the caller.
        prefix: prefix of the keys. Use a prefix once.
        world_size: number of keys and of callers.

    Returns:
        The values in the order of the ranks.

    Raises:
        DistStoreError: a value was not set within the store's timeout.
    """
    values = store.multi_get([f"{prefix}{index}" for index in range(world_size)])
    finished = _barrier_nonblocking(store=store, world_size=world_size, key_prefix=f"{prefix}/finished")
    if rank == 0:
        store.wait([finished])
    return values


def synchronize(
    store: Store,
    data: bytes,
    rank: int,
    world_size: int,
    key_prefix: str,
    timeout: float = 300,
) -> Sequence[bytes]:
    """Exchange data between ``world_size`` callers. Mirrors torch's ``synchronize``.

    No key is deleted, so use a prefix once.

    Args:
        store: the shared store.
        data: data of the caller.
        rank: rank of the caller.
        world_size: number of callers.
        key_prefix: prefix of the keys.
        timeout: timeout in seconds.

    Returns:
        The data of all callers in the order of the ranks.

    Raises:
        DistStoreError: not all callers arrived within ``timeout``.
    """
    with store_timeout(store, timeout):
        store.set(f"{key_prefix}{rank}", data)
        return get_all(store, rank, key_prefix, world_size)


def barrier(
    store: Store,
    world_size: int,
    key_prefix: str,
    barrier_timeout: float = 300,
    rank: int | None = None,
    rank_tracing_decoder: Callable[[int], str] | None = None,
    trace_timeout: float = 10,
) -> None:
    """Wait until ``world_size`` callers have arrived. Mirrors torch's ``barrier``.

    No key is deleted, so use a prefix once.

    Args:
        store: the shared store.
        world_size: number of callers.
        key_prefix: prefix of the keys.
        barrier_timeout: timeout in seconds.
        rank: rank of the caller. If it is given, the error of a timeout lists the missing ranks.
        rank_tracing_decoder: function that converts a rank to text, for instance to a host name.
        trace_timeout: timeout in seconds of rank 0 for the first missing rank, after a timeout of the barrier.

    Raises:
        AssertionError: ``rank_tracing_decoder`` was given without ``rank``.
        DistStoreError: not all callers arrived within ``barrier_timeout``.
    """
    if rank is None and rank_tracing_decoder is not None:
        raise AssertionError("Tracing requires rank information")

    with store_timeout(store, barrier_timeout):
        last_member = _barrier_nonblocking(store=store, world_size=world_size, key_prefix=key_prefix)
        try:
            store.wait([last_member])
        except family(DistStoreError) as error:
            if rank is None:
                raise
            missing = _find_missing(store, world_size, key_prefix, rank, rank_tracing_decoder or str, trace_timeout)
            if missing is None:
                raise
            raise type(error)(
                f"Timed out waiting on barrier on rank {rank}, for key prefix: {key_prefix} "
                f"(world_size={world_size}, missing_ranks=[{', '.join(missing)}], timeout={barrier_timeout})"
            ) from None


def _barrier_nonblocking(store: Store, world_size: int, key_prefix: str) -> str:
    last_member = key_prefix + _LAST_MEMBER_CHECKIN
    if store.add(key_prefix + _NUM_MEMBERS, 1) == world_size:
        store.set(last_member, _IGNORED)
    return last_member


def _find_missing(
    store: Store, world_size: int, key_prefix: str, rank: int, name_of: Callable[[int], str], trace_timeout: float
) -> Iterable[str] | None:
    from datetime import timedelta

    store.set(f"{key_prefix}{rank}{_TRACE}", _IGNORED)
    gate = key_prefix + _TRACING_GATE
    if rank != 0:
        try:
            store.wait([gate])
        except family(DistStoreError):
            return None  # rank 0 may be the missing rank: the caller raises its own error
        return [f"[<check rank 0 ({name_of(0)}) for missing rank info>]"]

    missing: list[str] = []
    for other in range(1, world_size):
        if len(missing) >= _MAX_TRACE_MISSING_RANKS:
            break
        try:
            timeout = timedelta(milliseconds=1) if missing else timedelta(seconds=trace_timeout)
            # One full timeout is sufficient: the other ranks publish their trace keys during it.
            store.wait([f"{key_prefix}{other}{_TRACE}"], timeout)
        except family(DistStoreError):
            missing.append(name_of(other))
    store.set(gate, _IGNORED)
    return missing
