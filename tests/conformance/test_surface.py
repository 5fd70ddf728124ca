"""Every name that torch's modules have: it is here too, and can be used in the same way."""

from __future__ import annotations

import abc
import dataclasses
import enum
import fnmatch
import importlib
import inspect
import logging
import types
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pytest
from tests.conformance.differences import ABSENT
from tests.conformance.implementations import OURS, TORCH, Implementation, module_name
from tests.conformance.modules import MIRRORED, PATHS, is_absent_on_purpose
from tests.conformance.samples import SAMPLES
from tests.support.torch_versions import has, is_newest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

_CONSTANTS = (str, bytes, int, float, tuple, frozenset, type(None))
_EMPTY = inspect.Parameter.empty


def is_mirrored_module(name: str | None) -> bool:
    return name is not None and any(name == module_name(TORCH, path) for path in PATHS)


def is_here(path: str) -> bool:
    try:
        importlib.import_module(module_name(OURS, path))
    except ModuleNotFoundError:
        return False
    return True


def report(problems: Iterable[str]) -> None:
    """Fail with all problems, if there are any."""
    found = list(problems)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


class Modules:
    """A module of torch and ours of the same path."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.torchs = importlib.import_module(module_name(TORCH, path))
        self.ours = importlib.import_module(module_name(OURS, path))

    def names(self) -> list[str]:
        """What a program may get from torch's module: its interface, and what is defined there without being of it."""
        interface = getattr(self.torchs, "__all__", None)
        found = []
        for name, value in vars(self.torchs).items():
            if name.startswith("__") or isinstance(value, types.ModuleType | logging.Logger | TypeVar | ParamSpec):
                continue
            origin = getattr(value, "__module__", None)
            is_own = origin == self.torchs.__name__ or (
                not isinstance(value, type | types.FunctionType) and name not in _imported_names(self.torchs)
            )
            # What another module of the same trees defines is imported from here as well, whatever the interface says.
            is_ours_too = is_mirrored_module(origin) and (interface is None or not name.startswith("_"))
            is_public = is_ours_too or name in (interface or ())
            if is_own or is_public:
                found.append(name)
        return sorted(found)

    def pairs(self) -> list[tuple[str, Any, Any]]:
        """Names that both have, with both values."""
        return [
            (name, getattr(self.torchs, name), getattr(self.ours, name))
            for name in self.names()
            if hasattr(self.ours, name)
        ]

    def classes(self) -> list[tuple[str, type, type]]:
        return [
            (name, theirs, ours)
            for name, theirs, ours in self.pairs()
            if isinstance(theirs, type) and theirs.__module__ == self.torchs.__name__
        ]


def _imported_names(module: types.ModuleType) -> set[str]:
    """Names that a module got by ``from … import``; a constant does not tell where it is from."""
    import ast

    tree = ast.parse(inspect.getsource(module))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


@pytest.fixture(params=MIRRORED)
def modules(request: pytest.FixtureRequest) -> Modules:
    return Modules(request.param)


def test_modules() -> None:
    report(path for path in PATHS if not is_here(path) and not is_absent_on_purpose(path))


def test_names(modules: Modules) -> None:
    missing = [f"{modules.path}:{name}" for name in modules.names() if not hasattr(modules.ours, name)]
    report(name for name in missing if not is_absent_on_purpose(name))


def test_interfaces(modules: Modules) -> None:
    interface = set(getattr(modules.torchs, "__all__", ()))
    missing = {f"{modules.path}:{name}" for name in interface - set(getattr(modules.ours, "__all__", ()))}
    report(name for name in missing if not is_absent_on_purpose(name))


def test_exported_names_exist(modules: Modules) -> None:
    report(name for name in getattr(modules.ours, "__all__", ()) if not hasattr(modules.ours, name))


def test_constants(modules: Modules) -> None:
    report(
        f"{name} is {ours!r}, not {theirs!r}"
        for name, theirs, ours in modules.pairs()
        if isinstance(theirs, _CONSTANTS) and theirs != ours
    )


def test_kinds(modules: Modules) -> None:
    report(
        name
        for name, theirs, ours in modules.pairs()
        if (isinstance(theirs, type), callable(theirs)) != (isinstance(ours, type), callable(ours))
        and not is_absent_on_purpose(f"{modules.path}:{name}")
    )


# ---- signatures


