"""The modules of torch that are mirrored."""

from __future__ import annotations

import fnmatch
import importlib.util
from pathlib import Path

from tests.conformance.differences import ABSENT
from tests.support import torch_versions

_TREES = ["distributed/elastic", "distributed/launcher", "numa"]
_FILES = ["distributed/run.py", "distributed/launch.py", "distributed/argparse_util.py"]


def _torch_root() -> Path:
    spec = importlib.util.find_spec("torch")  # does not import it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _paths() -> list[str]:
    """Path of every module of the mirrored trees, found as files, so that collecting tests imports nothing."""
    root = _torch_root()
    files = [root / file for file in _FILES] + [file for tree in _TREES for file in (root / tree).rglob("*.py")]
    paths = set()
    for file in files:
        parts = list(file.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts[0] == "distributed":
            parts.pop(0)
        if parts[0] == "elastic":
            parts.pop(0)
        paths.add(".".join(parts))
    return sorted(paths)


def is_absent_on_purpose(name: str) -> bool:
    patterns = [*ABSENT, *(torch_versions.REMOVED if torch_versions.is_older_than("2.13") else [])]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


PATHS = _paths()
MIRRORED = [path for path in PATHS if not is_absent_on_purpose(path)]
