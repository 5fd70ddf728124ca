"""What the launcher imports, as the launcher itself has recorded it: no torch unless one of torch's rendezvous handlers is wanted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support.ports import free_port

import ferroelastic

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="its rendezvous handlers are torch's")

# In every interpreter that starts: the first finder is asked for each module, also for those that are not there. What site has
# imported before is none of ours.
RECORD = """
import os, sys

class Recorder:
    def __init__(self):
        # Numbers below 3 to 9 are for what the process itself opens.
        self.file = open(os.path.join(os.environ["IMPORTS"], str(os.getpid())), "a", buffering=1)

    def find_spec(self, name, path=None, target=None):
        print(name, file=self.file)

sys.meta_path.insert(0, Recorder())
"""

# It imports something heavy, which the recorder is to tell.
WORKER = """
import os, pickle
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    raise SystemExit(3)
"""

HEAVY = {
    *("asyncio", "cProfile", "concurrent", "ctypes", "curses", "decimal", "distutils", "email", "ensurepip"),
    *("fractions", "http", "importlib.metadata", "importlib.resources", "ipaddress", "logging.config"),
    *("logging.handlers", "multiprocessing", "numpy", "optparse", "pathlib", "pdb", "pickle", "pkg_resources"),
    *("pkgutil", "platform", "psutil", "pydoc", "setuptools", "sqlite3", "ssl", "statistics", "subprocess"),
    *("torch", "typing_extensions", "unittest", "urllib", "uuid", "xml", "zipfile"),
}
"""What no launch of a script has a use for."""
if sys.version_info >= (3, 15):
    HEAVY.remove("pathlib")  # `traceback` imports it, and `logging` imports `traceback`

NEEDED_LATER = {"ferroelastic._rust", "inspect", "json", "logging", "socket", "tempfile"}
"""What ``--help`` does without, besides."""
if sys.version_info[:2] == (3, 14):
    NEEDED_LATER.remove("inspect")  # `argparse` imports it for its colors


class Launched(NamedTuple):
    code: int
    errors: str
    launcher: set[str]
    """What the launcher has imported, or tried to."""
    others: set[str]
    """What the other interpreters have."""


class Place:
    """A folder to launch from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "site").mkdir()
        (folder / "imports").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(RECORD)
        (folder / "train.py").write_text(WORKER)

    def python(self, *line: str, **variables: str) -> Launched:
        of_others = ("PET_", "TORCHELASTIC_", "PYTHONPATH")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(of_others)}
        env = {
            **inherited,
            "IMPORTS": str(self.folder / "imports"),
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), str(Path(ferroelastic.__file__).parents[1])]),
            "TMPDIR": str(self.folder),
            **variables,
        }
        with subprocess.Popen(
            [sys.executable, *line],
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            _, errors = process.communicate(timeout=120)
        found = {int(path.name): set(path.read_text().split()) for path in (self.folder / "imports").iterdir()}
        launcher = found.pop(process.pid)
        return Launched(process.returncode, errors, launcher, set().union(*found.values()))

    def ferrorun(self, *line: str, **variables: str) -> Launched:
        return self.python("-m", "ferroelastic.run", *line, **variables)

    def plug_in(self) -> None:
        """Install a rendezvous handler of the name ``mine``, as torch knows them."""
        code = (
            "from torch.distributed.elastic.rendezvous import RendezvousConnectionError\n"
            "def create(params):\n    raise RendezvousConnectionError('the plug-in was asked')\n"
            "def handler():\n    return create\n"
        )
        (self.folder / "site" / "plugin_of_test.py").write_text(code)
        info = self.folder / "site" / "plugin_of_test-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-test\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[torchrun.handlers]\nmine = plugin_of_test:handler\n")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def heavy(modules: set[str], unwanted: set[str] = HEAVY) -> set[str]:
    """Those of ``modules`` that are, or belong to, something unwanted."""
    return {name for name in modules if any(f"{name}.".startswith(f"{one}.") for one in unwanted)}


