"""Masks of standard streams to redirect or tee, and checks of mappings by local rank."""

from __future__ import annotations

import enum
import re
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Std", "get_std_cm", "to_map"]

_VALUE_REGEX = r"[0-3]"
_MAPPING_REGEX = r"(\d+:[0-3],)*(\d+:[0-3])"


class Std(enum.IntFlag):
    """Standard streams of a worker, as a bit mask. Mirrors ``torch.distributed.elastic.multiprocessing.Std``."""

    NONE = 0
    OUT = 1
    ERR = 2
    ALL = OUT | ERR

    @classmethod
    def from_str(cls, vm: str) -> Std | dict[int, Std]:
        """Parse a mask, or one mask per local rank, from a command line option. Mirrors torch's ``Std.from_str``.

        ``"3"`` is ``Std.ALL``; ``"0:3,12:1"`` is ``{0: Std.ALL, 12: Std.OUT}``.

        Args:
            vm: text of a mask or of a mapping.

        Returns:
            One mask for all ranks, or a mapping from local rank to mask.

        Raises:
            ValueError: ``vm`` has neither format.
        """
        if re.fullmatch(_VALUE_REGEX, vm):
            return cls(int(vm))
        if re.fullmatch(_MAPPING_REGEX, vm):
            pairs = (pair.split(":") for pair in vm.split(","))
            return {int(local_rank): cls(int(value)) for local_rank, value in pairs}
        raise ValueError(
            f"{vm!r} is not a stream mask: give 0 (none), 1 (stdout), 2 (stderr) or 3 (both),"
            " or one of these per local rank, as in '0:3,1:0'"
        )


def to_map(val_or_map: Std | Mapping[int, Std], local_world_size: int) -> dict[int, Std]:
    """Return one mask per local rank. Mirrors torch's ``to_map``.

    Args:
        val_or_map: one mask for all ranks, or a mapping from local rank to mask. A missing rank has ``Std.NONE``.
        local_world_size: number of local ranks.

    Returns:
        A mask for each rank from 0 to ``local_world_size - 1``.
    """
    # `int` and not `Std`, to accept torch's `Std` as well.
    if isinstance(val_or_map, int):
        return dict.fromkeys(range(local_world_size), val_or_map)
    return {local_rank: val_or_map.get(local_rank, Std.NONE) for local_rank in range(local_world_size)}


def get_std_cm(std_rd: str, redirect_fn: Callable[[str], AbstractContextManager[None]]) -> AbstractContextManager[None]:
    """Return a context manager that redirects a standard stream to a file. Mirrors torch's ``get_std_cm``.

    Args:
        std_rd: path of the file; an empty string redirects nothing.
        redirect_fn: ``redirect_stdout`` or ``redirect_stderr``.
    """
    return redirect_fn(std_rd) if std_rd else nullcontext()


def _validate_full_rank(d: Mapping[int, Any], nprocs: int, what: str) -> None:
    """Raise ``RuntimeError`` unless the keys of ``d`` are the local ranks 0 to ``nprocs - 1``."""
    if d.keys() != set(range(nprocs)):
        raise RuntimeError(
            f"{what}, local rank mapping mismatch, expected: {set(range(nprocs))}, actual: {set(d.keys())}"
        )
