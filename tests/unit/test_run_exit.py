"""What ``ferrorun`` says and returns when a launch ends, on the console, under a scheduler and to a program."""

import errno
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.fake_launch import Launch

from ferroelastic import _ports, _report, rendezvous, run
from ferroelastic._failure.box import render
from ferroelastic._failure.model import Failure, FirstFailure, Job
from ferroelastic.multiprocessing import SignalException
from ferroelastic.multiprocessing.errors import ChildFailedError, ProcessFailure

pytestmark = pytest.mark.usefixtures("launcher_environment")


class TextlessError(Exception):
    def __str__(self) -> str:
        raise LookupError


def _failed(exitcode: int, error_file: str = "") -> ChildFailedError:
    return ChildFailedError(
        "train.py", {0: ProcessFailure(local_rank=0, pid=11, exitcode=exitcode, error_file=error_file)}
    )


def test_success_is_0_and_silent(
    launch: Launch, script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run.cli(["--log-dir", str(tmp_path), script, "x"]) == 0

    assert launch.calls[0][2] == ("-u", script, "x")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("exitcode", "code"), [(3, 3), (1, 1), (255, 255), (-9, 137), (-signal.SIGSEGV, 139), (0, 1)])
def test_a_workers_end_is_the_exit_code(
    launch: Launch, script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], exitcode: int, code: int
) -> None:
    launch.error = _failed(exitcode)

    assert run.cli(["--log-dir", str(tmp_path), script]) == code

    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("train.py FAILED") == 1
    assert "Traceback" not in err
    assert err == str(launch.error).strip("\n") + "\n"


def _explained(exitcode: int, job_exit_code: int) -> ChildFailedError:
    error = _failed(exitcode)
    first = FirstFailure(rank=3, exit_code=job_exit_code, kind="exit")
    error.job_failure = Failure(job=Job(name="train.py", exit_code=job_exit_code), first=first)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("form", ["full", "short", "json"])
