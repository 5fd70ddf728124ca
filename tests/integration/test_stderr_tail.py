"""The last bytes of each worker's standard error, with and without log files."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.waiting import LONG_S, eventually

from ferroelastic.multiprocessing import DefaultLogsSpecs, PContext, Std, start_processes
from ferroelastic.multiprocessing._stderr import KEPT_BYTES, end_of_file

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

RANKS = range(2)


def start(log_dir: Path, script: str, redirects: Std = Std.NONE, **options: Any) -> PContext:
    return start_processes(
        name="worker",
        entrypoint="/bin/sh",
        args=dict.fromkeys(RANKS, ("-c", script)),
        envs={rank: {"RANK": str(rank)} for rank in RANKS},
        logs_specs=DefaultLogsSpecs(str(log_dir), redirects, **options),
    )


@pytest.mark.parametrize("redirects", [Std.NONE, Std.OUT, Std.ERR, Std.ALL])
def test_each_rank_has_a_tail(tmp_path: Path, redirects: Std, capfd: pytest.CaptureFixture[str]) -> None:
    after_the_other = (
        f"until [ $RANK = 0 ] || [ -e {tmp_path}/0 ]; do sleep 0.01; done; touch {tmp_path}/$RANK; exit $RANK"
    )
    script = "echo out of $RANK; printf 'error of %s\\nlast' $RANK >&2; " + after_the_other
    context = start(tmp_path / "logs", script, redirects)
    assert context.stderr_tail(0) in {b"", b"error of 0\nlast"}
    result = context.wait(LONG_S)
    assert result is not None
    assert list(result.failures) == [1]
    assert [context.stderr_tail(rank) for rank in RANKS] == [b"error of 0\nlast", b"error of 1\nlast"]
    shown = capfd.readouterr().err
    assert all((f"error of {rank}\nlast" in shown) == (not redirects & Std.ERR) for rank in RANKS)


@pytest.mark.parametrize("redirects", [Std.NONE, Std.ERR])
def test_a_tail_is_bounded(tmp_path: Path, redirects: Std) -> None:
    context = start(tmp_path, "head -c 300000 /dev/zero | tr '\\0' '\\377' >&2; printf 'the end' >&2", redirects)
    assert context.wait(LONG_S) is not None
    for rank in RANKS:
        tail = context.stderr_tail(rank)
        assert len(tail) == KEPT_BYTES
        assert tail.strip(b"\xff") == b"the end"


def complain(number: int, folder: Path) -> None:
    os.write(2, f"function {number}\n".encode())
    os.system("echo child >&2")
    if number:
        assert eventually((folder / "first").exists)
        raise ValueError("on purpose")
    (folder / "first").touch()


@pytest.mark.parametrize("redirects", [Std.NONE, Std.ERR])
@pytest.mark.parametrize("start_method", ["spawn", "fork", "forkserver"])
def test_functions_have_tails(
    tmp_path: Path, start_method: str, redirects: Std, capfd: pytest.CaptureFixture[str]
) -> None:
    context = start_processes(
        name="worker",
        entrypoint=complain,
        args={rank: (rank, tmp_path) for rank in RANKS},
        envs={rank: {} for rank in RANKS},
        logs_specs=DefaultLogsSpecs(str(tmp_path / "logs"), redirects),
        start_method=start_method,
    )
    assert context.wait(LONG_S) is not None
    assert context.stderr_tail(0) == b"function 0\nchild\n"
    assert context.stderr_tail(1).startswith(b"function 1\nchild\n")
    if start_method != "fork":  # `sys.stderr` of pytest does not use descriptor 2
        assert context.stderr_tail(1).endswith(b"ValueError: on purpose\n")
    assert ("function 1\n" in capfd.readouterr().err) == (redirects is Std.NONE)


def explode() -> None:
    raise ValueError("not loaded")


class Unloadable:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return explode, ()


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_failure_to_unpickle_is_in_the_tail(tmp_path: Path, start_method: str) -> None:
    context = start_processes(
        name="worker",
        entrypoint=complain,
        args={0: (0, Unloadable())},
        envs={0: {}},
        logs_specs=DefaultLogsSpecs(str(tmp_path / "logs")),
        start_method=start_method,
    )
    assert context.wait(LONG_S) is not None
    assert context.stderr_tail(0).endswith(b"ValueError: not loaded\n")


def test_ranks_that_are_filtered_out_have_no_tail(tmp_path: Path) -> None:
    context = start(tmp_path, "echo error of $RANK >&2", local_ranks_filter={1})
    assert context.wait(LONG_S) is not None
    assert [context.stderr_tail(rank) for rank in RANKS] == [b"", b"error of 1\n"]


def agent(folder: Path, script: str, redirection: str = "") -> str:
    """Run a program that has ``start``, and return its standard output."""
    program = folder / "agent.py"
    program.write_text(
        "from pathlib import Path\n"
        "from tests.integration.test_stderr_tail import *\n"
        f"folder = Path({str(folder)!r})\n{textwrap.dedent(script)}"
    )
    command = f'exec "$@" {redirection}'
    return subprocess.run(
        ["/bin/sh", "-c", command, "sh", sys.executable, str(program)],
        stdout=subprocess.PIPE,
        check=True,
        timeout=LONG_S,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ).stdout


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/null"])
def test_a_discarded_standard_error_stays_as_it_is(tmp_path: Path, redirection: str) -> None:
    script = """
    context = start(folder, "readlink /proc/$$/fd/2; echo error >&2")
    context.wait(60)
    print([context.stderr_tail(rank) for rank in RANKS])
    """
    *targets, tails = agent(tmp_path, script, redirection).splitlines()
    assert targets == (["/dev/null"] * 2 if "null" in redirection else [])
    assert tails == "[b'', b'']"


def test_much_output_takes_bounded_memory(tmp_path: Path) -> None:
    script = """
    def peak_kib():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    start(folder, "echo first >&2").wait(60)
    before = peak_kib()
    context = start(folder, "head -c 200000000 /dev/zero | tr '\\\\0' '\\\\377' >&2")
    context.wait(60)
    assert [len(context.stderr_tail(rank)) for rank in RANKS] == [KEPT_BYTES] * 2
    print(peak_kib() - before)
    """
    assert int(agent(tmp_path, script, f"2>{tmp_path}/console")) < 4096
    assert (tmp_path / "console").stat().st_size >= 400_000_000


def test_a_log_file_that_is_no_file_has_no_tail(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert [end_of_file(str(tmp_path / name)) for name in ("fifo", "missing", ".")] == [b"", b"", b""]


def test_a_disk_that_hangs_delays_the_agent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stderr.log"
    path.write_bytes(b"the cause\n")
    is_mended = threading.Event()

    def read(descriptor: int, size: int, offset: int, pread: Any = os.pread) -> bytes:
        is_mended.wait()
        found: bytes = pread(descriptor, size, offset)
        return found

    monkeypatch.setattr(os, "pread", read)
    began = time.monotonic()
    assert [end_of_file(str(path)) for _ in range(5)] == [b""] * 5
    assert time.monotonic() - began < 4
    is_mended.set()
    assert eventually(lambda: end_of_file(str(path)) == b"the cause\n")