def incompatibilities(theirs: Any, ours: Any) -> list[str]:
    """What a call that torch takes could find different."""
    wanted = list(inspect.signature(theirs).parameters.values())
    found = dict(inspect.signature(ours).parameters)
    problems = []
    for position, parameter in enumerate(wanted):
        own = found.pop(parameter.name, None)
        if own is None:
            problems.append(f"no parameter {parameter.name}")
            continue
        if own.kind != parameter.kind:
            problems.append(f"{parameter.name} is {own.kind.description}, not {parameter.kind.description}")
        is_resolved_later = parameter.name in _RESOLVED_LATER and own.default is None
        if not is_resolved_later and not is_same_default(parameter.default, own.default):
            problems.append(f"{parameter.name}={own.default!r}, not {parameter.default!r}")
        place = list(inspect.signature(ours).parameters).index(parameter.name)
        if place != position and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            problems.append(f"{parameter.name} at position {place}, not {position}")
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    problems += [
        f"{own.name} has no default" for own in found.values() if own.default is _EMPTY and own.kind not in variable
    ]
    return problems


# As planned for torch: None reads an environment variable, and torch's present default is the last resort.
_RESOLVED_LATER = {"exit_barrier_timeout"}


def is_same_default(theirs: Any, ours: Any) -> bool:
    if theirs is _EMPTY:
        return True  # a default of ours is one more form of the call
    if ours is _EMPTY:
        return False
    if isinstance(theirs, types.FunctionType):
        return callable(ours)
    if type(theirs).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return True  # looked at among the fields
    return bool(theirs == ours)


def is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type) and not hasattr(value, "__origin__")


def test_signatures_of_functions(modules: Modules) -> None:
    report(
        f"{modules.path}:{name}(): {problem}"
        for name, theirs, ours in modules.pairs()
        if is_function(theirs) and not is_absent_on_purpose(f"{modules.path}:{name}()")
        for problem in incompatibilities(theirs, ours)
    )


def members(cls: type) -> list[tuple[str, Any]]:
    """What is defined in a class and its bases, as it stands there."""
    inherited = {name for base in (object, Exception, abc.ABC, str, enum.IntFlag, enum.Enum) for name in dir(base)}
    own = {"__init__", "__call__", "__post_init__", "__str__", "__repr__", "__eq__"}
    return [
        (name, value)
        for name, value in inspect.getmembers_static(cls)
        if (name not in inherited or (name in own and isinstance(value, types.FunctionType)))
        and not (name.startswith("__") and name not in own)
        and not isinstance(value, types.MemberDescriptorType)  # slots: looked at as attributes of instances
        and name not in {"_abc_impl", "_is_protocol"}
        and not (isinstance(cls, enum.EnumMeta) and name in {*cls.__members__, "name", "value"})
    ]


def test_members_of_classes(modules: Modules) -> None:
    missing, different = [], []
    for name, theirs, ours in modules.classes():
        field_names = {field.name for field in dataclasses.fields(theirs)} if dataclasses.is_dataclass(theirs) else ()
        for member, value in members(theirs):
            full = f"{modules.path}:{name}.{member}"
            if member in field_names or is_absent_on_purpose(full):
                continue
            if not hasattr(ours, member):
                missing.append(full)
                continue
            own = inspect.getattr_static(ours, member)
            kinds = (property, staticmethod, classmethod)
            if any(isinstance(value, kind) != isinstance(own, kind) for kind in kinds):
                different.append(f"{full} is a {type(own).__name__}, not a {type(value).__name__}")
            elif isinstance(value, _CONSTANTS) and not isinstance(theirs, enum.EnumMeta) and value != own:
                different.append(f"{full} = {own!r}, not {value!r}")
            elif isinstance(value, types.FunctionType | staticmethod | classmethod):
                found = incompatibilities(getattr(theirs, member), getattr(ours, member))
                different += [f"{full}: {problem}" for problem in found]
    report(missing + different)


def test_bases_of_classes(modules: Modules) -> None:
    """Exceptions are caught, and subclasses told, by the same names."""
    different = []
    for name, theirs, ours in modules.classes():
        own = iter([base.__name__ for base in ours.__mro__])
        if not all(base.__name__ in own for base in theirs.__mro__):
            different.append(f"{name}: {[base.__name__ for base in theirs.__mro__]}")
        if getattr(theirs, "__abstractmethods__", frozenset()) != getattr(ours, "__abstractmethods__", frozenset()):
            different.append(f"{name}: {sorted(ours.__abstractmethods__)}")  # type: ignore[attr-defined]  # just read
    report(different)


