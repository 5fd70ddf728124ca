from __future__ import annotations

import abc
import copy
import importlib
import pickle
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from ferroelastic import _compat
from ferroelastic._compat import TorchCompatible, TorchVirtual, family, register_virtual

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = "ferroelastic.specimen"
TORCHS = "torch.distributed.elastic.specimen"


def make(name: str, bases: tuple[type, ...] = (TorchCompatible,), module: str = OURS, **body: Any) -> type[Any]:
    """Define a class as if it were in a module of this package."""
    return types.new_class(name, bases, exec_body=lambda namespace: namespace.update({"__module__": module, **body}))


@pytest.fixture
def torchs(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Put a module of torch in place that our specimens mirror."""
    monkeypatch.setitem(sys.modules, "torch", sys.modules.get("torch") or types.ModuleType("torch"))
    module = types.ModuleType(TORCHS)
    monkeypatch.setitem(sys.modules, TORCHS, module)
    return module


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module = types.ModuleType(OURS)
    monkeypatch.setitem(sys.modules, OURS, module)
    return module


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        ("ferroelastic.agent.server.api", "torch.distributed.elastic.agent.server.api"),
        ("ferroelastic.agent.server._workers", "torch.distributed.elastic.agent.server"),
        ("ferroelastic.multiprocessing.errors._failures", "torch.distributed.elastic.multiprocessing.errors"),
        ("ferroelastic.run", "torch.distributed.run"),
        ("ferroelastic.launcher.api", "torch.distributed.launcher.api"),
        ("ferroelastic.argparse_util", "torch.distributed.argparse_util"),
        ("ferroelastic.numa.binding", "torch.numa.binding"),
        ("somebody.elses", None),
    ],
)
def test_module_names_are_mirrored(ours: str, torchs: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if torchs is not None:
        monkeypatch.setitem(sys.modules, torchs, types.ModuleType(torchs))
    found = _compat.torch_module(ours)
    assert (found and found.__name__) == torchs


def test_without_torchs_module_instances_are_of_the_plain_class() -> None:
    plain = make("Plain")
    assert type(plain()) is plain
    assert family(plain) == (plain,)


def test_instances_are_of_torchs_class_too(torchs: Any) -> None:
    def init(self: Any) -> None:
        self.called = "torch's"

    torchs.Specimen = type("Specimen", (), {"__init__": init, "__slots__": ["value"]})

    def own_init(self: Any, value: int) -> None:
        self.value = value

    ours = make("Specimen", __init__=own_init, __doc__="Ours.")
    specimen = ours(3)
    assert isinstance(specimen, ours)
    assert isinstance(specimen, torchs.Specimen)
    assert family(ours) == (ours, torchs.Specimen)
    assert specimen.value == 3
    assert not hasattr(specimen, "called")
    kind = type(specimen)
    assert (kind.__name__, kind.__qualname__, kind.__module__, kind.__doc__) == ("Specimen", "Specimen", OURS, "Ours.")
    assert type(ours(4)) is kind
    assert type(kind(4)) is kind


@pytest.mark.parametrize("has_own", [False, True])
def test_torchs_init_is_never_called(torchs: Any, has_own: bool) -> None:
    def init(self: Any, *args: Any) -> None:
        pytest.fail("torch's __init__ was called")

    torchs.Failure = type("Failure", (Exception,), {"__init__": init})
    ours = make("Failure", (TorchCompatible, Exception))
    if has_own:
        ours.__init__ = lambda self, text: super(ours, self).__init__(text)
    assert isinstance(ours("text"), torchs.Failure)
    assert str(ours("text")) == "text"


def test_a_users_mixin_is_initialised(torchs: Any) -> None:
    class Mixin:
        def __init__(self, text: str) -> None:
            self.text = text

    torchs.Specimen = type("Specimen", (), {})

    class Theirs(make("Specimen"), Mixin):  # type: ignore[misc]
        pass

    assert isinstance(Theirs("text"), torchs.Specimen)
    assert Theirs("text").text == "text"


def test_torch_may_be_loaded_later(torchs: Any) -> None:
    ours = make("Specimen")
    assert type(ours()) is ours
    torchs.Specimen = type("Specimen", (), {})
    assert isinstance(ours(), torchs.Specimen)


def test_a_users_class_is_of_torchs_class_too(torchs: Any) -> None:
    torchs.Base = type("Base", (Exception,), {})
    torchs.Derived = type("Derived", (torchs.Base,), {})
    base = make("Base", (TorchCompatible, Exception))
    derived = make("Derived", (base,))

    class Theirs(derived):  # type: ignore[misc,valid-type]
        pass

    error = Theirs("text")
    assert isinstance(error, torchs.Derived)
    assert type(error).__qualname__ == Theirs.__qualname__
    assert type(error).__mro__.count(torchs.Base) == 1


def test_a_users_class_that_does_not_combine_stays_as_it_is(torchs: Any) -> None:
    torchs.Specimen = type("Specimen", (), {"__slots__": ["value"]})
    ours = make("Specimen")

    class Theirs(ours):  # type: ignore[misc,valid-type]
        __slots__ = ("other",)

    assert type(Theirs()) is Theirs


def test_our_own_class_in_torchs_module_is_no_counterpart(torchs: Any) -> None:
    ours = make("Specimen")
    torchs.Specimen = ours
    assert type(ours()) is ours
    assert family(ours) == (ours,)


def test_dataclasses_compare_and_replace(torchs: Any) -> None:
    torchs.Point = dataclass(type("Point", (), {"__annotations__": {"x": int}}))
    point = dataclass(make("Point", __annotations__={"x": int}))
    assert point(1) == point(1) != point(2)
    assert replace(point(1), x=2) == point(2)
    assert isinstance(replace(point(1), x=2), torchs.Point)


def _set_value(self: Any, value: int) -> None:
    self.value = value


def test_pickles_name_the_plain_class(torchs: Any, importable: Any) -> None:
    torchs.Specimen = type("Specimen", (), {"__slots__": ["value"]})
    ours = make("Specimen", __init__=_set_value)
    importable.Specimen = ours
    ours_pickled = pickle.dumps(ours(5))
    again = pickle.loads(ours_pickled)
    assert again.value == copy.copy(again).value == copy.deepcopy(again).value == 5
    assert isinstance(again, torchs.Specimen)

    del sys.modules[TORCHS]
    importable.Specimen = make("Specimen")
    without_torch = pickle.loads(ours_pickled)
    assert type(without_torch) is importable.Specimen
    assert without_torch.value == 5


def test_pickles_of_errors_do_not_call_init(torchs: Any, importable: Any) -> None:
    torchs.Failure = type("Failure", (Exception,), {})

    def init(self: Any, name: str, number: int) -> None:
        Exception.__init__(self, f"{name} {number}")
        self.number = number

    importable.Failure = make("Failure", (TorchCompatible, Exception), __init__=init)
    for again in (pickle.loads(pickle.dumps(importable.Failure("a", 1))), copy.copy(importable.Failure("a", 1))):
        assert isinstance(again, torchs.Failure)
        assert (str(again), again.number) == ("a 1", 1)


def test_a_users_reduce_is_respected(importable: Any) -> None:
    importable.Specimen = make("Specimen", __reduce__=lambda self: (type(self).make, ()), make=lambda: "made")
    assert copy.copy(importable.Specimen()) == "made"


def test_abstract_classes_become_virtual_subclasses(torchs: Any) -> None:
    torchs.Handler = abc.ABCMeta("Handler", (), {})
    handler = make("Handler", (TorchVirtual,))

    class Theirs(handler):  # type: ignore[misc,valid-type]
        def __init__(self, value: int) -> None:
            self.value = value

    assert not issubclass(handler, torchs.Handler)
    assert Theirs(3).value == 3
    assert isinstance(Theirs(3), torchs.Handler)
    register_virtual(Theirs)


COUNTERPARTS = [
    ("agent.server.api", "WorkerState", None),
    ("agent.server.api", "RunResult", ("SUCCEEDED",)),
    ("agent.server.api", "Worker", (0,)),
    ("multiprocessing.errors", "ProcessFailure", (0, 1, 1, "none")),
    ("multiprocessing", "SignalException", ("text", 15)),
    ("events", "Event", ("name", "AGENT")),
    ("events", "RdzvEvent", ("name", "run", "text", "host", 1, "INIT")),
    ("rendezvous", "RendezvousClosedError", ("text",)),
    ("rendezvous", "RendezvousConnectionError", ("text",)),
    ("rendezvous", "RendezvousError", ("text",)),
    ("rendezvous", "RendezvousGracefulExitError", ("text",)),
    ("rendezvous", "RendezvousStateError", ("text",)),
    ("rendezvous", "RendezvousTimeoutError", ("text",)),
    ("rendezvous", "RendezvousStoreInfo", ("host", 1)),
    ("rendezvous", "RendezvousInfo", (None, 0, 1, None)),
    ("utils.store", "DistStoreError", ("text",)),
]


@pytest.mark.parametrize(("module", "name", "arguments"), COUNTERPARTS)
def test_real_torch_knows_our_objects(module: str, name: str, arguments: tuple[Any, ...] | None) -> None:
    pytest.importorskip("torch")
    theirs = getattr(importlib.import_module(f"torch.distributed.elastic.{module}"), name)
    ours = getattr(importlib.import_module(f"ferroelastic.{module}"), name)
    if arguments is None:
        assert [(member.name, member.value) for member in ours] == [(member.name, member.value) for member in theirs]
        assert {*ours} == {*theirs}
        return
    made = ours(*arguments)
    assert isinstance(made, theirs)
    assert isinstance(made, ours)
    assert type(pickle.loads(pickle.dumps(made))) is type(made)


def test_real_torch_catches_our_error() -> None:
    pytest.importorskip("torch")
    theirs = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
    from ferroelastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=0, pid=1, exitcode=3, error_file="none")
    with pytest.raises(theirs.ChildFailedError) as caught:
        raise ChildFailedError("train.py", {0: failure})
    assert caught.value.get_first_failure() == (0, failure)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_launchers_modules_import_neither_torch_nor_heavy_modules() -> None:
    program = (
        "import sys, ferroelastic.agent.server, ferroelastic.control_plane, ferroelastic._torch\n"
        "heavy = {'torch', 'psutil', 'asyncio', 'ctypes', 'importlib.metadata', 'multiprocessing'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
