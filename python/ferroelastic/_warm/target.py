"""Which workers can be warm, and the state that they must share with their zygote."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ColdError", "Target", "target_of"]

_FLAGS = frozenset("uBOsqvbdP")
"""Interpreter options without a value that a zygote can have too. Others skip ``sitecustomize`` or read the script from elsewhere."""

_WITH_VALUE = frozenset("WX")

_OF_ROUND = frozenset(
    {
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "RANK",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "TORCHELASTIC_ERROR_FILE",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_TIMER_FILE",
        "TORCHELASTIC_USE_AGENT_STORE",
        "WORLD_SIZE",
    }
)
"""Variables that the agent sets for one worker or one round. A zygote does not have them."""

_THREADS = "OMP_NUM_THREADS"
_THREAD_PLACES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


class ColdError(Exception):
    """Workers cannot be warm.

    Args:
        reason: the reason, as a fragment of a sentence.
        is_logged: whether the engine has already logged the reason.
    """

    def __init__(self, reason: str, *, is_logged: bool = False) -> None:
        super().__init__(reason)
        self.is_logged = is_logged


class Target(NamedTuple):
    """The state of an interpreter before it runs its script. Workers of equal targets can come from the same zygote."""

    command: tuple[str, ...]
    """Interpreter, its options, and the script or module."""
    path0: str | None
    """``sys.path[0]`` of the script; ``None`` if the options leave it out."""
    variables: dict[str, str]
    """The variables that all workers of the node share."""
    surroundings: tuple[tuple[str, object], ...]
    """Further attributes that a process inherits, with their names."""
    of_worker: tuple[str, ...]
    """Names of the variables that are set for each worker or round. The zygote does not have them."""

    def difference(self, other: Target) -> str | None:
        """Return the first difference from another target as a fragment of a sentence; ``None`` if they are equal."""
        if (self.command, self.path0) != (other.command, other.path0):
            return "the command of the workers has changed"
        for name in sorted(self.variables.keys() | other.variables.keys()):
            if self.variables.get(name) != other.variables.get(name):
                return f"the environment variable {name} has changed"
        for (name, value), (_, other_value) in zip(self.surroundings, other.surroundings, strict=True):
            if value != other_value:
                return f"the {name} of the agent has changed"
        return None


def target_of(argvs: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]], *, is_bound: bool) -> Target:
    """Return the common target of the workers of a node.

    Args:
        argvs: program and arguments of each worker.
        envs: environment variables of each worker, added to the environment of this process.
        is_bound: whether each worker is bound to CPUs of its own.

    Raises:
        ColdError: the workers have no common target, or no zygote can have it.
    """
    commands = {_command_of(argv) for argv in argvs}
    if len(commands) != 1:
        raise ColdError("the workers run different scripts")
    (command,) = commands
    own = {name for env in envs for name in env if len({other.get(name) for other in envs}) > 1} | _OF_ROUND
    variables = {name: value for name, value in {**os.environ, **envs[0]}.items() if name not in own}
    if is_bound:
        places = [name for name in _THREAD_PLACES if name in variables]
        if _THREADS not in variables or places:
            raise ColdError(
                f"{places[0]} is set" if places else f"the workers are bound to CPUs and {_THREADS} is not set",
            )
    return Target(command, _path0_of(command, variables), variables, _surroundings(), tuple(sorted(own)))


def _command_of(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the interpreter, its options and the script of a worker.

    Raises:
        ColdError: the worker does not run a script or module with the interpreter of this process.
    """
    _check_interpreter(argv[0])
    words = iter(enumerate(argv[1:], start=1))
    for position, word in words:
        if word == "-m":
            if position + 1 < len(argv):
                return tuple(argv[: position + 2])
            break
        if word[:1] != "-" or word == "-":
            if word != "-":
                return tuple(argv[: position + 1])
            break
        letters = word[1:].lstrip("".join(_FLAGS))
        if letters and letters[0] in _WITH_VALUE and not word.startswith("--"):
            if len(letters) == 1:
                next(words, None)
        elif letters:
            raise ColdError(f"the workers use the interpreter option {word}")
    raise ColdError("the workers run neither a script nor a module")


def _check_interpreter(program: str) -> None:
    """Check that a program is the interpreter of this process.

    Raises:
        ColdError: it is not. A wrapper of the interpreter may add options that skip the hook, and the zygote would run the script.
    """
    if program != sys.executable:
        raise ColdError(f"the workers run {program}, not the interpreter of the agent ({sys.executable})")
    if not os.path.samefile(program, "/proc/self/exe"):
        raise ColdError(f"{program} is not the interpreter itself, and may start it with other options")


def _path0_of(command: tuple[str, ...], variables: Mapping[str, str]) -> str | None:
    """Return the ``sys.path[0]`` that the interpreter computes for a script or module."""
    options, script = command[1:-1], command[-1]
    is_module = bool(options) and options[-1] == "-m"
    if variables.get("PYTHONSAFEPATH") or any(option[:1] == "-" and "P" in option for option in options):
        return None
    if is_module:
        return os.getcwd()
    path = os.path.realpath(script)
    # A folder or a zip file with a __main__.py is an entry of the path itself.
    return (
        os.path.abspath(script) if os.path.isdir(path) or script.endswith((".zip", ".pyz")) else os.path.dirname(path)
    )


def _surroundings() -> tuple[tuple[str, object], ...]:
    import resource

    folder = os.stat(".")
    names = sorted(name for name in dir(resource) if name.startswith("RLIMIT_"))
    limits = tuple(resource.getrlimit(getattr(resource, name)) for name in names)
    with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
        umask = next((line.split()[1] for line in status if line.startswith("Umask:")), "")
    return (
        ("working directory", (folder.st_dev, folder.st_ino)),
        ("umask", umask),
        ("resource limits", limits),
        ("nice value", os.getpriority(os.PRIO_PROCESS, 0)),
        ("CPU affinity", frozenset(os.sched_getaffinity(0))),
        ("user or group", (os.getresuid(), os.getresgid(), tuple(os.getgroups()))),
    )
