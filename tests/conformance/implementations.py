"""The two implementations under test, behind one face."""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from tests.conformance.differences import DIFFERENCES
from tests.support import torch_versions

T = TypeVar("T")

TORCH = "torch"
OURS = "ferroelastic"

# First name of a module's path here -> what precedes it in torch; `torch.distributed.elastic` for the rest.
_ELSEWHERE = {
    "argparse_util": "torch.distributed",
    "launch": "torch.distributed",
    "launcher": "torch.distributed",
    "run": "torch.distributed",
    "numa": "torch",
}


def module_name(implementation: str, path: str) -> str:
    """Full name of the module that is ``torch.distributed.elastic.<path>``, or ``torch.distributed.run`` and so on."""
    if implementation == OURS:
        return f"{OURS}.{path}".rstrip(".")
    root = _ELSEWHERE.get(path.partition(".")[0], "torch.distributed.elastic")
    return f"{root}.{path}".rstrip(".")


class Implementation:
    """torch's modules, or ours.

    Calling it with a path below ``torch.distributed.elastic`` gives the module: ``impl("agent.server.api")``.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def __call__(self, path: str) -> Any:
        return importlib.import_module(module_name(self.name, path))

    @property
    def is_torch(self) -> bool:
        return self.name == TORCH

    @property
    def run(self) -> Any:
        return self("run")

    @property
    def launcher(self) -> Any:
        return self("launcher")

    @property
    def agent(self) -> Any:
        return self("agent.server.api")

    @property
    def mp(self) -> Any:
        return self("multiprocessing")

    @property
    def errors(self) -> Any:
        return self("multiprocessing.errors")

    @property
    def rendezvous(self) -> Any:
        return self("rendezvous")

    def expect(self, difference: str, *, torch: T, ours: T) -> T:
        """Return what this implementation is to do where the two differ on purpose.

        Args:
            difference: id of an entry of ``differences.DIFFERENCES``.
            torch: what torch does.
            ours: what we do.
        """
        assert difference in DIFFERENCES, f"{difference!r} is not in the list of intended differences"
        assert torch != ours, f"{difference!r} is no difference here"
        differs = torch_versions.is_between(DIFFERENCES[difference].since, DIFFERENCES[difference].fixed_in)
        return torch if self.is_torch and differs else ours

    def by_version(self, change: str, *, before: T, since: T) -> T:
        """Return the expected behaviour with the installed version of torch.

        Args:
            change: id of an entry of ``torch_versions.CHANGES``.
            before: the behaviour of versions without the change.
            since: the behaviour of versions with the change.
        """
        assert before != since, f"{change!r} changes nothing here"
        return since if torch_versions.has(change) else before
