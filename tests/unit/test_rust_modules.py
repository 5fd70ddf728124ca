"""The modules of the Rust engine: imports have no cycle, and each type name stands for one type."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "rust" / "core" / "src"

_PATH = re.compile(r"\b(crate|super|self)((?:::\w+)*)(?:::\{([^}]*)\})?")
_TYPE = re.compile(r"^(?:pub(?:\([^)]*\))? )?(?:struct|enum|trait|type) (\w+)", re.MULTILINE)
_NAMED_VALUES = re.compile(r"^named_values! \{(.*?)^\}", re.MULTILINE | re.DOTALL)

Module = tuple[str, ...]


def sources() -> dict[Module, str]:
    """Each file without comments and tests, by the path of its module."""
    found = {}
    for path in sorted(ROOT.rglob("*.rs")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = parts[:-1] if parts[-1] in {"mod", "lib"} else parts
        text = path.read_text(encoding="utf-8").partition("#[cfg(test)]\nmod tests")[0]
        found[module] = re.sub(r"//.*", "", text)
    return found


def imports(module: Module, text: str, modules: set[Module]) -> set[Module]:
    """The modules that a file names in paths that begin with ``crate``, ``super`` or ``self``."""
    found = set()
    for start, middle, names in _PATH.findall(text):
        base = {"crate": (), "super": module[:-1], "self": module}[start]
        path = (*base, *(part for part in middle.split("::") if part))
        for name in [*re.findall(r"(?:^|,)\s*(\w+)", names), None]:
            full = (*path, name) if name else path
            target = next((full[:size] for size in range(len(full), 0, -1) if full[:size] in modules), None)
            # A parent names its children by `mod`, and children are part of it.
            if target not in {None, module, module[:-1]}:
                found.add(target)
    return {target for target in found if target is not None}


def cycle(graph: dict[Module, set[Module]]) -> list[str]:
    """The modules that remain when modules without imports are removed again and again."""
    left = {module: set(targets) for module, targets in graph.items()}
    while leaves := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in leaves:
            del left[module]
    return sorted("/".join(module) for module in left)


def test_a_cycle_is_found() -> None:
    graph: dict[Module, set[Module]] = {("a",): {("b",)}, ("b",): {("c",)}, ("c",): {("b",)}, ("d",): set()}
    assert cycle(graph) == ["a", "b", "c"]


def test_files_import_without_a_cycle() -> None:
    texts = sources()
    graph = {module: imports(module, text, set(texts)) for module, text in texts.items()}
    assert graph["engine", "handle"] >= {("engine", "event_loop"), ("thread",)}
    assert cycle(graph) == []


def test_folders_import_without_a_cycle() -> None:
    texts = sources()
    graph: dict[Module, set[Module]] = defaultdict(set)
    for module, text in texts.items():
        graph[module[:1]] |= {target[:1] for target in imports(module, text, set(texts))} - {module[:1]}
    assert cycle(graph) == []


def test_a_type_name_stands_for_one_type() -> None:
    places = defaultdict(list)
    for module, text in sources().items():
        enumerations = [
            name for body in _NAMED_VALUES.findall(text) for name in re.findall(r'^    (\w+), "', body, re.MULTILINE)
        ]
        for name in [*_TYPE.findall(text), *enumerations]:
            places[name].append("/".join(module))
    assert len(places) > 100
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
