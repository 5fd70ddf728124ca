"""Jobs to be disturbed: started as a user does, watched through pidfds, and looked after when the test is over."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.waiting import LONG_S, eventually

from ferroelastic.utils.process_state import read_proc_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]
FERRORUN = (sys.executable, "-m", "ferroelastic.run")
ALONE = (sys.executable, "-m", "tests.faults.alone", "--rdzv-backend=alone")
"""ferrorun as well, but with a rendezvous that does without torch and so starts in a fraction of the time."""

_MARK = "FERRO_TEST_JOB"
_STARTED = '"torchelastic.worker.status.START"'
_OF_OTHERS = (
    "PET_",
    "TORCHELASTIC_",
    "TORCH_ELASTIC_",
    "LOGLEVEL",
    "PYTHON_EXEC",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONUNBUFFERED",  # with it, a line and its end are printed apart, and ranks write between them
)


class Process:
    """A process that lives now, held by a pidfd: its end cannot be mistaken for that of a later one of the same number."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = os.pidfd_open(pid)

    def __repr__(self) -> str:
        return f"<process {self.pid}>"

    def is_gone(self) -> bool:
        return bool(gone_at_ns([self], 0))

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, signal.SIGKILL)
        gone_at_ns([self])

    def close(self) -> None:
        os.close(self.fd)


def gone_at_ns(processes: Iterable[Process], timeout_s: float = LONG_S) -> dict[int, int]:
    """Wait until all processes have ended; ``CLOCK_MONOTONIC`` at which each was seen to be gone, by pid.

    Those that outlive the timeout are missing.
    """
    poll = select.poll()
    waiting = {process.fd: process.pid for process in processes}
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    gone: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        now = time.monotonic_ns()
        if not ready:
            break
        for fd, _ in ready:
            poll.unregister(fd)
            gone[waiting.pop(fd)] = now
    return gone


