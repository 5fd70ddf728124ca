"""Installs one abi3 wheel in several CPythons and runs the tests that need no torch in each.

    python tests/wheel_matrix.py target/wheels/ferroelastic-*.whl [INTERPRETER ...]

Without interpreters it takes those of CPython 3.10 and later that are on PATH or that pyenv has. CPython 3.14 and 3.15 otherwise come from
Debian's unstable archive: root with debootstrap gets them once, in the folder target/sid, and the tests run there with chroot.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
FROM_DEBIAN = ("3.14", "3.15")

ROOT = Path(__file__).resolve().parent.parent
SID = ROOT / "target" / "sid"
TESTS = (
    "unit",
    "integration",
    "conformance",
    "faults/test_warm.py",
    "faults/test_warm_agent.py",
    "faults/test_warm_traps.py",
)
"""The tests of warm workers belong to them because a zygote depends on the insides of the interpreter."""

MIRROR = (
    "apt-get",
    "indextargets",
    "--format",
    "$(REPO_URI)",
    "Created-By: Packages",
    "Origin: Debian",
    "Label: Debian",
)
"""Prints the archives of Debian in the machine's own apt sources."""

# The mounts are in a namespace of their own and end with the command.
ENTER = """
for folder in /proc /sys /dev; do mount --rbind $folder "$0$folder"; done
for path in /etc/resolv.conf /etc/hosts /etc/ssl/certs "$1"; do mount --bind "$path" "$0$path"; done
exec chroot "$0" env --chdir="$1" "${@:2}"
"""


class UnavailableError(Exception):
    """CPython cannot be had from Debian. The text is the reason."""


def works(interpreter: str) -> bool:
    """Whether it is there: a version manager's stub is on PATH for versions that are not."""
    found = shutil.which(interpreter)
    if found is None:
        return False
    return subprocess.run([found, "-c", "import venv"], check=False, capture_output=True).returncode == 0


def find(version: str) -> str | None:
    """An interpreter of this version on the machine."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [f"python{version}", *map(str, pyenv.glob(f"{version}.*/bin/python{version}"))]
    return next(filter(works, candidates), None)


def get_sid() -> None:
    """Install Debian's interpreters in the folder ``SID``, if they are not there.

    Raises:
        UnavailableError: they cannot be installed.
    """
    if os.geteuid() != 0:
        raise UnavailableError("only root can install them in target/sid")
    for program in ("debootstrap", "unshare", "chroot"):
        if shutil.which(program) is None:
            raise UnavailableError(f"{program} is not installed")
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode != 0:
        raise UnavailableError("this root must not mount")
    if SID.exists():
        return
    mirrors = subprocess.run(MIRROR, check=False, capture_output=True, text=True).stdout.split()
    if not mirrors:
        raise UnavailableError(
            "the apt sources of this machine have no archive of Debian, or `apt-get update` has not run"
        )
    SID.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SID.parent) as folder:
        print("== installing CPython from Debian's unstable archive in target/sid", flush=True)
        packages = ["ca-certificates", *(f"python{version}-venv" for version in FROM_DEBIAN)]
        options = ["--variant=minbase", f"--include={','.join(packages)}"]
        # What it mounts ends with the namespace, also if it fails.
        command = ["unshare", "--mount", "debootstrap", *options, "sid", f"{folder}/sid", mirrors[0]]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise UnavailableError(f"debootstrap has failed: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        for file in ("resolv.conf", "hosts"):
            Path(folder, "sid", "etc", file).touch()
        Path(folder, "sid", *ROOT.parts[1:]).mkdir(parents=True)
        Path(folder, "sid").rename(SID)


def in_sid(*command: str) -> list[str]:
    """The command, run in Debian's folder, which has this repository at its usual path."""
    return ["unshare", "--mount", "bash", "-ec", ENTER, str(SID), str(ROOT), *command]


def on_machine(*command: str) -> list[str]:
    return list(command)


def run_tests(place: Callable[..., list[str]], interpreter: str, wheel: Path) -> tuple[bool, str]:
    """Whether the tests pass with the wheel in a fresh environment of the interpreter, and the last line of pytest."""
    with tempfile.TemporaryDirectory(dir=ROOT / "target") as folder:
        python = f"{folder}/bin/python"
        subprocess.run(place(interpreter, "-m", "venv", folder), check=True)
        subprocess.run(place(python, "-m", "pip", "install", "--quiet", str(wheel), "pytest"), check=True)
        tests = [f"tests/{name}" for name in TESTS]
        command = place(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
        env = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}  # the tests start `python3` too
        last = ""
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as running:
            for line in running.stdout or ():
                print(line, end="", flush=True)
                last = line.strip()
        return running.returncode == 0, last


def main() -> int:
    wheel, *interpreters = sys.argv[1:]
    (ROOT / "target").mkdir(exist_ok=True)
    chosen: list[tuple[Callable[..., list[str]], str]] = [(on_machine, name) for name in interpreters if works(name)]
    lines = []
    for version in () if interpreters else VERSIONS:
        found = find(version)
        if found is not None:
            chosen.append((on_machine, found))
        elif version in FROM_DEBIAN:
            try:
                get_sid()
                chosen.append((in_sid, f"python{version}"))
            except UnavailableError as error:
                lines.append(f"python{version}: not tested: it is not installed, and Debian's cannot be used: {error}")
        else:
            lines.append(f"python{version}: not tested: it is not installed")
    failed = 0
    for place, interpreter in chosen:
        print(f"== {interpreter}", flush=True)
        try:
            passed, line = run_tests(place, interpreter, Path(wheel).resolve())
        except subprocess.CalledProcessError as error:
            passed, line = False, f"cannot prepare the environment: {error}"
        lines.append(f"{interpreter}: {line}")
        failed += not passed
    print("\n".join(lines))
    print(f"wheel: {len(chosen) - failed} passed, {failed} failed")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