SERVERS = {"TORCHELASTIC_HEALTH_CHECK_PORT": "0", "TORCHELASTIC_ENABLE_FILE_TIMER": "1"}
LAUNCHES = {
    "standalone": (["--standalone"], {}),
    "nothing given": ([], {}),
    "c10d": (["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=job"], {}),
    "static": (["--master-addr=127.0.0.1", "--master-port={port}"], {}),
    "static by endpoint": (["--rdzv-endpoint=127.0.0.1:{port}"], {}),
    "several workers": (["--standalone", "--nproc-per-node=2", "--tee=3"], {}),
    "health checks and watchdog": (["--standalone"], SERVERS),
}


@pytest.mark.parametrize(("options", "variables"), LAUNCHES.values(), ids=LAUNCHES)
def test_a_launch_of_a_script_and_its_restart_take_nothing_heavy(
    place: Place, options: list[str], variables: dict[str, str]
) -> None:
    line = [option.format(port=free_port()) for option in options]
    launched = place.ferrorun(*line, "--max-restarts=1", "train.py", **variables)
    assert launched.code == 0, launched.errors
    assert "ferroelastic.rendezvous._native" in launched.launcher
    assert heavy(launched.launcher) == set()
    assert "pickle" in launched.others


def test_a_failure_is_reported_without_torch(place: Place) -> None:
    launched = place.ferrorun("--standalone", "--max-restarts=0", "train.py")
    assert launched.code == 3, launched.errors
    assert heavy(launched.launcher, {"torch", "numpy"}) == set()


def test_help_takes_less(place: Place) -> None:
    launched = place.ferrorun("--help")
    assert launched.code == 0, launched.errors
    assert heavy(launched.launcher, HEAVY | NEEDED_LATER) == set()


@pytest.mark.parametrize("line", [["gone.py"], ["--tee=9", "train.py"], ["--rdzv-backend=gone", "train.py"]])
def test_usage_errors_take_no_torch(place: Place, line: list[str]) -> None:
    launched = place.ferrorun(*line)
    assert launched.code == 2, launched.errors
    assert heavy(launched.launcher, {"torch", "numpy", "psutil"}) == set()


@pytest.mark.parametrize(
    "module", ["ferroelastic.agent.server", "ferroelastic.rendezvous", "ferroelastic.launcher.api"]
)
def test_the_library_is_imported_without_torch(place: Place, module: str) -> None:
    launched = place.python("-c", f"import {module}")
    assert launched.code == 0, launched.errors
    assert module in launched.launcher
    assert heavy(launched.launcher) == set()


def test_a_launcher_that_is_ended_by_a_signal_has_loaded_no_torch(place: Place) -> None:
    (place.folder / "train.py").write_text(
        f"import os, signal\nos.kill(os.getppid(), {int(signal.SIGTERM)})\nsignal.pause()\n"
    )
    launched = place.ferrorun("--standalone", "train.py")
    assert launched.code == 128 + signal.SIGTERM, launched.errors
    assert heavy(launched.launcher, {"torch", "numpy"}) == set()


@needs_torch
class TestTorchsHandlers:
    def test_those_of_etcd(self, place: Place) -> None:
        launched = place.ferrorun("--rdzv-backend=etcd-v2", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "train.py")
        assert launched.code == 1, launched.errors
        assert "torch.distributed.elastic.rendezvous.registry" in launched.launcher
        assert "ferroelastic.rendezvous._native" not in launched.launcher
        assert not launched.others

    def test_those_of_a_plug_in(self, place: Place) -> None:
        place.plug_in()
        launched = place.ferrorun("--rdzv-backend=mine", "--rdzv-endpoint=127.0.0.1:1", "train.py")
        assert launched.code == 1, launched.errors
        assert "the plug-in was asked" in launched.errors
        assert {"torch.distributed", "plugin_of_test"} <= launched.launcher

    def test_a_plug_in_that_is_not_asked_for(self, place: Place) -> None:
        place.plug_in()
        launched = place.ferrorun("--standalone", "--max-restarts=1", "train.py")
        assert launched.code == 0, launched.errors
        assert heavy(launched.launcher, {"torch", "plugin_of_test"}) == set()
