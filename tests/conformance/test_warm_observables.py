"""A worker of ``ferrorun``, cold or warm, sees and does the same as a fresh ``python script.py``.

``observables.py`` writes everything that it can see of itself. ``DIFFERENCES`` lists all intended differences.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tests.conformance.endings import ENDINGS
from tests.support.harness import FERRORUN, ROOT
from tests.support.waiting import LONG_S

if TYPE_CHECKING:
    from collections.abc import Sequence

_HERE = Path(__file__).parent
_SCRIPT = [str(_HERE / "observables.py")]
_MODULE = ["-m", "tests.conformance.observables"]
_SURROUNDINGS = ["sh", "-c", 'umask 27; ulimit -n 600; ulimit -s 4096; exec nice -n 3 taskset -c 0 "$@"', "sh"]
"""Runs a command with attributes that processes inherit."""
_ARGUMENTS = ["", "ä b", "--max-restarts=1", "-m", os.fsdecode(b"\xff")]
_LIGHT = "colorsys"
"""A module that imports no other one."""
_WARNING = re.compile(rb"WARNING: .*(warm|zygote)")
_needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")


class Difference(NamedTuple):
    """One intended difference from a fresh ``python script.py``."""

    starts: frozenset[str]
    """The starts that differ."""
    why: str
    """Reason for the difference."""


_ALL = frozenset({"cold", "warm", "preload"})
_WARM = frozenset({"warm", "preload"})

DIFFERENCES: dict[str, Difference] = {
    "process.parent": Difference(_ALL, "the agent has started the worker, not a shell"),
    "process.prctl.death signal": Difference(_ALL, "a worker does not outlive its agent"),
    "descriptors.2": Difference(
        _ALL, "the agent keeps the last lines of standard error, through a pipe in packet mode"
    ),
    "process.proc.cgroup": Difference(
        _ALL, "the agent counts the resources of the workers, where it may create a cgroup"
    ),
    "interpreter.hash seed": Difference(
        _ALL, "without PYTHONHASHSEED each interpreter chooses one; the warm workers of a node share their zygote's"
    ),
    "environment.is in the area": Difference(
        _WARM, "the process was started with a shorter command line; setproctitle does not find it and has no effect"
    ),
    "interpreter.gc.frozen": Difference(
        _WARM, "the collector leaves the objects of the imports alone, whose memory the workers share"
    ),
    "interpreter.attributes": Difference(_WARM, "sys._ferroelastic_warm is for ferroelastic.warm"),
    "main_module.modules": Difference(_WARM, "the warm imports are loaded before the script runs"),
    "process.had children": Difference(
        _WARM, "processes that the imports start, such as ldconfig of torch 2.15, are children of the zygote"
    ),
    "process.mapped": Difference(_WARM, "the native module of the zygote stays mapped"),
}
_SOMETIMES = {
    "process.parent",  # the name of the test's own process, which an agent in it may have renamed
    "process.proc.cgroup",  # the agent may create a cgroup
    "process.had children",  # imports that start processes
    "interpreter.gc.frozen",  # CPython 3.12 freezes objects of its own
}


_OF_EACH = {"randomness"}
"""Results that other tests compare."""

_OF_ATTEMPT = {"FERROELASTIC_STOP_FILE", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RESTART_COUNT"}
"""Environment variables that differ between the attempts of a worker."""
_OF_JOB = _OF_ATTEMPT | {"FERROELASTIC_RUN", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID"}


def _run(command: Sequence[str], cwd: Path, env: dict[str, str], **streams: Any) -> subprocess.CompletedProcess[bytes]:
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options |= {"check": False, "timeout": LONG_S, "start_new_session": True} | streams
    return subprocess.run(command, cwd=cwd, env=env, **options)  # noqa: PLW1510 - above


def _environment() -> dict[str, str]:
    """Return the environment of the jobs."""
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    removed = ("PET_", "TORCHELASTIC_", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    odd = {"ODD_LINES": "a\nb=c", "ODD_BYTES": os.fsdecode(b"\xff"), "ODD_EMPTY": ""}
    return kept | odd | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


class Observed(NamedTuple):
    """The results of one script. Each start is that of rank 0."""

    fresh: dict[str, Any]
    """``python -u script.py``."""
    cold: dict[str, Any]
    """The first attempt of a job."""
    warm: dict[str, Any]
    """The second attempt of the same job."""
    preload: dict[str, Any]
    """The first attempt of a job with ``--preload``."""
    rank1: dict[str, Any]
    """Rank 1 beside ``warm``."""

    def differences(self, start: str) -> dict[str, tuple[Any, Any]]:
        """Return the names whose values differ from those of the fresh process, with both values."""
        of_start = getattr(self, start)
        names = self.fresh.keys() | of_start.keys()
        pairs = {name: (self.fresh.get(name), of_start.get(name)) for name in sorted(names)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(((), _SCRIPT, _LIGHT), id="script"),
        pytest.param(((), _MODULE, _LIGHT), id="module"),
        pytest.param((_SURROUNDINGS, _SCRIPT, _LIGHT), id="surroundings"),
        pytest.param(((), _SCRIPT, "torch"), id="torch", marks=_needs_torch),
    ],
)
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    wrapper, command, module = request.param
    folder = tmp_path_factory.mktemp("observed")
    results = folder / "results"

    def observe(start: Sequence[str], env: dict[str, str]) -> dict[str, Any]:
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
        ended = _run([*wrapper, *start, *command, str(results), module], folder, env)
        assert ended.returncode == 0, ended.stderr.decode()
        assert not _WARNING.search(ended.stderr), ended.stderr.decode()
        return {file.stem: json.loads(file.read_text()) for file in results.glob("*.json")}

    job = (*FERRORUN, "--nproc-per-node=2", f"--warm-imports={module}")
    restarted = observe((*job, "--max-restarts=1", "--warm-workers"), _environment())
    preloaded = observe((*job, "--preload"), _environment())
    variables = restarted["0-0"]["environment.variables"] | {"TORCHELASTIC_MAX_RESTARTS": "0"}
    fresh = observe((sys.executable, "-u"), variables)
    seen = Observed(fresh["0-0"], restarted["0-0"], restarted["0-1"], preloaded["0-0"], restarted["1-1"])
    for one, excluded in ((seen.cold, {"TORCHELASTIC_MAX_RESTARTS"}), (seen.warm, _OF_JOB), (seen.preload, _OF_JOB)):
        own = one.pop("environment.variables")
        assert {name for name in variables | own if variables.get(name) != own.get(name)} <= excluded
    del seen.fresh["environment.variables"]
    return seen


def _has_equal_ignored_signals(pair: tuple[Any, Any] | None) -> bool:
    """Whether two masks differ only in the signals that the C library reserves. A fresh process may inherit them as ignored."""
    if pair is None:
        return False
    (fresh,), (of_start,) = pair
    reserved = 0b11 << 31  # signals 32 and 33
    return (int(fresh, 16) ^ int(of_start, 16)) & ~reserved == 0


@pytest.mark.parametrize("start", sorted(_ALL))
def test_a_worker_sees_what_a_fresh_process_sees(observed: Observed, start: str) -> None:
    found = {name: pair for name, pair in observed.differences(start).items() if name not in _OF_EACH}
    if _has_equal_ignored_signals(found.get("process.status.SigIgn")):
        del found["process.status.SigIgn"]
    listed = {name for name, difference in DIFFERENCES.items() if start in difference.starts}
    assert {name: pair for name, pair in found.items() if name not in listed} == {}
    assert listed - found.keys() <= _SOMETIMES


@pytest.mark.parametrize("start", sorted(_WARM))
def test_a_warm_worker_has_the_imported_modules_and_no_other(observed: Observed, start: str) -> None:
    seen = getattr(observed, start)
    assert seen["main_module.modules"] == observed.fresh["main_module.modules after imports"]
    mapped = set(seen["process.mapped"]) - set(observed.fresh["process.mapped"])
    assert {name.partition(".")[0] for name in mapped} <= {"_rust", "libgcc_s"}


def test_warm_workers_share_the_hash_seed_and_no_other_secret(observed: Observed) -> None:
    drawn = [
        seen["randomness"] for seen in (observed.fresh, observed.cold, observed.warm, observed.preload, observed.rank1)
    ]
    for name in drawn[0]:
        assert len({each[name] for each in drawn}) == len(drawn), name
    assert observed.warm["interpreter.hash seed"] == observed.rank1["interpreter.hash seed"]


def test_workers_have_children_of_multiprocessing(observed: Observed) -> None:
    for method in ("fork", "spawn", "forkserver"):
        assert [seen["multiprocessing"][method] for seen in observed] == [[42]] * len(observed)


# ---- output, exit codes and the texts of errors


class Ended(NamedTuple):
    """How a process has ended."""

    code: int
    stdout: str
    stderr: str


_ENDINGS = str(_HERE / "endings.py")
_INPUT = b"first\r\nsecond\nthird\rfourth"
_INPUTS = {"debugger": b"next\nprint(1)\ncontinue\n"}
_BUFFERED = [
    "order",
    "unflushed",
    "unflushed-os-exit",
    "unflushed-fork",
    "much",
    "odd-text",
    "read",
    "debugger",
    "error",
]


def _end_fresh(command: Sequence[str], folder: Path, stdin: bytes = _INPUT) -> Ended:
    out, err = folder / "stdout.log", folder / "stderr.log"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        ended = _end([sys.executable, *command], folder, stdin, stdout=stdout, stderr=stderr)
    code = ended.returncode if ended.returncode >= 0 else 128 - ended.returncode
    return Ended(code, _read(out), _read(err))


def _end_warm(options: Sequence[str], folder: Path, stdin: bytes = _INPUT) -> Ended:
    """Run a job with one worker, whose exit code is that of the job."""
    logs = folder / "logs"
    job = (*FERRORUN, "--preload", f"--log-dir={logs}", "--redirects=3", *options)
    ended = _end(job, folder, stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert not _WARNING.search(ended.stderr), ended.stderr.decode()
    (out,), (err,) = logs.glob("*_*/*/0/stdout.log"), logs.glob("*_*/*/0/stderr.log")
    return Ended(ended.returncode, _read(out), _read(err))


def _end(command: Sequence[str], folder: Path, stdin: bytes, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    reader, writer = os.pipe()
    with open(reader, "rb") as stream, open(writer, "wb") as end:
        end.write(stdin)
        end.close()
        return _run(command, folder, _environment(), stdin=stream, **streams)


def _read(file: Path) -> str:
    return re.sub(r"0x[0-9a-f]{8,}", "ADDRESS", file.read_bytes().decode(errors="surrogateescape"))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_warm_worker_ends_as_a_fresh_process(ending: str, tmp_path: Path) -> None:
    stdin = _INPUTS.get(ending, _INPUT)
    fresh = _end_fresh(("-u", _ENDINGS, ending, *_ARGUMENTS), tmp_path, stdin)
    assert _end_warm((f"--warm-imports={_LIGHT}", _ENDINGS, ending, *_ARGUMENTS), tmp_path, stdin) == fresh


@pytest.mark.parametrize("ending", _BUFFERED)
def test_buffered_output_of_a_warm_worker_is_that_of_a_fresh_process(ending: str, tmp_path: Path) -> None:
    stdin = _INPUTS.get(ending, _INPUT)
    fresh = _end_fresh((_ENDINGS, ending), tmp_path, stdin)
    options = (f"--warm-imports={_LIGHT}", "--no-python", sys.executable, _ENDINGS, ending)
    assert _end_warm(options, tmp_path, stdin) == fresh


@pytest.mark.parametrize("options", [[], ["-O", "-W", "error::UserWarning"], ["-X", "dev"], ["-B", "-Xutf8"], ["-P"]])
def test_a_warm_worker_has_the_options_of_its_interpreter(options: list[str], tmp_path: Path) -> None:
    if "-P" in options and sys.version_info < (3, 11):
        pytest.skip("CPython 3.10 has no option -P")
    for ending in ("warning", "subprocess", "stack"):
        fresh = _end_fresh((*options, _ENDINGS, ending), tmp_path)
        job = (f"--warm-imports={_LIGHT}", "--no-python", sys.executable, *options, _ENDINGS, ending)
        assert _end_warm(job, tmp_path) == fresh
        shutil.rmtree(tmp_path / "logs")


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_the_streams_of_a_warm_worker_at_a_terminal(options: list[str], tmp_path: Path) -> None:
    seen = {}
    command = [sys.executable, *options, *_SCRIPT, str(tmp_path)]
    for start in ((), (*FERRORUN, "--preload", f"--warm-imports={_LIGHT}", "--no-python")):
        controller, terminal = os.openpty()
        env = _environment() | {"RANK": "0", "WORLD_SIZE": "1"} | dict.fromkeys(_OF_JOB, "0")
        with open(controller, "rb"), open(terminal, "wb") as stream:
            ended = _run([*start, *command], tmp_path, env, stdin=stream, stdout=stream, stderr=stream)
        assert ended.returncode == 0
        (result,) = tmp_path.glob("*.json")
        seen[start] = {name: value for name, value in json.loads(result.read_text()).items() if "streams." in name}
        result.unlink()
    fresh, warm = seen.values()
    assert fresh["streams.stdout.isatty"]
    assert fresh["streams.stdout.line_buffering"] == str(not options)
    assert warm == fresh


def test_the_output_of_a_warm_import_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "talks.py").write_text("print('imported')\n")
    script = tmp_path / "train.py"
    script.write_text("import talks\nprint('script')\n")
    fresh = _end_fresh((str(script),), tmp_path)
    assert fresh.stdout == "imported\nscript\n"
    warm = _end_warm(("--warm-imports=talks", "--no-python", sys.executable, str(script)), tmp_path)
    assert warm == fresh._replace(stdout="script\n")


def test_streams_that_an_import_keeps_or_wraps_reach_the_worker(tmp_path: Path) -> None:
    text = """
        import io, logging, sys
        logging.basicConfig(format="%(message)s")
        kept = sys.stdout
        class Upper(io.TextIOBase):
            def write(self, text):
                return kept.write(text.upper())
        sys.stdout = Upper()
    """
    (tmp_path / "wraps.py").write_text(textwrap.dedent(text))
    script = tmp_path / "train.py"
    script.write_text("import sys, wraps\nprint('out', wraps.kept is sys.__stdout__)\nwraps.logging.error('log')\n")
    for options in ([], ["-u"]):
        fresh = _end_fresh((*options, str(script)), tmp_path)
        assert (fresh.stdout, fresh.stderr) == ("OUT TRUE\n", "log\n")
        warm = _end_warm(("--warm-imports=wraps", "--no-python", sys.executable, *options, str(script)), tmp_path)
        assert warm == fresh
        shutil.rmtree(tmp_path / "logs")


def test_objects_that_the_script_keeps_in_a_warm_module_are_deleted_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "keeps.py").write_text("import os\nkept = []\n")
    text = """
        import keeps

        class Own:
            def __del__(self):
                print("deleted")

        keeps.kept += [open("data", "w"), Own()]
        keeps.kept[0].write("unwritten")
    """
    script, data = tmp_path / "train.py", tmp_path / "data"
    script.write_text(textwrap.dedent(text))
    fresh = _end_fresh(("-u", str(script)), tmp_path)
    assert (fresh.stdout, data.read_text()) == ("deleted\n", "unwritten")
    data.unlink()
    assert _end_warm(("--warm-imports=keeps", str(script)), tmp_path) == fresh
    assert data.read_text() == "unwritten"


def test_a_script_that_is_not_valid_python_is_reported_as_by_a_fresh_process(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print(1)\nif True\n    pass\n")
    fresh = _end_fresh(("-u", str(script)), tmp_path)
    assert "SyntaxError" in fresh.stderr
    assert _end_warm((f"--warm-imports={_LIGHT}", str(script)), tmp_path) == fresh


_REPLACED = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
from tests.conformance.observables import wait_for_parked
print(__file__, os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
wait_for_parked(1)
script = pathlib.Path(__file__)
{change}
sys.exit(1)
"""


@pytest.mark.parametrize("change", ["replaced", "rewritten", "deleted"])
def test_a_warm_worker_runs_the_current_file(change: str, tmp_path: Path) -> None:
    script, other = tmp_path / "train.py", tmp_path / "other.py"
    other.write_text("import sys\nprint('new', 'colorsys' in sys.modules)\n")
    changes = {
        "replaced": "script.with_name('other.py').rename(script)",
        "rewritten": "script.write_text(script.with_name('other.py').read_text())",
        "deleted": "script.unlink()",
    }
    script.write_text(_REPLACED.format(root=str(ROOT), change=changes[change]))
    command = (*FERRORUN, "--warm-workers", "--max-restarts=1", f"--warm-imports={_LIGHT}", str(script))
    job = _run(command, tmp_path, _environment())
    assert job.stdout.decode().splitlines()[0] == f"{script} 0"
    if change == "deleted":
        fresh = _end_fresh(("-u", str(script)), tmp_path)
        assert "No such file" in fresh.stderr
        assert fresh.stderr in job.stderr.decode()
        assert job.returncode == fresh.code
    else:
        assert job.stdout.decode().splitlines()[1:] == ["new True"]
        assert job.returncode == 0
