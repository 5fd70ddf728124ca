"""Expansion of compressed host lists, against lists that are written from known hosts."""

from __future__ import annotations

import itertools
import random

import pytest

from ferroelastic._scheduler.hostlist import expand


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,5],x[07-09]", ["n1", "n2", "n3", "n5", "x07", "x08", "x09"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[009-011]", ["n009", "n010", "n011"]),
        ("gpu[1-2]-ib.example.org", ["gpu1-ib.example.org", "gpu2-ib.example.org"]),
        ("n[1]", ["n1"]),
        ("n2,n1", ["n2", "n1"]),
        ("n[3,1]", ["n3", "n1"]),
        ("[1-2]", ["1", "2"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_a_list_is_expanded_in_its_order(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty entry"),
        ("n1,", "empty entry"),
        (",n1", "empty entry"),
        ("n1,,n2", "empty entry"),
        ("n[1-2", "unbalanced bracket"),
        ("n1-2]", "unbalanced bracket"),
        ("n[1[2]]", "unbalanced bracket"),
        ("n[]", "'' is not a number or a range"),
        ("n[1-]", "'1-' is not a number or a range"),
        ("n[a-b]", "'a-b' is not a number or a range"),
        ("n[1-2-3]", "'1-2-3' is not a number or a range"),
        ("n[3-1]", "ends before it begins"),
        ("n 1", "'n 1' is not a part of a host name"),
        ("n1\n", "is not a part of a host name"),
        ("n[0-99999999]", "more than 1048576 hosts"),
        ("n[1-2000][1-2000]", "more than 1048576 hosts"),
    ],
)
def test_a_malformed_list_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        expand(text)
    assert reason in str(raised.value)


def _compressed(hosts: list[tuple[str, str, str]], chance: random.Random) -> str:
    """Write hosts (prefix, number, suffix) as a scheduler does: neighbours of one name share a bracket, runs of numbers are ranges."""
    entries: list[str] = []
    for (prefix, suffix), group in itertools.groupby(hosts, lambda host: (host[0], host[2])):
        numbers = [number for _, number, _ in group]
        if len(numbers) == 1 and chance.random() < 0.5:
            entries.append(prefix + numbers[0] + suffix)
        else:
            entries.append(f"{prefix}[{','.join(_ranges(numbers))}]{suffix}")
    return ",".join(entries)


def _ranges(numbers: list[str]) -> list[str]:
    runs: list[list[str]] = []
    for number in numbers:
        # A range keeps the width of its first number.
        if runs and number == f"{int(runs[-1][-1]) + 1:0{len(runs[-1][0])}d}":
            runs[-1].append(number)
        else:
            runs.append([number])
    return [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def test_expanding_undoes_compressing() -> None:
    for seed in range(500):
        chance = random.Random(seed)
        hosts = []
        for _ in range(chance.randint(1, 30)):
            prefix, suffix = chance.choice(["n", "gpu-", "rack1n", "x0"]), chance.choice(["", "", "-ib"])
            width, first = chance.choice([1, 1, 2, 4]), chance.randint(0, 120)
            hosts += [(prefix, f"{first + step:0{width}d}", suffix) for step in range(chance.choice([1, 1, 2, 7]))]
        text = _compressed(hosts, chance)
        assert expand(text) == ["".join(host) for host in hosts], (seed, text)


def test_several_brackets_are_the_product_of_each() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        hosts, text = [""], ""
        for letter in "abcd"[: chance.randint(2, 4)]:
            width, first = chance.choice([1, 2, 3]), chance.randint(0, 99)
            numbers = [f"{number:0{width}d}" for number in range(first, first + chance.randint(1, 5))]
            text += f"{letter}[{','.join(_ranges(numbers))}]"
            hosts = [host + letter + number for host in hosts for number in numbers]
        assert expand(text) == hosts, (seed, text)
