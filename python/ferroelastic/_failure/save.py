"""Writes the report of a failed job to the log folder."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ferroelastic._compat import newer
from ferroelastic._failure.model import to_json
from ferroelastic.utils import _threads

if TYPE_CHECKING:
    from ferroelastic._failure.model import Failure

__all__ = ["FILE", "report_of", "run_folder", "save"]

FILE = "failure.json"
_TIMEOUT_S = 1.0


def run_folder(logs_specs: object) -> str | None:
    """Return the log folder of the run; ``None`` if there is none.

    Args:
        logs_specs: destinations of the output, of this package's or of torch's class.
    """
    inner: Any = newer(logs_specs, "_specs", logs_specs)  # InteractiveLogsSpecs
    folder = newer(inner, "_run_log_dir", None)
    return folder if isinstance(folder, str) and folder else None


def report_of(failure: Failure) -> str | None:
    """Return the path of the report as JSON; ``None`` if it was not written."""
    path = None if failure.logs is None else os.path.join(failure.logs, FILE)
    return path if path is not None and os.path.exists(path) else None


def save(failure: Failure, folder: str | None) -> None:
    """Write ``failure.json``. Waits at most 1 s for the disk, and ignores errors: the report on the console has all facts.

    Args:
        failure: the failure.
        folder: log folder of the run; ``None`` writes nothing.
    """
    if folder is None:
        return
    writer = threading.Thread(target=_write, args=(to_json(failure), folder), name="ferro-report", daemon=True)
    _threads.start(writer)
    writer.join(_TIMEOUT_S)


def _write(text: str, folder: str) -> None:
    # Under another name first: a program that waits for the file never reads a part of it.
    path = os.path.join(folder, FILE)
    temporary = f"{path}.{os.getpid()}.tmp"
    with suppress(OSError):
        with open(temporary, "w") as file:
            file.write(text + "\n")
        os.replace(temporary, path)