def test_the_report_is_written_in_the_chosen_form(
    launch: Launch, script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    launch.error = error = _explained(1, 9)

    assert run.cli(["--log-dir", str(tmp_path), f"--summary={form}", script]) == 9

    assert capfd.readouterr() == ("", render(error.job_failure, form) + "\n")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", ""), ("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_on_a_terminal(
    launch: Launch, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    launch.error = _explained(1, 1)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(variable, value)
    master, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        assert run.cli(["--log-dir", str(tmp_path), script]) == 1
    text = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "train.py FAILED: rank 3 exited with code 1" in text
    assert ("\x1b[" in text) == (value == "")


def test_no_handler_of_ours_is_left(launch: Launch, script: str, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    assert run.cli(["--log-dir", str(tmp_path), script]) == 0
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
    assert launch.calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_launcher_is_the_exit_code(
    launch: Launch, script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    launch.error = SignalException("told to end", number)

    assert run.cli(["--log-dir", str(tmp_path), script]) == 128 + number

    assert capfd.readouterr().err == ""


def test_an_early_interrupt_is_130(
    launch: Launch, script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch.error = KeyboardInterrupt()

    assert run.cli(["--log-dir", str(tmp_path), script]) == 130
    assert capfd.readouterr().err == ""


def _spawn_error(number: int) -> OSError:
    error = OSError(number, f"failed to execve command 0: {os.strerror(number)}")
    error.stage = "execve"  # type: ignore[attr-defined]
    return error


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


RendezvousConnectionError = type("RendezvousConnectionError", (Exception,), {})

ERRORS = [
    (ValueError("the port is\nno port"), 2, "the port is no port"),
    (RuntimeError("the workers are stuck"), 1, "the workers are stuck"),
    (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "error: No space left on device: '/x'"),
    (_spawn_error(errno.EACCES), 1, "error: failed to execve command 0: Permission denied; check PYTHON_EXEC"),
    (_spawn_error(errno.ENOEXEC), 1, "Exec format error; give it a first line such as #!/bin/sh"),
    (
        _caused(OSError(8, "wrapped"), _spawn_error(errno.ENOENT)),
        1,
        "error: failed to execve command 0: No such file or",
    ),
    (_spawn_error(errno.EAGAIN), 1, "Resource temporarily unavailable"),
    (ModuleNotFoundError("etcd takes torch", name="torch"), 1, "error: etcd takes torch"),
    (KeyError("k"), 1, "KeyError: 'k'; LOGLEVEL=DEBUG shows the traceback"),
    (AssertionError(), 1, "AssertionError: AssertionError; LOGLEVEL=DEBUG shows the traceback"),
    (
        _caused(RendezvousConnectionError("The connection has failed."), TimeoutError("no answer in 60 s")),
        1,
        "The connection has failed.: no answer in 60 s",
    ),
    (_caused(ConnectionError("it failed: no answer"), TimeoutError("no answer")), 1, "error: it failed: no answer\n"),
    (
        _caused(
            OSError(13, "cannot write '/A/b': Permission denied; choose another"),
            PermissionError(13, "Permission denied", "/A/b"),
        ),
        1,
        "error: cannot write '/A/b': Permission denied; choose another\n",
    ),
    (_caused(OSError("it failed"), OSError("why it failed")), 1, "error: why it failed\n"),
    (TextlessError(), 1, "TextlessError: <no text: its __str__ raised>; LOGLEVEL=DEBUG shows the traceback"),
    (TypeError("max_restarts must be a number"), 1, "TypeError: max_restarts must be a number"),
]


def _name(value: object) -> str:
    return type(value).__name__ if isinstance(value, TextlessError) else str(value)


@pytest.mark.parametrize(("error", "code", "text"), ERRORS, ids=_name)
def test_an_error_is_one_line(
    launch: Launch,
    script: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    launch.error = error

    assert run.cli(["--log-dir", str(tmp_path), script]) == code

    (line,) = capfd.readouterr().err.splitlines(keepends=True)
    assert line.startswith("ferrorun: error: ")
    assert text in line


def test_debug_shows_the_traceback(
    launch: Launch, script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGLEVEL", "DEBUG")
    launch.error = KeyError("k")

    assert run.cli(["--log-dir", str(tmp_path), script]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_an_unknown_log_level_is_named(
    launch: Launch, script: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGLEVEL", "loud")

    assert run.cli([script]) == 2
    assert "LOGLEVEL='loud' is not a level; use DEBUG" in capfd.readouterr().err
    assert not launch.calls


def test_a_log_folder_that_is_a_file_is_named(launch: Launch, script: str, capfd: pytest.CaptureFixture[str]) -> None:
    for folder in (script, f"{script}/logs"):
        assert run.cli(["--log-dir", folder, script]) == 1

        (line,) = capfd.readouterr().err.splitlines()
        assert f"log folder --log-dir='{folder}' cannot be written: " in line
        assert line.endswith("; give another with --log-dir")
    assert not launch.calls


def test_a_log_folder_without_permission_is_named(
    launch: Launch, script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The superuser may write anywhere; ask as if we were not.
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK and path == script)

    assert run.cli(["--log-dir", str(tmp_path), script]) == 1
    assert f"log folder --log-dir='{tmp_path}' cannot be written: permission denied" in capfd.readouterr().err
    assert not launch.calls


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Let another process listen on a port."""
    path = tmp_path / "server.py"
    path.write_text(
        "import socket, sys\n"
        "s = socket.create_server(('127.0.0.1', 0))\n"
        "print(s.getsockname()[1], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process


@pytest.mark.parametrize("chained", [False, True])
def test_the_owner_of_a_busy_port_is_named(
    launch: Launch,
    script: str,
    listener: tuple[int, "subprocess.Popen[str]"],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    chained: bool,
) -> None:
    port, process = listener
    busy = OSError(errno.EADDRINUSE, "Address already in use")
    launch.error = _caused(RendezvousConnectionError("no store"), busy) if chained else busy

    assert run.cli(["--log-dir", str(tmp_path), "--master-port", str(port), script]) == 1

    (line,) = capfd.readouterr().err.splitlines()
    python = Path(sys.executable).name
    server = f"{python} {tmp_path}/server.py"
    server = server if len(server) <= 60 else server[:59] + "…"
    assert (
        f"port {port} is in use by pid {process.pid} ({server}); end that process or choose another port with --master-port"
        in line
    )


def test_a_rendezvous_that_fails_names_the_process_at_the_port(
    launch: Launch,
    script: str,
    listener: tuple[int, "subprocess.Popen[str]"],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    port, process = listener
    launch.error = RendezvousConnectionError("the store does not answer")
    line = ["--log-dir", str(tmp_path), "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", script]

    assert run.cli(line) == 1

    text = capfd.readouterr().err
    assert f"the store does not answer; port {port} of this host belongs to pid {process.pid} (" in text
    assert "choose another port with --rdzv-endpoint" in text


def test_a_refusal_has_one_remedy(
    launch: Launch,
    script: str,
    listener: tuple[int, "subprocess.Popen[str]"],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Who refuses a node is the rendezvous, and has said what to do: the owner of the port is of no interest."""
    port, _ = listener
    error = rendezvous.RendezvousConnectionError("it is that of another job: give all nodes the same --rdzv-id")
    error.was_refused = True  # type: ignore[attr-defined]
    launch.error = error
    line = ["--log-dir", str(tmp_path), "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", script]
    assert run.cli(line) == 1
    assert capfd.readouterr().err.endswith("give all nodes the same --rdzv-id\n")


def test_a_busy_port_of_a_hidden_process(
    launch: Launch, script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_report, "port_owner", lambda _: "")
    launch.error = OSError(errno.EADDRINUSE, "Address already in use")

    assert run.cli(["--log-dir", str(tmp_path), "--master-port=1234", script]) == 1
    assert (
        "port 1234 is in use by a process of another user; choose another with --master-port" in capfd.readouterr().err
    )


def test_this_process_is_not_named_as_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert _ports.port_owner(server.getsockname()[1]) == ""


# The launcher as a child of a scheduler or of another launcher, and called by a program.


@pytest.mark.parametrize("call", [run.main, run.cli])
def test_the_first_failure_reaches_the_launchers_own_error_file(
    launch: Launch, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[list[str]], object]
) -> None:
    own, workers = tmp_path / "own.json", tmp_path / "worker.json"
    workers.write_text(
        json.dumps({"message": {"message": "boom", "extraInfo": {"timestamp": "7", "py_callstack": "at"}}})
    )
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(own))
    launch.error = _failed(3, str(workers))

    try:
        call(["--log-dir", str(tmp_path), script])
    except ChildFailedError:
        assert call is run.main

    message = json.loads(own.read_text())["message"]
    assert (message["message"], message["errorCode"]) == ("boom", 3)


def test_an_error_of_the_launcher_reaches_its_error_file(
    launch: Launch, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(own))
    launch.error = RuntimeError("boom")

    assert run.cli(["--log-dir", str(tmp_path), script]) == 1

    assert json.loads(own.read_text())["message"]["message"] == "RuntimeError: boom"


def test_main_raises_as_torchs(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["--log-dir", str(tmp_path), "is-not-looked-for.py"]
    assert run.main(line) is None  # type: ignore[func-returns-value]

    launch.error = _failed(3)
    with pytest.raises(ChildFailedError):
        run.main(line)
    with pytest.raises(AssertionError):
        run.main(["--max-restarts=-1", *line])
    with pytest.raises(SystemExit):
        run.main(["--max-restarts=x", *line])
    capfd.readouterr()


def test_exceptions_of_main_are_those_of_torch(launch: Launch, tmp_path: Path) -> None:
    theirs = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")
    launch.error = _failed(3)

    with pytest.raises(theirs.ChildFailedError):
        run.main(["--log-dir", str(tmp_path), "t.py"])