def test_fields_of_dataclasses(modules: Modules) -> None:
    for name, theirs, ours in modules.classes():
        if not dataclasses.is_dataclass(theirs):
            continue
        assert dataclasses.is_dataclass(ours), name
        wanted = [describe(field) for field in dataclasses.fields(theirs)]
        found = [describe(field) for field in dataclasses.fields(ours)]
        assert found[: len(wanted)] == wanted, name
        for added in dataclasses.fields(ours)[len(wanted) :]:
            assert describe(added)["default"] is not dataclasses.MISSING, f"{name}.{added.name} has no default"
        flags = ["init", "repr", "eq", "order", "frozen"]
        params: list[Any] = [getattr(cls, "__dataclass_params__") for cls in (theirs, ours)]  # noqa: B009 - not in stubs
        assert [getattr(params[0], flag) for flag in flags] == [getattr(params[1], flag) for flag in flags], name


def describe(field: Any) -> dict[str, Any]:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return {"name": field.name, "default": default, "init": field.init, "repr": field.repr, "compare": field.compare}


def test_members_of_enums(modules: Modules) -> None:
    for name, theirs, ours in modules.classes():
        if isinstance(theirs, enum.EnumMeta):
            assert isinstance(ours, enum.EnumMeta), name
            wanted: dict[str, Any] = {member: theirs[member].value for member in theirs.__members__}
            assert {member: ours[member].value for member in ours.__members__} == wanted, name


def test_fields_of_tuples(modules: Modules) -> None:
    for name, theirs, ours in modules.pairs():
        if isinstance(theirs, type) and issubclass(theirs, tuple):
            wanted: Any = theirs
            assert (ours._fields, ours._field_defaults) == (wanted._fields, wanted._field_defaults), name


# ---- attributes of instances, which no class tells


@pytest.mark.parametrize("name", SAMPLES)
def test_attributes_of_instances(name: str) -> None:
    theirs, ours = (SAMPLES[name](Implementation(kind)) for kind in (TORCH, OURS))
    slots = [getattr(cls, "__slots__", ()) for cls in type(theirs).__mro__]
    wanted = {*vars(theirs)} if hasattr(theirs, "__dict__") else set()
    wanted |= {attribute for one in slots for attribute in one}
    missing = sorted(attribute for attribute in wanted if not hasattr(ours, attribute))
    report(full for full in (f"{name}.{attribute}" for attribute in missing) if not is_absent_on_purpose(full))
    for attribute in {one for one in wanted if hasattr(theirs, one)} - set(missing) - {"timestamp"}:
        value = getattr(theirs, attribute)
        if isinstance(value, _CONSTANTS):
            assert getattr(ours, attribute) == value, f"{name}.{attribute}"


# ---- the command line


def test_options_of_the_command_line() -> None:
    theirs, ours = (Implementation(kind).run.get_args_parser() for kind in (TORCH, OURS))
    wanted, found = options(theirs), options(ours)
    if not has("free-static-port"):
        del wanted["master_port"]  # its default
    assert {dest: found.get(dest) for dest in wanted} == wanted
    positional = [action.dest for action in theirs._actions if not action.option_strings]
    assert [action.dest for action in ours._actions if not action.option_strings] == positional


def options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    return {
        action.dest: (
            set(action.option_strings),
            action.default,
            action.nargs,
            None if action.choices is None else list(action.choices),
            action.required,
            action.const,
            getattr(action.type, "__name__", action.type),
        )
        for action in parser._actions
    }


# ---- the list of what is not here


@pytest.mark.skipif(not is_newest(), reason="names of newer versions of torch are listed too")
def test_names_listed_as_absent_are_absent() -> None:
    """A name that has come is to be struck off."""
    found = set()
    for path in PATHS:
        if not is_here(path):
            found.add(path)
            continue
        modules = Modules(path)
        found |= {f"{path}:{name}" for name in modules.names() if not hasattr(modules.ours, name)}
        found |= {
            f"{path}:{name}()"
            for name, theirs, ours in modules.pairs()
            if is_function(theirs) and incompatibilities(theirs, ours)
        }
        for name, theirs, ours in modules.classes():
            found |= {f"{path}:{name}.{member}" for member, _ in members(theirs) if not hasattr(ours, member)}
    for name, build in SAMPLES.items():
        theirs, ours = (build(Implementation(kind)) for kind in (TORCH, OURS))
        found |= {
            f"{name}.{attribute}" for attribute in getattr(theirs, "__dict__", {}) if not hasattr(ours, attribute)
        }
    report(pattern for pattern in ABSENT if not any(fnmatch.fnmatchcase(name, pattern) for name in found))
