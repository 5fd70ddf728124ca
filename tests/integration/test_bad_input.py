"""Whatever is wrong with a command line: one line that names it, an exit code, nothing started."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import ferroelastic

FOLDER = str(Path(ferroelastic.__file__).parents[1])
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="the rendezvous takes torch")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make a working directory whose scripts leave a mark when they are started."""
    mark = f"import pathlib\npathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
    (tmp_path / "train.py").write_text(mark)
    (tmp_path / "plain.txt").write_text("no program\n")
    (tmp_path / "no_interpreter.sh").write_text("touch started\n")
    (tmp_path / "no_interpreter.sh").chmod(0o755)
    return tmp_path


def _ferrorun(place: Path, *line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}
    return subprocess.run(
        [sys.executable, "-m", "ferroelastic.run", *line],
        cwd=place,
        env={**clean, "PYTHONPATH": FOLDER, "LOGLEVEL": "WARNING", "TMPDIR": str(place), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _assert_one_line(done: subprocess.CompletedProcess[str], place: Path, code: int, *texts: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("ferrorun: error: ")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.splitlines() == lines
    for text in texts:
        assert text in lines[0]
    assert not (place / "started").exists()


USAGE = [
    (["gone.py"], "'gone.py'"),
    (["-m", "gone_module"], "'gone_module'"),
    (["--no-python", "gone-command"], "'gone-command'"),
    (["--no-python", "./gone.sh"], "'./gone.sh'"),
    (["--no-python", "--module", "train"], "'--module'"),
    (["--nproc-per-node=0", "train.py"], "--nproc-per-node='0'"),
    (["--nproc-per-node=-3", "train.py"], "--nproc-per-node='-3'"),
    (["--nproc-per-node=x", "train.py"], "--nproc-per-node='x'"),
    (["--nnodes=3:1", "train.py"], "--nnodes='3:1'"),
    (["--nnodes=x", "train.py"], "--nnodes='x'"),
    (["--nnodes=1:2:3", "train.py"], "--nnodes='1:2:3'"),
    (["--max-restarts=-1", "train.py"], "--max-restarts=-1"),
    (["--max-restarts=x", "train.py"], "'x'"),
    (["--monitor-interval=0", "train.py"], "--monitor-interval=0.0"),
    (["--monitor-interval=-2", "train.py"], "--monitor-interval=-2.0"),
    (["--shutdown-timeout=-5", "train.py"], "--shutdown-timeout=-5"),
    (["--tee=9", "train.py"], "--tee='9'"),
    (["--redirects=0:7", "train.py"], "--redirects='0:7'"),
    (["--local-ranks-filter=0,one", "train.py"], "--local-ranks-filter='0,one'"),
    (["--fail-on-log=h\udcff=x", "train.py"], "--fail-on-log='h\\udcff=x' is not UTF-8"),
    (["--role=\udcff", "train.py"], "--role='\\udcff' is not UTF-8"),
    (["--duplicate-stdout-filters=a,\udcff", "train.py"], "--duplicate-stdout-filters='\\udcff' is not UTF-8"),
    (["--log-line-prefix-template=\udcff", "train.py"], "is not UTF-8"),
    (["--fatal-causes=oom", "train.py"], '--fatal-causes="oom" is not valid: "oom" is not one of agent, '),
    (["--rdzv-conf=timeout", "train.py"], "--rdzv-conf='timeout'"),
    (["--rdzv-conf==5", "train.py"], "--rdzv-conf='=5'"),
    (
        ["--standalone", "--rdzv-conf=join_timeout=x", "train.py"],
        "join_timeout='x' is not a valid time; give whole seconds",
    ),
    (["--standalone", "--rdzv-conf=is_host=maybe", "train.py"], "is_host='maybe' is neither true nor false"),
    (["--rdzv-backend=c10d", "--rdzv-endpoint=192.0.2.1:0", "train.py"], "'192.0.2.1:0' has port 0"),
    (["--rdzv-backend=pigeon", "--rdzv-endpoint=h:1", "train.py"], "--rdzv-backend='pigeon'"),
    (["--rdzv-backend=c10d", "--rdzv-endpoint=h:99999", "train.py"], "'h:99999'"),
    (["--master-port=99999", "train.py"], "127.0.0.1:99999"),
    (["--event-log-handler=pigeon", "train.py"], "--event-log-handler='pigeon'"),
    (["--signals-to-handle=SIGTREM", "train.py"], "'SIGTREM'"),
    (["--signals-to-handle=SIGKILL", "train.py"], "SIGKILL"),
    (["--logs-specs=pigeon", "train.py"], "--logs-specs='pigeon'"),
    (["--start-method=thread", "train.py"], "'thread'"),
    (["--numa-binding=moon", "train.py"], "'moon'"),
    (["--bogus", "train.py"], "--bogus"),
    (["--nnodes=2", "--node-rank=2", "--master-port=1", "train.py"], "--node-rank=2"),
    ([], "training_script"),
    (["--standalone", "--nnodes=2", "train.py"], "--nnodes='2' waits for other nodes"),
    (["--standalone", "--nnodes=2:3", "--rdzv-backend=c10d", "train.py"], "--nnodes='2:3' waits for other nodes"),
    (["--mo=3", "train.py"], "ambiguous option: --mo"),
    (["--bogus", "3", "train.py", "--mo", "4"], "unrecognized arguments: --bogus"),
]


@pytest.mark.parametrize(("line", "text"), USAGE, ids=[" ".join(line) for line, _ in USAGE])
def test_usage(place: Path, line: list[str], text: str) -> None:
    _assert_one_line(_ferrorun(place, *line), place, 2, text)


VARIABLES = [
    ("PET_MAX_RESTARTS", "x"),
    ("PET_MONITOR_INTERVAL", "soon"),
    ("PET_STANDALONE", "x"),
    ("PET_NNODES", "x"),
    ("PET_NPROC_PER_NODE", "x"),
    ("PET_START_METHOD", "thread"),
    ("PET_TEE", "x"),
    ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "soon"),
    ("LOGLEVEL", "loud"),
    ("PYTHON_EXEC", ""),
]


@pytest.mark.parametrize(("name", "value"), VARIABLES)
def test_variables(place: Path, name: str, value: str) -> None:
    _assert_one_line(_ferrorun(place, "train.py", **{name: value}), place, 2, name, f"'{value}'")


def test_a_log_folder_that_is_a_file(place: Path) -> None:
    _assert_one_line(_ferrorun(place, "--log-dir=plain.txt", "train.py"), place, 1, "--log-dir='plain.txt'")
    _assert_one_line(_ferrorun(place, "--log-dir=plain.txt/logs", "train.py"), place, 1, "--log-dir='plain.txt/logs'")


def test_a_log_folder_that_cannot_be_made(place: Path) -> None:
    _assert_one_line(_ferrorun(place, "--log-dir=/proc/logs", "train.py"), place, 1, "--log-dir='/proc/logs'")


def test_a_log_folder_that_cannot_be_written(place: Path) -> None:
    # Even the superuser cannot make a folder there.
    _assert_one_line(_ferrorun(place, "--log-dir=/proc/self", "train.py"), place, 1, "--log-dir='/proc/self'")


def test_the_reason_for_a_log_folder_is_given_once_and_paths_as_they_are(place: Path) -> None:
    (place / "Some Folder").touch()
    folder = f"{place}/Some Folder/Logs"
    done = _ferrorun(place, f"--log-dir={folder}", "train.py")
    _assert_one_line(
        done, place, 1, f"log folder --log-dir={folder!r} cannot be written: not a directory; give another"
    )
    assert done.stderr.count("Some Folder") == 1
    assert done.stderr.lower().count("not a directory") == 1


@pytest.mark.parametrize("line", [["train.py"], ["-m", "gone_module"], ["--log-dir=Logs", "{script}"]])
def test_a_working_directory_that_was_deleted(place: Path, line: list[str]) -> None:
    gone = place / "Gone"
    gone.mkdir()
    words = " ".join(word.format(script=place / "train.py") for word in line)
    done = subprocess.run(
        ["/bin/sh", "-c", f'cd "{gone}" && rmdir "{gone}" && exec "{sys.executable}" -m ferroelastic.run {words}'],
        env={**os.environ, "PYTHONPATH": FOLDER},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    _assert_one_line(
        done, place, done.returncode, f"the working directory '{gone}' was deleted; change to an existing directory"
    )
    assert done.returncode in (1, 2)


@pytest.mark.parametrize("level", ["debug", "Info", "10"])
def test_a_log_level_in_any_form(place: Path, level: str) -> None:
    done = _ferrorun(place, "--standalone", "train.py", LOGLEVEL=level)
    assert done.returncode == 0, done.stderr
    assert (place / "started").exists()
    (place / "started").unlink()
    done = _ferrorun(place, "gone.py", LOGLEVEL=level)
    _assert_one_line(done, place, 2, "'gone.py'")


@pytest.mark.parametrize("backend", ["etcd", "etcd-v2"])
@needs_torch
@pytest.mark.skipif(find_spec("etcd") is not None, reason="python-etcd is installed")
def test_etcd_without_its_client(place: Path, backend: str) -> None:
    done = _ferrorun(place, f"--rdzv-backend={backend}", "--rdzv-endpoint=127.0.0.1:1", "train.py")
    _assert_one_line(done, place, 1, f"{backend!r}", "pip install python-etcd", "v2 API")
    assert "LOGLEVEL" not in done.stderr


@needs_torch
def test_a_program_without_permission(place: Path) -> None:
    done = _ferrorun(place, "--no-python", "./plain.txt")
    _assert_one_line(done, place, 1, "./plain.txt", "chmod +x")


@needs_torch
def test_a_script_without_an_interpreter_line(place: Path) -> None:
    done = _ferrorun(place, "--no-python", "./no_interpreter.sh")
    _assert_one_line(done, place, 1, "./no_interpreter.sh", "#!/bin/sh")


@needs_torch
def test_an_interpreter_that_is_not_there(place: Path) -> None:
    _assert_one_line(_ferrorun(place, "train.py", PYTHON_EXEC="/gone/python"), place, 1, "/gone/python", "PYTHON_EXEC")


@needs_torch
def test_a_port_in_use(place: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]

        done = _ferrorun(place, f"--master-port={port}", "train.py")

    _assert_one_line(done, place, 1, f"port {port} is in use by pid {os.getpid()} (", "--master-port")


def test_the_console_of_a_usage_error_stays_light(place: Path) -> None:
    script = (
        "import sys\nfrom ferroelastic import run\ncode = run.cli(['gone.py'])\n"
        "print(code, sorted({'torch', 'psutil', 'multiprocessing', 'ferroelastic._rust'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=place,
        env={"PYTHONPATH": FOLDER},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == "2 []"
