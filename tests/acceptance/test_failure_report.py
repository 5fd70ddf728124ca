"""The report of failed jobs: real jobs, each with its own cause."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.harness import FERRORUN
from tests.support.waiting import eventually

from ferroelastic._failure import oom

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.harness import Job, Launcher

MIB = 1 << 20


def report(launch: Launcher, job: Job) -> dict[str, Any]:
    """The report in the log folder, which is that of ``--summary=json`` too."""
    (path,) = launch.folder.glob("logs/*/failure.json")
    saved: dict[str, Any] = json.loads(path.read_text())
    assert saved["logs"] == str(path.parent), job.story
    return saved


def shown(job: Job) -> str:
    """Standard error without the events and the log."""
    lines = [line for line in job.errors.splitlines(keepends=True) if not line.startswith('{"name"')]
    return "".join(line for line in lines if "] ERROR: " not in line and "] WARNING: " not in line)


def fail(launch: Launcher, script: str, *options: str, nproc: int = 2, **more: Any) -> Job:
    """A job whose rank 1 runs the script. The others wait."""
    body = "import os, sys, time, signal\nif os.environ['RANK'] == '1':\n" + "".join(
        f"    {line}\n" for line in script.splitlines()
    )
    path = launch.write("train.py", body + "time.sleep(1000)\n")
    job = launch(f"--log-dir={launch.folder}/logs", "--redirects=2", *options, path, nproc=nproc, **more)
    job.end()
    return job


def test_an_exception_without_record(launch: Launcher) -> None:
    job = fail(launch, "{}['key']")
    failure = report(launch, job)
    first = failure["first"]
    assert (first["rank"], first["kind"], first["exit_code"], first["signal"]) == (1, "exit", 1, None)
    assert (first["exception"]["type"], first["exception"]["message"]) == ("KeyError", "'key'")
    assert first["exception"]["source"] == "stderr"
    assert failure["others"] == {"failed": 0, "stopped": 1, "same_failure": []}
    assert failure["job"]["exit_code"] == 1
    assert shown(job).count("train.py FAILED: rank 1 exited with code 1") == 1
    assert shown(job).count("Traceback (most recent call last):") == 1
    assert "  exception : KeyError: 'key'\n" in shown(job)
    assert "\x1b" not in shown(job)
    assert shown(job).rstrip().endswith("=" * 60)


def test_the_time_is_that_of_the_exit(launch: Launcher) -> None:
    before = time.time_ns()
    job = fail(launch, "sys.exit(3)", "--max-restarts=1")
    failure = report(launch, job)
    assert before < failure["first"]["time_ns"] < failure["job"]["time_ns"] < time.time_ns()
    assert failure["first"]["round"] == 1
    assert [restart["round"] for restart in failure["restarts"]] == [0]
    assert failure["restarts"][0]["cause"].endswith("exited with code 3")
    assert failure["decision"] == "no restart is left (--max-restarts=1)"


@pytest.mark.parametrize("form", ["short", "json"])
def test_other_forms(launch: Launcher, form: str) -> None:
    job = fail(launch, "raise ValueError('it is wrong')", f"--summary={form}")
    lines = shown(job).splitlines()
    if form == "json":
        assert json.loads(lines[-1]) == report(launch, job)
        assert len(lines) == 1
    else:
        assert lines[0].endswith("train.py FAILED: rank 1 exited with code 1")
        assert "ValueError: it is wrong" in lines
        assert len(lines) <= 5


def test_ten_workers_with_one_traceback_show_it_once(launch: Launcher) -> None:
    body = "import os\nraise RuntimeError(f'no data for rank {os.environ[\"RANK\"]}')\n"
    path = launch.write("train.py", body)
    job = launch(f"--log-dir={launch.folder}/logs", "--redirects=2", path, nproc=10)
    assert job.end() == 1
    assert shown(job).count("Traceback (most recent call last):") == 1
    assert shown(job).count("RuntimeError: no data") == 2  # the line and the end of the traceback
    failure = report(launch, job)
    others = failure["others"]
    assert len(others["same_failure"]) == others["failed"]
    assert failure["first"]["rank"] not in others["same_failure"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_of_another_process(launch: Launcher, number: signal.Signals) -> None:
    job = fail(launch, f"os.kill(os.getpid(), {int(number)}); time.sleep(1)")
    first = report(launch, job)["first"]
    assert (first["kind"], first["signal"], first["exit_code"]) == ("signal", number.name, None)
    assert first["sender"] == {"kind": "unknown"}
    assert f"  exitcode  : -{int(number)} (pid: {first['pid']}) ({number.name})\n" in shown(job)


def test_a_fatal_signal_with_the_dump_of_faulthandler(launch: Launcher) -> None:
    script = "import faulthandler, ctypes\nfaulthandler.enable()\ndef crash():\n    ctypes.string_at(0)\ncrash()"
    job = fail(launch, script)
    first = report(launch, job)["first"]
    assert first["signal"] == "SIGSEGV"
    assert first["fatal_dump"].startswith("Fatal Python error: Segmentation fault")
    assert " in crash\n" in shown(job)


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        ("open(path, 'w').write('{\"message\": {\"mess')", "Unterminated string"),
        ("os.mkfifo(path)", "it is not a regular file"),
        ("os.symlink(path, path)", "Too many levels of symbolic links"),
        ("os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2 << 30)", "it has more than 1048576 bytes"),
    ],
    ids=["half-written", "fifo", "loop", "2 GB"],
)
def test_an_error_file_that_cannot_be_used_is_a_line(launch: Launcher, left: str, reason: str) -> None:
    job = fail(launch, f"path = os.environ['TORCHELASTIC_ERROR_FILE']\n{left}\nos._exit(7)")
    first = report(launch, job)["first"]
    assert (first["exit_code"], first["exception"]) == (7, None)
    assert reason in first["error_file_problem"]
    (line,) = [line for line in shown(job).splitlines() if line.startswith("  error file: cannot be used:")]
    assert reason in line


def test_a_recorded_exception(launch: Launcher) -> None:
    script = "from ferroelastic.multiprocessing.errors import record\n@record\ndef main():\n    raise ValueError('recorded')\nmain()"
    job = fail(launch, script)
    exception = report(launch, job)["first"]["exception"]
    assert (exception["type"], exception["message"], exception["source"]) == ("ValueError", "recorded", "error_file")
    assert "ValueError: recorded" in exception["traceback"]


def test_the_final_event_has_the_report(launch: Launcher) -> None:
    job = fail(launch, "sys.exit(5)", "--event-log-handler=console")
    (final,) = [
        json.loads(line)
        for line in job.errors.splitlines()
        if line.startswith("{") and '"torchelastic.worker.status.SUCCEEDED"' in line
    ]
    assert json.loads(final["metadata"]["metadata"])["failure"] == report(launch, job)


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A memory cgroup of 256 MiB."""
    own = oom.find_cgroup()
    if own is None:
        pytest.skip("this process has no memory cgroup that can be seen")
    folder = Path(own.folder) / f"ferroelastic-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if own.version == 1 else "memory.max")).write_text(str(256 * MIB))
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made: {error}")
    yield folder
    assert eventually(lambda: is_removed(folder))  # its last processes are still ending


def is_removed(folder: Path) -> bool:
    with suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def test_a_worker_that_the_oom_killer_ends(launch: Launcher, memory_cgroup: Path) -> None:
    enter = ("sh", "-c", f'echo $$ > {memory_cgroup}/cgroup.procs; exec "$@"', "sh")
    # The agent is in the same cgroup and must not be chosen.
    body = "open('/proc/self/oom_score_adj', 'w').write('1000')\nkept = []\nwhile True:\n    kept.append(os.urandom(1 << 20))"
    job = fail(launch, body, launcher=(*enter, *FERRORUN, "--standalone"))
    failure = report(launch, job)
    sender = failure["first"]["sender"]
    assert (sender["kind"], sender["scope"], sender["limit_bytes"]) == ("oom_killer", "cgroup", 256 * MIB), job.story
    assert 200 * MIB < sender["peak_bytes"] <= 256 * MIB
    assert failure["advice"]["cause"] == "oom_killer"
    assert "train.py FAILED: rank 1 was killed by the kernel's OOM killer" in shown(job)
    assert failure["job"]["exit_code"] == 137
