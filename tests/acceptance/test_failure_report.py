"""The report of failed jobs: real jobs, each with its own cause."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.harness import FERRORUN
from tests.support.ports import free_port
from tests.support.waiting import eventually

from ferroelastic._failure import oom

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.harness import Job, Launcher

MIB = 1 << 20


def saved_reports(launch: Launcher, folder: str) -> list[Path]:
    # The link to the latest run leads to the same file.
    return sorted({path.resolve() for path in launch.folder.glob(f"{folder}/*/failure.json")})


def report(launch: Launcher, job: Job) -> dict[str, Any]:
    """The report in the log folder, which is that of ``--summary=json`` too."""
    (path,) = saved_reports(launch, "logs")
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


def is_written_here() -> bool:
    """Whether the kernel writes cores to the working directory of the process."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    return "/" not in pattern and not pattern.startswith(("|", "@"))


@pytest.mark.skipif(not is_written_here(), reason="kernel.core_pattern sends cores elsewhere")
def test_a_core_and_the_sender_that_it_records(launch: Launcher) -> None:
    with_cores = ("sh", "-c", f'ulimit -c unlimited; cd {launch.folder}; exec "$@"', "sh", *FERRORUN, "--standalone")
    body = "import os, time\nos.write(1, b'%d\\n' % os.getpid())\ntime.sleep(1000)"
    job = launch(f"--log-dir={launch.folder}/logs", launch.write("train.py", body), nproc=1, launcher=with_cores)
    (pid,) = map(int, job.lines(1))
    os.kill(pid, signal.SIGQUIT)
    assert job.end() == 128 + signal.SIGQUIT, job.story
    first = report(launch, job)["first"]
    if first["core"] is None:
        pytest.skip("the hard limit allows no core")
    assert Path(first["core"]).parent == launch.folder
    assert first["sender"]["kind"] == "process", first
    assert first["sender"]["pid"] == os.getpid()
    assert f"  core      : {first['core']}\n" in shown(job)


def test_a_library_gets_the_report(launch: Launcher) -> None:
    program = f"""
import json
from ferroelastic.launcher.api import LaunchConfig, launch_agent
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std
config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="demo", max_restarts=0,
    logs_specs=DefaultLogsSpecs({str(launch.folder / "logs")!r}, redirects=Std.ERR),
)
try:
    launch_agent(config, "/bin/sh", ["-c", "echo no data >&2; exit 9"])
except Exception as error:
    first = error.job_failure.first
    print(type(error).__name__, first.exit_code, first.stderr, "Root Cause" in str(error))
"""
    job = launch.start(sys.executable, launch.write("program.py", program))
    assert job.end() == 0, job.story
    assert job.output == b"ChildFailedError 9 ['no data'] True\n"
    assert len(saved_reports(launch, "logs")) == 1


# ---- two nodes


def on_two_nodes(launch: Launcher, script: str, *options: str, conf: str = "") -> list[Job]:
    """Two agents of one job, the host first, each with a log folder of its own."""
    path, port = launch.write("train.py", script), free_port()
    shared = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job", "--nnodes=2", *options)
    return [
        launch(
            *shared,
            f"--rdzv-conf=is_host={int(node == 0)}{conf}",
            f"--log-dir={launch.folder}/logs{node}",
            "--redirects=2",
            path,
            launcher=FERRORUN,
        )
        for node in range(2)
    ]


def reports(launch: Launcher) -> list[dict[str, Any]]:
    paths = [*saved_reports(launch, "logs0"), *saved_reports(launch, "logs1")]
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize("rank", [0, 3])
def test_all_nodes_show_the_same_failure(launch: Launcher, rank: int) -> None:
    script = f"import os, time\nif os.environ['RANK'] == '{rank}':\n    raise ValueError('no data')\ntime.sleep(1000)"
    jobs = on_two_nodes(launch, script)
    assert [job.end() for job in jobs] == [1, 1]
    first, second = reports(launch)
    assert first["first"] == second["first"]
    assert (first["first"]["rank"], first["first"]["node_rank"]) == (rank, rank // 2)
    assert first["first"]["exception"]["message"] == "no data"
    assert [one["others"]["stopped"] for one in (first, second)] == ([1, 2] if rank == 0 else [2, 1])
    for job in jobs:
        assert shown(job).count("Traceback (most recent call last):") == 1, job.story
        assert f"train.py FAILED: rank {rank} exited with code 1\n" in shown(job)
        assert "no restart is allowed (--max-restarts=0)" in shown(job)


def test_of_failures_on_two_nodes_the_first_is_shown_on_both(launch: Launcher) -> None:
    script = "import os, sys, time\ntime.sleep(0.5 if os.environ['RANK'] == '0' else 0.6 if os.environ['RANK'] == '2' else 1000)"
    jobs = on_two_nodes(launch, f"{script}\nsys.exit(10 + int(os.environ['RANK']))")
    codes = [job.end() for job in jobs]
    first, second = reports(launch)
    assert codes == [first["first"]["exit_code"]] * 2
    assert first["first"] == second["first"]
    assert first["job"]["exit_code"] == second["job"]["exit_code"] == codes[0]


def test_a_lost_node(launch: Launcher) -> None:
    script = "import os, time\nos.write(1, b'runs\\n')\ntime.sleep(1000)"
    host, other = on_two_nodes(launch, script, conf=",join_timeout=2")
    assert host.lines(2) == ["runs"] * 2
    assert other.lines(2) == ["runs"] * 2
    other.send(signal.SIGKILL)
    assert host.end() == 1
    (failure,) = reports(launch)
    first = failure["first"]
    assert (first["kind"], first["rank"], first["exit_code"]) == ("lost_node", None, None)
    assert "was lost" in first["reason"]
    assert "train.py FAILED: a node was lost\n" in shown(host)


def test_the_host_is_lost(launch: Launcher) -> None:
    script = "import os, time\nos.write(1, b'runs\\n')\ntime.sleep(1000)"
    host, other = on_two_nodes(launch, script, conf=",read_timeout=2,join_timeout=4")
    assert host.lines(2) == ["runs"] * 2
    assert other.lines(2) == ["runs"] * 2
    host.send(signal.SIGKILL)
    assert other.end() == 1
    (failure,) = reports(launch)
    assert failure["first"]["kind"] == "lost_node"
    assert "train.py FAILED: a node was lost\n" in shown(other)
