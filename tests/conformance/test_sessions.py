"""Functions of interactive sessions, whose main module has no file."""

from __future__ import annotations

import os
import pickle
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from tests.conformance.implementations import Implementation

LINES = "def train(number):\n    return number\n"


def test_a_function_of_a_session(impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = types.ModuleType("__main__")
    exec(LINES, vars(session))
    monkeypatch.setitem(sys.modules, "__main__", session)

    def outcome(method: str) -> str:
        logs = impl.mp.DefaultLogsSpecs(str(tmp_path / method), impl.mp.Std.ALL)
        try:
            context = impl.mp.start_processes(
                "n", session.train, {0: (7,)}, {0: {}}, logs_specs=logs, start_method=method
            )
        except pickle.PicklingError as error:
            return "says what works" if "'fork'" in str(error) else str(error)
        result = context.wait()
        context.close()
        return "fails" if result.is_failed() else f"returns {result.return_values[0]}"

    former = os.dup(2)  # what multiprocessing says before there is a worker
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        spawned = outcome("spawn")
    finally:
        os.dup2(former, 2)
        os.close(former)
        os.close(null)
    assert spawned == impl.expect("functions-of-sessions", torch="fails", ours="says what works")
    assert outcome("fork") == "returns 7"
