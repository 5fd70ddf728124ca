"""Finds the environment variables that sources read."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

__all__ = ["Read", "reads_of_python", "reads_of_rust", "sources_below", "strings_of_python"]

_ENVIRONMENTS = ("environ", "environment")
_METHODS = ("get", "pop", "setdefault")
_NAMED = re.compile(
    r"(?:TORCH|TORCHELASTIC|TORCH_ELASTIC|FERROELASTIC|PET|SLURM|SLURMD|SKYPILOT|DSTACK|FLUX|OMPI|PMIX)_[A-Z0-9_]+|JOB_COMPLETION_INDEX"
)
_RUST_READ = re.compile(r"\b(?:env::var(?:_os)?|secure_getenv|getenv)\s*\(\s*([^),]*)")


class Read(NamedTuple):
    """One place that reads a variable."""

    place: str
    name: str
    """The variable; the expression in angle brackets where the name is not known here; ``PET_*`` for all of the options."""


def reads_of_python(sources: Mapping[str, str]) -> list[Read]:
    """Reads in Python files, by path."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    # Constants may be imported from another file. Other names mean something in their own file alone.
    constants = _merged(_assigned(tree, is_constant=True) for tree in trees.values())
    found: list[Read] = []
    for path, tree in trees.items():
        values = _merged([_assigned(tree, is_constant=False), _looped(tree), constants.items()])
        for node in ast.walk(tree):
            for key in _keys(node):
                found.extend(Read(f"{path}:{key.lineno}", name) for name in _names(key, values))
    return found


def _merged(parts: Iterable[Iterable[tuple[str, list[ast.expr]]]]) -> dict[str, list[ast.expr]]:
    merged: dict[str, list[ast.expr]] = defaultdict(list)
    for part in parts:
        for name, values in part:
            merged[name].extend(values)
    return merged


def _assigned(tree: ast.Module, *, is_constant: bool) -> Iterator[tuple[str, list[ast.expr]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and target.id.isupper() == is_constant:
                    yield target.id, [node.value]


def _looped(tree: ast.Module) -> Iterator[tuple[str, list[ast.expr]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            yield node.target.id, [node.iter]


def _keys(node: ast.AST) -> Iterator[ast.expr]:
    """The keys with which a node reads an environment."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        is_getenv = node.func.attr in ("getenv", "getenvb")
        if is_getenv or (node.func.attr in _METHODS and _is_environment(node.func.value)):
            yield node.args[0]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getenv" and node.args:
        yield node.args[0]
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _is_environment(node.value):
        yield node.slice
    elif (
        isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.In | ast.NotIn)
        and _is_environment(node.comparators[0])
    ):
        yield node.left


def _is_environment(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name in _ENVIRONMENTS


def _names(key: ast.expr, values: Mapping[str, list[ast.expr]], depth: int = 3) -> list[str]:
    """The variables that an expression stands for; itself, in angle brackets, where that is not known."""
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        return [key.value]
    if isinstance(key, ast.JoinedStr) and isinstance(key.values[0], ast.Constant):
        return [f"{key.values[0].value!s}*"]
    if isinstance(key, ast.Tuple):
        return [name for one in key.elts for name in _names(one, values, depth)]
    name = key.attr if isinstance(key, ast.Attribute) else key.id if isinstance(key, ast.Name) else ""
    known = values.get(name, []) if depth else []
    return sorted({one for value in known for one in _names(value, values, depth - 1)}) or [f"<{ast.unparse(key)}>"]


def strings_of_python(sources: Mapping[str, str]) -> list[Read]:
    """Strings that look like variables of torch, of a scheduler or of this package, wherever they are."""
    return [
        Read(f"{path}:{node.lineno}", node.value)
        for path, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAMED.fullmatch(node.value)
    ]


def reads_of_rust(sources: Mapping[str, str]) -> list[Read]:
    """Reads in Rust files, by path."""
    found = []
    for path, text in sources.items():
        code = "\n".join("" if line.lstrip().startswith("//") else line for line in text.splitlines())
        for read in _RUST_READ.finditer(code):
            literal = re.fullmatch(r'c?"(\w+)"', read[1].strip())
            line = code.count("\n", 0, read.start()) + 1
            found.append(Read(f"{path}:{line}", literal[1] if literal else f"<{read[1].strip()}>"))
    return found


def sources_below(folder: Path, pattern: str) -> dict[str, str]:
    """The files of a folder, by their path in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in sorted(folder.rglob(pattern))
    }
