"""The list of intended differences is complete, and holds no more than there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.conformance.differences import ABSENT, DIFFERENCES
from tests.support.torch_versions import CHANGES


def used_ids() -> dict[str, list[str]]:
    """Ids that tests refer to with ``impl.expect("id", …)``, and where."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "expect":
                (argument,) = node.args
                assert isinstance(argument, ast.Constant), f"{path.name}:{node.lineno}: write the id where it is used"
                found.setdefault(str(argument.value), []).append(f"{path.name}:{node.lineno}")
    return found


def test_every_difference_that_is_used_is_listed() -> None:
    assert {name: places for name, places in used_ids().items() if name not in DIFFERENCES} == {}


def test_every_difference_that_is_listed_is_tested() -> None:
    assert set(DIFFERENCES) - set(used_ids()) == set()


def test_every_change_of_torch_is_used() -> None:
    sources = "".join(path.read_text() for path in Path(__file__).parent.parent.rglob("*.py"))
    unused = [name for name in CHANGES if not re.search(rf'(needs|has|by_version)\(\s*"{name}"', sources)]
    assert unused == []


def test_differences_are_explained() -> None:
    for name, difference in DIFFERENCES.items():
        assert all((difference.of, difference.torch, difference.ours, difference.why)), name
        assert difference.torch != difference.ours, name
    assert all(ABSENT.values())
