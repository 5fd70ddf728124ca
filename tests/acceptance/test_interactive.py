"""``--interactive-rank``: one worker has the terminal. Each test has a pseudo-terminal, and types at it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.waiting import eventually

from ferroelastic.utils.process_state import read_proc_state

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

LONG_S = 60.0

# Stands for the shell: leads the session of the terminal, starts a job in it, and notes what the job has left of the terminal.
SHELL = """
import fcntl, json, os, signal, subprocess, sys, termios
path, report, *command = sys.argv[1:]
terminal = os.open(path, os.O_RDWR)
for descriptor in range(3):
    os.dup2(terminal, descriptor)
signal.signal(signal.SIGINT, lambda *_: None)  # and not ignored, which the job would inherit
def state():
    return [repr(termios.tcgetattr(0)), os.tcgetpgrp(0)]
before = state()
job = subprocess.Popen(command)
with open(report + ".pid", "w") as file:
    print(job.pid, file=file)
code = job.wait()
with open(report, "w") as file:
    json.dump({"code": code, "before": before, "after": state()}, file)
print("the end", flush=True)
"""


class Typist:
    """A job at a pseudo-terminal, and who sits before it."""

    def __init__(self, folder: Path, *arguments: str, env: dict[str, str]) -> None:
        self._report = folder / "report.json"
        self._pid_path = folder / "report.json.pid"
        os.mkfifo(self._pid_path)
        self._fd, slave = pty.openpty()
        self.screen = ""
        path = os.ttyname(slave)
        self.resize(33, 101)
        shell = folder / "shell.py"
        shell.write_text(SHELL)
        self.process = subprocess.Popen(
            [sys.executable, str(shell), path, str(self._report), sys.executable, "-m", "ferroelastic.run", *arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb", "DIR": str(folder), **env},
        )
        os.close(slave)
        self.launcher = int(self._pid_path.read_text())

    def see(self, text: str) -> str:
        """Wait for ``text`` on the screen, and return the screen up to it; the next call looks behind it."""
        while text not in self.screen:
            assert select.select([self._fd], [], [], LONG_S)[0], self.screen
            try:
                self.screen += os.read(self._fd, 4096).decode(errors="replace")
            except OSError:
                pytest.fail(f"the terminal has hung up: {self.screen}")
        seen, _, self.screen = self.screen.partition(text)
        return seen

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        import fcntl

        size = b"".join(number.to_bytes(2, sys.byteorder) for number in (rows, columns, 0, 0))
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, size)

    def mode(self) -> int:
        flags: int = termios.tcgetattr(self._fd)[3]
        return flags

    def end(self) -> int:
        """Wait for the end of the job, check that the terminal is as before, and return the exit code."""
        self.see("the end")
        self.process.wait(LONG_S)
        report: dict[str, Any] = json.loads(self._report.read_text())
        assert report["after"] == report["before"]
        return int(report["code"])

    def hang_up(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.launcher, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        if self._fd >= 0:
            os.close(self._fd)


@pytest.fixture
def sit(tmp_path: Path) -> Iterator[Any]:
    """Starts ``ferrorun`` with a script at a terminal: ``sit(script, options…)``."""
    typists: list[Typist] = []

    def start(script: str, *options: str, **env: str) -> Typist:
        (tmp_path / "train.py").write_text(script)
        arguments = ("--standalone", "--nproc-per-node=2", f"--log-dir={tmp_path}/logs", *options)
        typists.append(Typist(tmp_path, *arguments, str(tmp_path / "train.py"), env=env))
        return typists[-1]

    yield start
    for typist in typists:
        typist.close()


DEBUGGED = """
import os
rank = int(os.environ["RANK"])
value = 40 + rank
if rank == int(os.environ.get("ASKS", "0")):
    breakpoint()
    print("went on with", value)
open(f"{os.environ['DIR']}/end of {rank}", "w").close()
"""


@pytest.mark.parametrize(
    "options", [(), ("--tee=3",), ("--redirects=3",), ("--local-ranks-filter=1",), ("--run-path",)]
)
def test_breakpoint_works_to_the_end_of_the_job(tmp_path: Path, sit: Any, options: tuple[str, ...]) -> None:
    job = sit(DEBUGGED, "--interactive-rank=0", *options)
    job.see("(Pdb) ")
    job.type("p value + 2\r")
    assert re.findall(r"\b42\b", job.see("(Pdb) "))
    job.type("value = 1\rc\r")
    job.see("went on with 1")
    assert job.end() == 0
    assert all((tmp_path / f"end of {rank}").exists() for rank in range(2))
    assert not list((tmp_path / "logs").glob("*/attempt_0/0/std*.log"))


def test_another_rank_and_the_variable(sit: Any) -> None:
    job = sit(DEBUGGED, ASKS="1", PET_INTERACTIVE_RANK="1")
    job.see("(Pdb) ")
    job.type("p value\r")
    assert "41" in job.see("(Pdb) ")
    job.type("c\r")
    assert job.end() == 0


FACTS = """
import json, os, sys
rank = int(os.environ["RANK"])
facts = {"terminals": [os.isatty(descriptor) for descriptor in range(3)], "session": os.getsid(0) == os.getpid()}
if rank == 0:
    facts["foreground"] = os.tcgetpgrp(0) == os.getpgrp()
    facts["size"] = tuple(os.get_terminal_size(0))
    with open("/dev/tty", "r+b", buffering=0) as terminal:
        terminal.write(b"through /dev/tty")
    assert input("name? ") == "a name"
    assert sys.stdin.readline() == ""  # Ctrl-D
    print("last words " * 500, end="last of all\\n")
