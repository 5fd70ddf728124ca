"""Installs one abi3 wheel in several CPythons and runs the tests that need no torch in each.

    python tests/wheel_matrix.py target/wheels/ferroelastic-*.whl [INTERPRETER ...]

Without interpreters it takes those of CPython 3.10 and later that are on PATH.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def works(interpreter: str) -> bool:
    """Whether it is there: a version manager's stub is on PATH for versions that are not."""
    return subprocess.run([interpreter, "-c", "import venv"], check=False, capture_output=True).returncode == 0


def run_tests(interpreter: str, wheel: Path) -> bool:
    """Whether the tests pass with the wheel installed in a fresh environment of the interpreter."""
    tests = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        python = str(Path(folder, "venv", "bin", "python"))
        subprocess.run([interpreter, "-m", "venv", str(Path(folder, "venv"))], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel), "pytest"], check=True)
        folders = [str(tests / name) for name in ("unit", "integration", "conformance")]
        command = [python, "-m", "pytest", "-q", *folders]
        return subprocess.run(command, check=False, cwd=tests.parent).returncode == 0


def main() -> int:
    wheel, *interpreters = sys.argv[1:]
    interpreters = interpreters or [f"python{version}" for version in VERSIONS]
    found = [interpreter for interpreter in interpreters if shutil.which(interpreter) and works(interpreter)]
    failed = []
    for interpreter in found:
        print(f"== {interpreter}", flush=True)
        if not run_tests(interpreter, Path(wheel).resolve()):
            failed.append(interpreter)
    print(f"wheel: {len(found) - len(failed)} passed, {len(failed)} failed {' '.join(failed)}")
    return 1 if failed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
