"""Functions that workers run. Children import this module, so it imports neither implementation."""

from __future__ import annotations

import json
import os
import signal
import sys
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any


def give(value: Any) -> Any:
    return value


class Give:
    """A function with a state, which is false as a truth value: it has no elements."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __len__(self) -> int:
        return 0

    def __call__(self) -> Any:
        return self.value


def give_rank(factor: int = 1) -> int:
    return int(os.environ["RANK"]) * factor


def write_environment(folder: str) -> None:
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(dict(os.environ)))


def speak(text: str) -> str:
    """Write to both streams, from Python and from a child."""
    print(f"{text} out")
    sys.stdout.flush()
    print(f"{text} err", file=sys.stderr)
    sys.stderr.flush()
    os.system(f"echo {text} child out; echo {text} child err >&2")
    return text


def leave(code: Any) -> None:
    sys.exit(code)


def leave_at_once(code: int) -> None:
    os._exit(code)


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.pause()


def raise_error(text: str) -> None:
    raise ValueError(text)


def wait_and_raise_error(fifo: str, text: str) -> None:
    Path(fifo).read_text()
    raise ValueError(text)


def wait_for_ever(*_arguments: Any) -> None:
    while True:
        signal.pause()


def announce_and_wait(fifo: str) -> None:
    Path(fifo).write_text("ready")
    wait_for_ever()


def fail_unless_restarted(rank: int, code: int) -> str:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and int(os.environ["RANK"]) == rank:
        os._exit(code)
    return f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']} of rank {os.environ['RANK']}"


def leave_a_key_and_fail() -> bool:
    """Leave a key in the workers' store in the first attempt; tell in the second whether it is still there."""
    import torch.distributed

    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        store.set("left", "behind")
        os._exit(1)
    return bool(store.check(["left"]))


def by_rank(*functions_and_arguments: tuple[Any, ...]) -> Any:
    """Call the function that is meant for the rank of this worker."""
    function, *arguments = functions_and_arguments[int(os.environ["RANK"])]
    return function(*arguments)


class Told:
    """A value whose sending leaves a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        Path(self.path).touch()
        return Told, (self.path,)


def return_and_note_the_end(folder: str, gate: str) -> Told:
    """Rank 1 returns when ``gate`` is opened. At its end, each rank notes which ranks have returned by then."""
    rank = os.environ["RANK"]

    def note() -> None:
        returned = sorted(path.name for path in Path(folder).glob("returned *"))
        Path(folder, f"end of {rank}").write_text(",".join(returned))

    Finalize(None, note, exitpriority=0)
    if rank == "1":
        Path(gate).read_text()
    return Told(str(Path(folder, f"returned {rank}")))


def is_installed() -> bool:
    """Whether ``ferroelastic.install()`` is in effect."""
    from ferroelastic import _install

    return _install.is_installed()
