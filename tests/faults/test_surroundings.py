"""``ferrorun`` does its work whatever its parent has left to it: closed streams, blocked and ignored signals, a pipe that nobody reads."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import FERRORUN, Job, Launcher, gone_at_ns
from tests.support.ports import port_for_one
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

STREAMS = ("<&-", ">&-", "2>&-")
COMBINATIONS = [chosen for count in (1, 2, 3) for chosen in itertools.combinations(STREAMS, count)]

# Reports through files: its streams may be the null device, or full.
SAVES = """
import os, signal, time
from pathlib import Path

folder, rank, attempt = Path(os.environ["DIR"]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
for descriptor in range(3):
    os.fstat(descriptor)
if attempt == os.environ["FAILS_IN"] and rank == "1":
    with open(folder / "gate") as gate:
        os.read(gate.fileno(), 1)
    os._exit(5)
(folder / f"ready.{attempt}.{rank}").touch()
signal.sigwait([signal.SIGTERM])
time.sleep(0.3)
(folder / f"saved.{attempt}.{rank}").touch()
os._exit(0)
"""


def there(launch: Launcher, *names: str) -> bool:
    return eventually(lambda: all((launch.folder / name).exists() for name in names), LONG_S)


def through_shell(prefix: str, *command: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", f"{prefix}", "sh", *command)


def saving(launch: Launcher, prefix: str, *options: str, fails_in: str = "never") -> Job:
    line = (*FERRORUN, "--standalone", "--nproc-per-node=2", "--shutdown-timeout=60", *options, *launch.python(SAVES))
    return launch.start(*through_shell(prefix, *line), env={"FAILS_IN": fails_in})


@pytest.mark.parametrize("closed", COMBINATIONS, ids=" ".join)
@pytest.mark.parametrize("end", ["signal", "failure", "restart"])
def test_closed_streams(launch: Launcher, closed: Sequence[str], end: str) -> None:
    gate = launch.gate()
    restarts = 1 if end == "restart" else 0
    fails_in = "never" if end == "signal" else "0"
    job = saving(launch, f'exec "$@" {" ".join(closed)}', f"--max-restarts={restarts}", fails_in=fails_in)
    assert there(launch, "ready.0.0"), job.story
    last = "0"
    if end != "signal":
        gate.let_pass()
        assert there(launch, "saved.0.0"), job.story
    if end == "restart":
        assert there(launch, "ready.1.0", "ready.1.1"), job.story
        last = "1"
    if end == "signal":
        assert there(launch, "ready.0.1"), job.story
    if end != "failure":
        job.send(signal.SIGTERM)
    assert job.end() == (5 if end == "failure" else 128 + signal.SIGTERM)
    if end != "failure":
        assert there(launch, f"saved.{last}.0", f"saved.{last}.1")
    assert job.processes() == {}


@pytest.mark.parametrize("prefix", ["trap '' CHLD", "trap '' CHLD USR1 USR2"])
def test_ignored_signals_of_children(launch: Launcher, prefix: str) -> None:
    """A shell that ignores SIGCHLD hands that down, and a status that the kernel throws away is no failure."""
    for code in (0, 7):
        line = (*FERRORUN, "--standalone", "--nproc-per-node=2", *launch.shell(f"exit {code}"))
        job = launch.start(*through_shell(f'{prefix}; exec "$@"', *line))
        assert job.end() == code
        assert "SIGCHLD" not in job.errors


def test_a_blocked_signal_ends_the_job_too(launch: Launcher) -> None:
    """A parent that blocks SIGTERM hands that down as well."""
    block = f"import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {[15, 2]}); os.execv(sys.argv[1], sys.argv[1:])"
    line = (*FERRORUN, "--standalone", "--nproc-per-node=2", *launch.python(SAVES))
    job = launch.start(sys.executable, "-c", block, *line, env={"FAILS_IN": "never"})
    assert there(launch, "ready.0.0", "ready.0.1"), job.story
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    assert there(launch, "saved.0.0", "saved.0.1")


TELLS_WHEN = """
import os, signal, time
from pathlib import Path

folder, rank = Path(os.environ["DIR"]), os.environ["RANK"]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
(folder / f"ready.{rank}").touch()
signal.sigwait([signal.SIGTERM])
(folder / f"told~{rank}").write_text(str(time.monotonic_ns()))
(folder / f"told~{rank}").rename(folder / f"told.{rank}")
with open(folder / "gate") as gate:
    os.read(gate.fileno(), 1)
os._exit(0)
"""


def test_workers_are_signalled_though_no_line_of_the_log_can_be_written(launch: Launcher) -> None:
    """Nobody reads standard error, and the pipe is full. All workers are told; only then may one of them end."""
    count = 16
    gate = launch.gate()
    read_fd, write_fd = os.pipe()
    try:
        os.set_blocking(write_fd, False)
        size = fcntl.fcntl(write_fd, fcntl.F_GETPIPE_SZ)
        assert os.write(write_fd, bytes(size)) == size
        os.set_blocking(write_fd, True)
        line = (*FERRORUN, "--standalone", f"--nproc-per-node={count}", *launch.python(TELLS_WHEN))
        path = f"/proc/{os.getpid()}/fd/{write_fd}"
        job = launch.start(*through_shell(f'exec "$@" 2> {path}', *line))
        assert there(launch, *(f"ready.{rank}" for rank in range(count))), job.story
        job.send(signal.SIGTERM)
        assert there(launch, *(f"told.{rank}" for rank in range(count))), job.story
        gate.let_pass(count)
        assert job.end() == 128 + signal.SIGTERM
    finally:
        os.close(read_fd)
        os.close(write_fd)


WRITES_MUCH = """
import os, sys
from ferroelastic import _console, _rust

os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(2, True)
for number in range(3000):
    _console.stderr().write(f"line {number} {'y' * 1000}\\n")
for text in ("next", "last"):
    print("written", flush=True)
    sys.stdin.readline()
    _console.stderr().write(f"{text}\\n")
"""


def test_lines_that_were_lost_are_counted_once() -> None:
    read_fd, write_fd = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", WRITES_MUCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=write_fd
    )
    os.close(write_fd)
    os.set_blocking(read_fd, False)
    text = b""
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        for _ in range(2):
            assert child.stdout.readline() == b"written\n"
            with suppress(BlockingIOError):
                while chunk := os.read(read_fd, 1 << 20):
                    text += chunk
            child.stdin.write(b"\n")
            child.stdin.flush()
        assert child.wait() == 0
    os.set_blocking(read_fd, True)
    with os.fdopen(read_fd, "rb") as reader:
        text += reader.read()
    lines = text.lstrip(b"x").decode().splitlines()
    kept = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert kept == list(range(len(kept)))
    assert 0 < len(kept) < 3000
    lost = f"ferrorun: {3000 - len(kept)} log lines were lost here, because standard error was full"
    assert lines[len(kept) :] == [lost, "next", "last"]


def test_a_long_report_reaches_a_console_that_takes_it(tmp_path: Path) -> None:
    """It is longer than what is kept for one that does not."""
    path = tmp_path / "errors"
    program = "from ferroelastic import _console, _rust; _console.stderr().write('line\\n' * 50_000)"
    with path.open("wb") as stderr:
        subprocess.run([sys.executable, "-c", program], stderr=stderr, check=True)
    assert path.read_text() == "line\n" * 50_000


def test_the_resource_tracker_of_a_killed_worker_cleans_up(launch: Launcher) -> None:
    """It ignores SIGTERM, and unlinks the shared memory of its dead worker if it has the time to."""
    script = """
import os, signal, time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = SharedMemory(create=True, size=4096)
(Path(os.environ["DIR"]) / f"name.{os.environ['RANK']}").write_text(memory.name)
print("ready", flush=True)
while True:
    time.sleep(1000)
"""
    path = launch.write("shared.py", script)
    job = launch("--shutdown-timeout=1", "--no-python", sys.executable, path)
    assert job.lines(2) == ["ready"] * 2
    names = [launch.read(f"name.{rank}") for rank in range(2)]
    workers = [pid for pid, line in job.processes().items() if path in line and "ferroelastic.run" not in line]
    watched = [job.watch(pid) for pid in workers]
    job.settle(2)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    assert len(gone_at_ns(watched)) == len(watched)
    assert [name for name in names if os.path.exists(f"/dev/shm/{name}")] == []


# ---- descriptors and watches


def test_the_agent_has_all_descriptors_that_it_may_and_workers_have_their_own_limit(launch: Launcher) -> None:
    gate = launch.gate()
    line = (
        *FERRORUN,
        "--standalone",
        "--nproc-per-node=2",
        *launch.shell(f"ulimit -Sn; ulimit -Hn; read x < {gate.path}"),
    )
    job = launch.start(*through_shell('ulimit -Sn 300; ulimit -Hn 700; exec "$@"', *line))
    assert job.lines(4) == ["300", "300", "700", "700"]
    limits = resource.prlimit(job.agent.pid, resource.RLIMIT_NOFILE)
    assert limits == (700, 700)
    gate.let_pass(2)
    assert job.end() == 0


def test_function_workers_have_their_own_limit_too(launch: Launcher) -> None:
    script = launch.write(
        "limit.py", "import os, resource\nos.write(1, f'{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}\\n'.encode())\n"
    )
    line = (*FERRORUN, "--standalone", "--nproc-per-node=2", "--run-path", script)
    job = launch.start(*through_shell('ulimit -Sn 300; exec "$@"', *line))
    assert job.lines(2) == ["300", "300"]
    assert job.end() == 0


def test_idle_connections_of_a_neighbour_do_not_keep_nodes_from_meeting(launch: Launcher) -> None:
    port = port_for_one()
    address = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--nnodes=2", "--nproc-per-node=1")
    workers = launch.shell("exit 0")
    host = launch.start(
        *through_shell('ulimit -n 128; exec "$@"', *FERRORUN, *address, "--rdzv-conf=is_host=1", *workers)
    )
    with ExitStack() as idle:
        assert eventually(lambda: is_listening(port), LONG_S)
        for _ in range(200):
            idle.enter_context(socket.create_connection(("127.0.0.1", port)))
        guest = launch.start(*FERRORUN, *address, "--rdzv-conf=is_host=0", *workers)
        assert [host.end(), guest.end()] == [0, 0], host.story
    assert "file descriptors ran short: closed" in host.errors, host.errors


def is_listening(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    return False


def test_output_is_shown_where_no_file_can_be_watched(launch: Launcher) -> None:
    """The user's inotify instances are used up."""
    instances = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(instances.read_text()) > 4096:
        pytest.skip("too many inotify instances to use them up")
    libc = ctypes.CDLL(None, use_errno=True)
    taken: list[int] = []
    try:
        while (descriptor := libc.inotify_init1(os.O_CLOEXEC)) >= 0:
            taken.append(descriptor)
        job = launch("--tee=3", *launch.shell("echo seen; echo also >&2"))
        assert job.end() == 0
    finally:
        for descriptor in taken:
            os.close(descriptor)
    assert sorted(job.output.decode().splitlines()) == ["[default0]:seen", "[default1]:seen"]
    assert "[default1]:also" in job.errors
    assert "Traceback" not in job.errors


def test_a_console_whose_reader_is_gone_is_not_a_slow_one(launch: Launcher) -> None:
    gate = launch.gate()
    job = launch("--tee=1", *launch.shell(f"echo ready; read x < {gate.path}; echo more"))
    assert job.lines(2) == ["[default0]:ready", "[default1]:ready"]
    assert job.process.stdout is not None
    job.process.stdout.close()
    gate.let_pass(2)
    gone_at_ns([job.agent])
    assert job.process.wait() == 0
    assert "because the console failed (Broken pipe" in job.errors, job.errors
    assert "took nothing" not in job.errors


# ---- lines without end


def test_a_prompt_is_shown_before_it_is_answered(launch: Launcher) -> None:
    gate = launch.gate()
    job = launch("--tee=3", *launch.shell(f"printf '(Pdb) '; read x < {gate.path}; echo done"), nproc=1)
    assert job.process.stdout is not None
    assert read_exactly(job, len("[default0]:(Pdb) ")) == b"[default0]:(Pdb) "
    gate.let_pass()
    assert read_exactly(job, len("done\n")) == b"done\n"
    assert job.end() == 0


def read_exactly(job: Job, size: int) -> bytes:
    assert job.process.stdout is not None
    taken = b""
    while len(taken) < size:
        ready, _, _ = select.select([job.process.stdout], [], [], LONG_S)
        assert ready, job.story
        taken += os.read(job.process.stdout.fileno(), size - len(taken))
    return taken


# ---- as PID 1

ORPHANS = """
import os, sys, time
own_session = sys.argv[1] == "session"
for _ in range(20):
    if os.fork() == 0:
        if own_session:
            os.setsid()
        if os.fork() == 0:
            os._exit(0)  # its parent may be gone before or after
        os._exit(0)
    os.wait()
def zombies():
    states = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                states.append(stat.read().rpartition(")")[2].split()[0])
        except OSError:
            pass
    return states.count("Z")
deadline = time.monotonic() + 60
while zombies() and time.monotonic() < deadline:
    time.sleep(0.05)
os.write(1, f"{zombies()} zombies\\n".encode())
"""


@pytest.mark.parametrize("where", ["group", "session"])
@pytest.mark.parametrize("env", [{}, {"FERROELASTIC_PIDFD": "0"}], ids=["pidfds", "no pidfds"])
def test_orphans_of_workers_are_reaped_by_an_agent_that_is_the_init_process(
    launch: Launcher, where: str, env: dict[str, str]
) -> None:
    alone = ("unshare", "--pid", "--fork", "--mount-proc")
    if os.geteuid() != 0 or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no pid namespace to be had")
    job = launch.start(
        *alone, *FERRORUN, "--standalone", "--nproc-per-node=1", launch.write("orphans.py", ORPHANS), where, env=env
    )
    assert job.lines(1) == ["0 zombies"], job.story
    assert job.end() == 0
