"""What tests of contexts look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def finished(context: Any) -> Any:
    result = context.wait(60, period=0.02)
    assert result is not None
    return result


def exit_codes(failures: dict[int, Any]) -> dict[int, int]:
    return {rank: failure.exitcode for rank, failure in failures.items()}


def content(path: str | Path) -> str:
    return Path(path).read_text()
