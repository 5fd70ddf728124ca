"""The programs of the table: how each is started under torch's agent and under the agent of this package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tests.support.harness import ROOT
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

ENVIRONMENT = ROOT / "target" / "programs" / "main"
BIN = ENVIRONMENT / "bin"
WORKERS = ROOT / "tests" / "programs" / "workers"

Side = Literal["torch", "ferroelastic"]
SIDES: tuple[Side, ...] = ("torch", "ferroelastic")


@dataclass(frozen=True)
class Program:
    """A row of the table."""

    name: str
    package: str
    """The distribution whose version the table shows."""
    command: Callable[[Side, int], list[str]]
    """The command line for a side and a number of restarts."""
    exit_codes: dict[Side, int] = field(default_factory=lambda: {"torch": 1, "ferroelastic": 3})
    """The exit code after a worker that exits with 3."""
    restarts: tuple[Side, ...] = SIDES
    """The sides on which the program can start its workers again."""
    clean_ends: dict[Side, tuple[str, ...]] = field(default_factory=lambda: dict.fromkeys(SIDES, ("yes",)))
    """The possible results of SIGTERM to the program. ``yes``: the workers save, and no process is left."""


def _script(name: str) -> str:
    return str(WORKERS / name)


def _exec(side: Side, *command: str) -> list[str]:
    """Run a program that calls torch's launcher in its process."""
    return [str(BIN / command[0]), *command[1:]] if side == "torch" else [str(BIN / "ferrorun"), "--exec", *command]


def _torchrun(script: str) -> Callable[[Side, int], list[str]]:
    def command(side: Side, restarts: int) -> list[str]:
        launcher = "torchrun" if side == "torch" else "ferrorun"
        options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
        return [str(BIN / launcher), *options, _script(script)]

    return command


def _accelerate(side: Side, restarts: int) -> list[str]:
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return _exec(
        side,
        "accelerate",
        "launch",
        *options,
        "--main_process_port=0",
        f"--max_restarts={restarts}",
        _script("with_accelerate.py"),
    )


def _fabric(side: Side, _restarts: int) -> list[str]:
    options = ["--accelerator=cpu", "--devices=2", "--strategy=ddp", f"--main-port={free_port()}"]
    return _exec(side, "fabric", "run", *options, _script("with_fabric.py"))


def _python(script: str) -> Callable[[Side, int], list[str]]:
    """Run a program whose script calls ``ferroelastic.install()``, or needs no call."""
    return lambda _side, _restarts: [str(BIN / "python"), _script(script)]


def _python_exec(script: str) -> Callable[[Side, int], list[str]]:
    return lambda side, _restarts: _exec(side, "python", _script(script))


def _torchx(side: Side, restarts: int) -> list[str]:
    options = [
        "-s",
        "local_cwd",
        "dist.ddp",
        "-j",
        "1x2",
        "--max_retries",
        str(restarts),
        "--script",
        _script("plain.py"),
    ]
    return _exec(side, "torchx", "run", *options)


def _deepspeed(side: Side, restarts: int) -> list[str]:
    if side == "ferroelastic":
        return _torchrun("with_deepspeed.py")(side, restarts)
    return [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", _script("with_deepspeed.py")]


_ONE = dict.fromkeys(SIDES, 1)
_NEVER: tuple[Side, ...] = ()

PROGRAMS = (
    Program("accelerate launch", "accelerate", _accelerate, exit_codes=_ONE),
    Program("accelerate notebook_launcher", "accelerate", _python("notebook.py"), exit_codes=_ONE),
    Program("fabric run", "lightning", _fabric, exit_codes=_ONE, restarts=_NEVER),
    Program("Lightning Trainer", "lightning", _torchrun("with_lightning.py")),
    Program("transformers Trainer", "transformers", _torchrun("with_transformers.py")),
    # DeepSpeed's own launcher hands on the code of the failed rank. It ends at SIGTERM, and its workers run on.
    Program(
        "deepspeed launcher / ferrorun",
        "deepspeed",
        _deepspeed,
        exit_codes=dict.fromkeys(SIDES, 3),
        restarts=("ferroelastic",),
        clean_ends={"torch": ("not saved, 3 processes left",), "ferroelastic": ("yes",)},
    ),
    Program("torchrunx", "torchrunx", _python_exec("with_torchrunx.py"), exit_codes=_ONE, restarts=_NEVER),
    Program("submitit, local executor", "submitit", _python_exec("with_submitit.py"), exit_codes=_ONE),
    Program("torchft, two replica groups", "torchft", _python("replica_groups.py")),
    Program("TorchX local_cwd, dist.ddp", "torchx", _torchx, exit_codes=_ONE, restarts=_NEVER),
)

NOT_STARTING = {"HyperPod": "hyperpod-elastic-agent", "DLRover": "dlrover"}
"""Programs whose newest version does not start with this version of torch, with their distributions."""