print("FACTS", rank, json.dumps(facts), "STCAF", file=open(f"{os.environ['DIR']}/facts {rank}", "w"))
"""


@pytest.mark.parametrize("options", [(), ("--run-path",), ("--run-path", "--start-method=fork")])
def test_the_terminal_that_a_rank_has(tmp_path: Path, sit: Any, options: tuple[str, ...]) -> None:
    job = sit(FACTS, "--interactive-rank=0", *options)
    job.see("through /dev/tty")
    job.see("name? ")
    job.type("a name\r\x04")
    words = job.see("last of all\r\n")
    assert words.count("last words") == 500
    assert job.end() == 0
    facts = [json.loads((tmp_path / f"facts {rank}").read_text().split(maxsplit=2)[2][:-7]) for rank in range(2)]
    assert facts[0] == {"terminals": [True] * 3, "session": True, "foreground": True, "size": [101, 33]}


RESIZED = """
import os, signal
if os.environ["RANK"] == "0":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
    print("ready")
    signal.sigwait({signal.SIGWINCH})
    print("columns", os.get_terminal_size(0).columns)
"""


def test_the_size_of_the_terminal_follows(sit: Any) -> None:
    job = sit(RESIZED, "--interactive-rank=0")
    job.see("ready")
    job.resize(20, 77)
    job.see("columns 77")
    assert job.end() == 0


SAVED = """
import os, signal, sys
rank = os.environ["RANK"]
def save(*_):
    open(f"{os.environ['DIR']}/saved {rank}", "a").write("x")
    sys.exit(0)
signal.signal(signal.SIGINT, save)
if rank == "0":
    fifo = open(f"{os.environ['DIR']}/ready")
    print("ready")
else:
    fifo = open(f"{os.environ['DIR']}/ready", "w")
while True:
    signal.pause()
"""


def test_ctrl_c_ends_the_job_and_each_rank_gets_one_signal(tmp_path: Path, sit: Any) -> None:
    os.mkfifo(tmp_path / "ready")
    job = sit(SAVED, "--interactive-rank=0")
    job.see("ready")
    job.type("\x03")
    assert job.end() == 128 + signal.SIGINT
    assert [(tmp_path / f"saved {rank}").read_text() for rank in range(2)] == ["x", "x"]


def test_ctrl_c_twice_ends_a_job_at_the_prompt_of_the_debugger(sit: Any) -> None:
    job = sit(DEBUGGED, "--interactive-rank=0", "--shutdown-timeout=600")
    job.see("(Pdb) ")
    job.type("\x03")
    job.see("closing signal SIGINT")
    job.type("\x03")
    assert job.end() == 128 + signal.SIGINT


RESTARTED = """
import os, sys
if os.environ["RANK"] == "0":
    word = input(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}? ")
    sys.exit(0 if word == "good" else 3)
"""


def test_each_attempt_has_the_terminal(sit: Any) -> None:
    job = sit(RESTARTED, "--interactive-rank=0", "--max-restarts=1")
    job.see("attempt 0? ")
    job.type("bad\r")
    job.see("attempt 1? ")
    job.type("good\r")
    assert job.end() == 0


def test_a_failure_gives_the_terminal_back(sit: Any) -> None:
    job = sit(RESTARTED, "--interactive-rank=0")
    job.see("attempt 0? ")
    job.type("bad\r")
    assert job.end() == 3


def test_the_terminal_is_taken_again_when_the_job_goes_on(sit: Any) -> None:
    """The shell changes the mode of the terminal while the job is stopped by Ctrl-Z."""
    job = sit(RESTARTED, "--interactive-rank=0")
    job.see("attempt 0? ")
    assert eventually(lambda: not job.mode() & termios.ICANON)
    os.kill(job.launcher, signal.SIGSTOP)
    assert eventually(lambda: read_proc_state(job.launcher) == "T")
    mode = termios.tcgetattr(job._fd)
    mode[3] |= termios.ICANON | termios.ECHO
    termios.tcsetattr(job._fd, termios.TCSANOW, mode)
    os.kill(job.launcher, signal.SIGCONT)
    assert eventually(lambda: not job.mode() & (termios.ICANON | termios.ECHO))
    job.type("good\r")
    assert job.end() == 0


def test_suspended_output_does_not_hold_up_the_end(sit: Any) -> None:
    """After Ctrl-S nobody takes the last words of the worker."""
    job = sit(RESTARTED.replace("sys.exit", "print('last words') or sys.exit"), "--interactive-rank=0")
    job.see("attempt 0? ")
    job.type("\x13good\r")
    assert eventually(lambda: not Path(f"/proc/{job.launcher}").exists(), LONG_S)
    job.type("\x11")
    assert job.end() == 0


def test_a_hangup_ends_the_job(tmp_path: Path, sit: Any) -> None:
    job = sit(DEBUGGED, "--interactive-rank=0", "--shutdown-timeout=1")
    job.see("(Pdb) ")
    job.hang_up()
    assert job.process.wait(LONG_S) == -signal.SIGHUP
    assert eventually(lambda: read_proc_state(job.launcher) in {None, "Z"}, LONG_S)
    assert not (tmp_path / "end of 0").exists()


def test_a_rank_that_is_not_there(sit: Any) -> None:
    job = sit(DEBUGGED, "--interactive-rank=2")
    job.see("--interactive-rank=2 is not a local rank of this node; give 0 to 1")
    assert job.end() == 2


def test_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    command = [
        sys.executable,
        "-m",
        "ferroelastic.run",
        "--standalone",
        "--interactive-rank=0",
        str(tmp_path / "train.py"),
    ]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--interactive-rank=0: standard input is not a terminal; start ferrorun in a terminal" in ended.stderr
    assert ended.stderr.count("\n") == 1
