"""Runs the tests that use torch on another version of torch.

    python tests/torch_version.py 2.15 [PYTEST_OPTION ...]

The version has an environment of its own, ``target/torch-2.15``, which is made once. The package is the editable one of the running environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = ("numpy", "prometheus-client", "psutil", "pytest", "pyyaml")


def environment(version: str) -> Path:
    """Return the interpreter of a version's environment. Make the environment if it is missing or incomplete."""
    folder = ROOT / "target" / f"torch-{version}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # A plain version also matches a local one, such as that of a wheel for CPUs.
        packages = [f"torch=={version}.*", *TOOLS]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", *packages], check=True)
        site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        # The editable installation of the running environment: the path of the package, and its metadata.
        for path in Path(sysconfig.get_path("purelib")).glob("ferroelastic*"):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, Path(site, path.name))
        complete.touch()
    return python


def tests() -> list[Path]:
    """Return the conformance suite, and the other tests that compare with torch."""
    others = [
        path for folder in ("unit", "integration") for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))
    ]
    return [ROOT / "tests" / "conformance", *(path for path in others if 'importorskip("torch' in path.read_text())]


def main() -> None:
    """Replace this process by pytest."""
    version, *options = sys.argv[1:]
    command = [str(environment(version)), "-m", "pytest", *(options or ["-q"])]
    if not any(option.startswith("tests/") for option in options):
        command += map(str, tests())
    os.chdir(ROOT)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
