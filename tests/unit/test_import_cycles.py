"""No cycles between the modules of the package, read from their sources.

Imports are of three kinds. Those at module level run when a module is imported, and a cycle of them depends on which module comes first.
Imports in functions run later, and imports for type checkers never run; both still show which module needs to know which.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ferroelastic

if TYPE_CHECKING:
    from collections.abc import Iterator

Graph = dict[str, set[str]]

ROOT = Path(ferroelastic.__file__).parent
PACKAGE = ferroelastic.__name__
SOURCES = {
    ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

AT_MODULE_LEVEL, IN_A_FUNCTION, FOR_TYPES = "at module level", "in a function", "for types"

# Each module looks up a name on its package, because that is where programs written for torch replace it.
LOOKED_UP = [
    {f"{PACKAGE}.events", f"{PACKAGE}.events._record"},
    {f"{PACKAGE}.multiprocessing.errors{module}" for module in ("", "._failures", "._record")},
]

KNOWN: dict[str, list[set[str]]] = {AT_MODULE_LEVEL: [], IN_A_FUNCTION: LOOKED_UP, FOR_TYPES: LOOKED_UP}
"""Cycles that exist on purpose, by the kind of import that closes them."""


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports(tree: ast.AST, kind: str = AT_MODULE_LEVEL) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Yield each import statement with its kind."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield kind, node
        elif isinstance(node, ast.If) and is_for_types(node):
            for child in node.body:
                yield from imports(ast.Module([child], []), FOR_TYPES)
            for child in node.orelse:
                yield from imports(ast.Module([child], []), kind)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, FOR_TYPES if kind == FOR_TYPES else IN_A_FUNCTION)
        else:
            yield from imports(node, kind)


def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield the modules of the package that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        assert node.level == 0, "imports are absolute"
        module = node.module or ""
        below = [f"{module}.{alias.name}" for alias in node.names]
        # `from package import module` needs the module; other names come from the package itself.
        names = [name if name in SOURCES else module for name in below]
    yield from (name for name in names if name in SOURCES)


def graph(*kinds: str) -> Graph:
    edges: Graph = {name: set() for name in SOURCES}
    for name, path in SOURCES.items():
        for kind, node in imports(ast.parse(path.read_text())):
            if kind in kinds:
                edges[name].update(target for target in targets(node) if target != name)
    # The import of a module first imports the packages above it, except those that are being imported already.
    for name, found in edges.items():
        for target in list(found):
            parts = target.split(".")
            above = {".".join(parts[:length]) for length in range(2, len(parts))}
            found.update(package for package in above if not f"{name}.".startswith(f"{package}."))
    return edges


def cycles(edges: Graph) -> list[set[str]]:
    """Return the strongly connected components of more than one module, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            at = stack.index(node)
            component = set(stack[at:])
            del stack[at:]
            if len(component) > 1:
                found.append(component)

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        (AT_MODULE_LEVEL, (AT_MODULE_LEVEL,)),
        (IN_A_FUNCTION, (AT_MODULE_LEVEL, IN_A_FUNCTION)),
        (FOR_TYPES, (AT_MODULE_LEVEL, IN_A_FUNCTION, FOR_TYPES)),
    ],
    ids=str,
)
def test_there_are_no_other_cycles_than_the_known_ones(kind: str, kinds: tuple[str, ...]) -> None:
    assert sorted(cycles(graph(*kinds)), key=min) == sorted(KNOWN[kind], key=min)


def test_a_cycle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [{"b", "c"}]
