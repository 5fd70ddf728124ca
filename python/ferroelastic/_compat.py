"""Makes objects of this package instances of torch's classes too, if torch is loaded.

A program written for torch uses ``except torch.distributed.elastic.multiprocessing.errors.ChildFailedError`` and
``isinstance(result, torch.distributed.elastic.agent.server.RunResult)``. Both must work with the exceptions and results of this
package. This module does not import torch: it only reads ``sys.modules``.

Four tools:

* :class:`TorchCompatible`: for data and exceptions. Its instances belong to a class derived from ours *and* torch's.
* :func:`register_virtual`: for abstract base classes. Ours becomes a virtual subclass of torch's.
* :func:`family`: accepts torch's class in place of ours: ``except family(X)`` and ``isinstance(x, family(X))``.
* :func:`newer`: reads an attribute that objects of torch's classes, or of older torch versions, lack.
"""

from __future__ import annotations

import abc
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "TorchCompatible",
    "TorchVirtual",
    "family",
    "mirrored",
    "newer",
    "register_virtual",
    "replaced",
    "torch_module",
]

_PACKAGE = "ferroelastic"
_UNDER_DISTRIBUTED = frozenset({"run", "launch", "launcher", "argparse_util"})
_making_dual = threading.Lock()

replaced: dict[type, type] = {}
"""Torch's classes by the classes of this package that have their names in torch's modules (``ferroelastic.install()``)."""


def torch_module(name: str) -> types.ModuleType | None:
    """Return the module of torch that the module ``name`` of this package mirrors, if it is loaded.

    A private module mirrors the same module as its package: ``ferroelastic.agent.server._workers`` mirrors
    ``torch.distributed.elastic.agent.server``.
    """
    parts = name.split(".")
    if parts[0] != _PACKAGE:
        return None
    while parts[-1].startswith("_"):
        parts.pop()
    below = parts[1:]
    if below and below[0] in _UNDER_DISTRIBUTED:
        root = "torch.distributed"
    elif below and below[0] == "numa":
        root = "torch"
    else:
        root = "torch.distributed.elastic"
    return sys.modules.get(".".join((root, *below)))


def mirrored(cls: type) -> type | None:
    """Return torch's class that ``cls`` itself (not a base of it) mirrors, if its module is loaded.

    The class attribute ``__torch_class__ = (module, name)`` names a counterpart in another module.
    """
    if "torch" not in sys.modules:
        return None
    elsewhere: tuple[str, str] | None = cls.__dict__.get("__torch_class__")
    if elsewhere is None:
        module, name = torch_module(cls.__module__), cls.__name__
    else:
        module, name = sys.modules.get(elsewhere[0]), elsewhere[1]
    # A module that is still being imported may lack the name.
    found = getattr(module, name, None)
    found = replaced.get(found, found) if isinstance(found, type) else None
    if not isinstance(found, type) or found.__module__.partition(".")[0] == _PACKAGE:
        return None
    return found


def family(cls: type) -> tuple[type[Any], ...]:
    """Return ``(cls, torch's counterpart)``, or ``(cls,)`` if the counterpart is not loaded.

    Call it in the ``except`` clause, which evaluates it when the exception is raised::

        try:
            agent.run()
        except family(SignalException) as error:
            ...
    """
    counterpart = mirrored(cls)
    return (cls,) if counterpart is None else (cls, counterpart)


def newer(thing: object, name: str, default: Any) -> Any:
    """Return an attribute that some versions of torch lack, or that only this package has.

    Args:
        thing: an object that code written for torch may have created.
        name: name of the attribute.
        default: value if the attribute is missing.
    """
    return getattr(thing, name, default)


def register_virtual(cls: type) -> None:
    """Register ``cls`` and its bases as virtual subclasses of the abstract classes of torch that they mirror.

    :class:`TorchVirtual` calls it on instantiation, because torch may be imported after the class was defined.
    """
    if "torch" not in sys.modules:
        return
    for base in cls.__mro__:
        if "_torch_registered" in base.__dict__:
            continue
        counterpart = mirrored(base)
        if isinstance(counterpart, abc.ABCMeta):
            counterpart.register(base)
            base._torch_registered = True  # type: ignore[attr-defined]  # noqa: SLF001 - an attribute of this module


class TorchVirtual:
    """Mixin for abstract classes that calls :func:`register_virtual` on instantiation."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create the instance. The arguments are for ``__init__``."""
        register_virtual(cls)
        new = super().__new__
        return new(cls) if new is object.__new__ else new(cls, *args, **kwargs)


class TorchCompatible:
    """Mixin for data and exceptions whose instances are instances of torch's counterpart too.

    ``__new__`` creates an instance of a class derived from ``(our class, torch's class)`` with our name, module and documentation. This
    also applies to subclasses of users. torch's ``__init__`` is never called. Pickles and copies refer to our plain class, so a process
    without torch can load them. Derived classes must not define ``__slots__``, which would conflict with the slots of torch's classes.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create the instance, of the dual class if torch is loaded."""
        made: type[Self] = _dual_class(cls)
        new = super().__new__
        return new(made) if new is object.__new__ else new(made, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Continue with the bases of the plain class: ``super().__init__()`` of a derived class must not call torch's."""
        plain: type = type(self).__dict__.get("_plain_class", type(self))
        after = plain.__mro__[plain.__mro__.index(TorchCompatible) + 1 :]
        init: Any = next(base.__dict__["__init__"] for base in after if "__init__" in base.__dict__)
        init(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce to the plain class, without calling ``__init__`` (its arguments may differ from ``args``)."""
        cls = type(self)
        if cls.__reduce__ not in (object.__reduce__, BaseException.__reduce__):
            return self.__reduce__()
        plain = cls.__dict__.get("_plain_class", cls)
        if isinstance(self, BaseException):
            return _rebuild, (plain, self.args), self.__dict__ or None
        reduced: tuple[Any, ...] = object.__reduce_ex__(self, max(2, protocol))  # type: ignore[assignment]
        return (_rebuild, (plain, reduced[1][1:]), *reduced[2:])


def _rebuild(cls: type, args: tuple[Any, ...]) -> Any:
    return cls.__new__(cls, *args)


def _dual_class(cls: type[Any]) -> type[Any]:
    if "torch" not in sys.modules:
        return cls
    known: type | None = cls.__dict__.get("_dual_class")
    if known is not None:
        return known
    counterparts = _counterparts(cls)
    if not counterparts:
        return cls
    with _making_dual:
        known = cls.__dict__.get("_dual_class")
        if known is None:
            known = _make_dual_class(cls, counterparts)
            # On the class, not in a table, so it is freed together with the class.
            cls._dual_class = known
    return known


def _counterparts(cls: type) -> list[type]:
    found: list[type] = []
    for base in cls.__mro__:
        counterpart = mirrored(base)
        if counterpart is not None and not any(issubclass(known, counterpart) for known in (cls, *found)):
            found.append(counterpart)
    return found


def _make_dual_class(cls: type[Any], counterparts: list[type]) -> type[Any]:
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_plain_class": cls,
    }
    try:
        dual: type[Any] = types.new_class(
            cls.__name__, (cls, *counterparts), exec_body=lambda body: body.update(namespace)
        )
    except TypeError:
        # The layout, metaclass or __init_subclass__ of a user's class conflicts with torch's class: use the plain class.
        return cls
    dual._dual_class = dual  # noqa: SLF001 - an attribute of this module
    return dual