class Gate:
    """Holds workers up until the test lets them pass: ``read x < "$GATE"`` in a shell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        # For reading too: so it opens without a worker, and a worker that comes before the test opens it finds a writer.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def let_pass(self, count: int = 1) -> None:
        assert os.write(self._fd, b"\n" * count) == count

    def close(self) -> None:
        os.close(self._fd)


class Job:
    """A running command and all that comes of it. Its standard output is read by the test, its standard error goes to a file."""

    def __init__(self, command: Iterable[str], folder: Path, env: Mapping[str, str], stdin: int) -> None:
        self.mark = uuid.uuid4().hex
        self.command = list(command)
        self.output = b""
        self._unread = b""
        self._watched: list[Process] = []
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OF_OTHERS)}
        self._stderr_path = folder / f"stderr.{self.mark}"
        with self._stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                self.command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**inherited, "OMP_NUM_THREADS": "1", **env, _MARK: self.mark},
                cwd=ROOT,
            )
        self.agent = self.watch(self.process.pid)

    @property
    def errors(self) -> str:
        """Standard error so far."""
        return self._stderr_path.read_text(errors="replace")

    @property
    def story(self) -> str:
        """What can be said about the job when it does not do what it should."""
        return f"{self.command}\nprocesses: {self.processes()}\nlast errors: {self.errors[-3000:]}"

    def watch(self, pid: int) -> Process:
        self._watched.append(Process(pid))
        return self._watched[-1]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def lines(self, count: int) -> list[str]:
        """Wait for the next ``count`` lines of standard output; sorted, because workers come in any order."""
        while self._unread.count(b"\n") < count:
            if not self._read(LONG_S):
                pytest.fail(f"no more output after {self.output[-3000:]!r}\n{self.story}")
        *lines, self._unread = self._unread.split(b"\n", count)
        return sorted(line.decode() for line in lines)

    def settle(self, count: int) -> None:
        """Wait until the agent is done with starting ``count`` workers (those of earlier attempts included) and waits for them."""
        assert eventually(lambda: self.errors.count(_STARTED) >= count and read_proc_state(self.process.pid) == "S"), (
            f"{count} workers were not started: {self.story}"
        )

    def end(self, *, drain: bool = True, timeout_s: float = LONG_S) -> int:
        """Wait for the command to end, reading its output meanwhile if ``drain``; its exit code."""
        poll = select.poll()
        poll.register(self.agent.fd, select.POLLIN)
        assert self.process.stdout is not None
        if drain:
            poll.register(self.process.stdout, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while not self.agent.is_gone():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                pytest.fail(f"does not end: {self.story}")
            ready = poll.poll(remaining * 1000)
            if any(fd == self.process.stdout.fileno() for fd, _ in ready) and not self._read(0):
                poll.unregister(self.process.stdout)
        code = self.process.wait()
        while drain and self._read(0):
            pass
        return code

    def guard(self) -> Process:
        """The process that ``ferrorun`` has left to look after its workers' children."""
        pids = self.guards()
        assert len(pids) == 1, f"guards of {self.command}: {pids}"
        return self.watch(pids[0])

    def guards(self) -> list[int]:
        """Process ids of all that ``ferrorun`` has left for that."""
        return [pid for pid in self.processes() if _read(pid, "comm").strip() == b"ferro-guard"]

    def clean_up(self) -> dict[int, str]:
        """End whatever is left, and tell what that was; of a job that still runs, a test has failed as it is."""
        has_ended = self.process.poll() is not None
        if not has_ended:
            self.process.kill()
            self.process.wait()
        # Python's resource tracker, for one, ends by itself when the process it belongs to is gone.
        eventually(lambda: not self.processes())
        left = self.processes()
        for pid in left:
            with suppress(ProcessLookupError):
                self.watch(pid).kill()
        for process in self._watched:
            process.close()
        self._watched.clear()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return left if has_ended else {}

    def processes(self) -> dict[int, str]:
        """Processes that have inherited this job's mark, with their command lines."""
        mark = f"{_MARK}={self.mark}".encode()
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        marked = [pid for pid in pids if mark in _read(pid, "environ").split(b"\0")]
        return {pid: _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace") for pid in marked}

    def _read(self, timeout_s: float) -> bool:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        chunk = os.read(self.process.stdout.fileno(), 1 << 16) if readable else b""
        self.output += chunk
        self._unread += chunk
        return bool(chunk)


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended, or is somebody else's
        return b""


class Launcher:
    """Starts jobs in a folder of their own, whose path workers have as ``$DIR``; ``$ZOO`` is the program of misbehaving workers."""

    def __init__(self, folder: Path, zoo: str) -> None:
        self.folder = folder
        self.zoo = zoo
        self.jobs: list[Job] = []
        self.gates: list[Gate] = []
        self.survivors: list[Process] = []
        """Processes that are to outlive their job; they end with the test."""

    def __call__(
        self,
        *arguments: str,
        nproc: int = 2,
        launcher: tuple[str, ...] = (*FERRORUN, "--standalone"),
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> Job:
        """Start ``ferrorun`` with ``arguments``."""
        flags = ("--event-log-handler=console", f"--nproc-per-node={nproc}")
        return self.start(*launcher, *flags, *arguments, env=env, stdin=stdin)

    def start(self, *command: str, env: Mapping[str, str] | None = None, stdin: int = subprocess.DEVNULL) -> Job:
        """Start any command."""
        env = {"DIR": str(self.folder), "TMPDIR": str(self.folder), "ZOO": self.zoo, **(env or {})}
        self.jobs.append(Job(command, self.folder, env, stdin))
        return self.jobs[-1]

    def gate(self, name: str = "gate") -> Gate:
        self.gates.append(Gate(self.folder / name))
        return self.gates[-1]

    def shell(self, script: str) -> tuple[str, ...]:
        """Arguments for workers that run a shell script."""
        return ("--no-python", "/bin/sh", self.write(f"script{len(self.jobs)}.sh", script))

    def python(self, script: str) -> tuple[str, ...]:
        """Arguments for workers that run a Python script and need nothing but the standard library."""
        return ("--no-python", sys.executable, "-S", "-E", self.write(f"script{len(self.jobs)}.py", script))

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def pids(self, pattern: str) -> list[int]:
        """The numbers in files that workers have left."""
        texts = [path.read_text().strip() for path in sorted(self.folder.glob(pattern))]
        return [int(text) for text in texts if text]  # a shell creates the file before it writes

    def clean_up(self) -> None:
        for process in self.survivors:
            process.kill()
        left = {str(job.command): job.clean_up() for job in self.jobs}
        for gate in self.gates:
            gate.close()
        assert not any(left.values()), f"left behind: {left}"


@pytest.fixture(scope="session")
def zoo() -> str:
    """Path of the program of misbehaving workers, built if need be. Without cargo, as in Debian's folder of `wheel_matrix.py`, it must exist."""
    if shutil.which("cargo") is None:
        built = ROOT / "target" / "release" / "zoo"
        if not built.exists():
            pytest.skip("cargo is not installed")
        return str(built)
    build = ["cargo", "build", "--release", "--quiet", "--locked", "--package", "ferroelastic-zoo"]
    subprocess.run(build, cwd=ROOT, check=True)
    query = ["cargo", "metadata", "--format-version=1", "--no-deps", "--locked"]
    metadata = json.loads(subprocess.run(query, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    return str(Path(metadata["target_directory"]) / "release" / "zoo")


@pytest.fixture
def launch(tmp_path: Path, zoo: str) -> Iterator[Launcher]:
    """Starts jobs; a process that outlives its job fails the test."""
    launcher = Launcher(tmp_path, zoo)
    yield launcher
    launcher.clean_up()
