from __future__ import annotations

import enum

import pytest

from ferroelastic.multiprocessing import Std, to_map
from ferroelastic.multiprocessing._std import _validate_full_rank, get_std_cm


class Foreign(enum.IntFlag):
    """As torch's own ``Std``."""

    OUT = 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", Std.NONE), ("1", Std.OUT), ("2", Std.ERR), ("3", Std.ALL), ("0:1", {0: Std.OUT})],
)
def test_from_str_reads_values_and_mappings(text: str, expected: object) -> None:
    assert Std.from_str(text) == expected


def test_from_str_reads_rank_numbers_of_any_length() -> None:
    assert Std.from_str("9:1,10:2,127:3") == {9: Std.OUT, 10: Std.ERR, 127: Std.ALL}


@pytest.mark.parametrize("text", ["", "4", "11", "0:1,", "0:1,1", "1,0:1", "0:4", "-1:1", "0:1\n", "a:1"])
def test_from_str_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match="is not a stream mask"):
        Std.from_str(text)


def test_from_str_gives_members() -> None:
    mask = Std.from_str("1")
    assert isinstance(mask, Std)
    assert mask | Std.ERR == Std.ALL


def test_to_map_spreads_one_mask() -> None:
    assert to_map(Std.OUT, 2) == {0: Std.OUT, 1: Std.OUT}


def test_to_map_fills_gaps_and_drops_ranks_that_are_not_there() -> None:
    assert to_map({1: Std.OUT, 7: Std.ERR}, 3) == {0: Std.NONE, 1: Std.OUT, 2: Std.NONE}


def test_to_map_takes_a_foreign_member() -> None:
    assert to_map(Foreign.OUT, 2) == {0: Std.OUT, 1: Std.OUT}  # type: ignore[arg-type]  # what torch's users pass


def test_validate_full_rank_names_the_missing_ranks() -> None:
    _validate_full_rank({0: "", 1: ""}, 2, "args")
    with pytest.raises(RuntimeError, match=r"envs, local rank mapping mismatch, expected: \{0, 1\}, actual: \{0\}"):
        _validate_full_rank({0: ""}, 2, "envs")


def test_get_std_cm_does_nothing_without_a_file() -> None:
    def redirect(_path: str) -> None:
        raise AssertionError("not asked for")

    with get_std_cm("", redirect):  # type: ignore[arg-type]  # never called
        pass
