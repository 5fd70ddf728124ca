"""``ferrorun`` that gets SIGINT before one instruction of its own code: ``python -m tests.faults.interrupting --rdzv-backend=alone ...``.

The instructions of the functions in ``$FUNCTIONS`` (names separated by commas) are counted from 1, from the start of the worker on. The
signal comes before number ``$INSTRUCTION``. ``$IS_BROKEN=1`` lets the agent's loop fail after the start of the worker. The worker makes
``$DIR/ready`` after it has blocked SIGINT.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults import alone
from tests.support.waiting import eventually

import ferroelastic
from ferroelastic.agent.server import LocalElasticAgent

if TYPE_CHECKING:
    from types import FrameType

_PACKAGE = str(Path(ferroelastic.__file__).parent)
_FUNCTIONS = os.environ["FUNCTIONS"].split(",")
_INSTRUCTION = int(os.environ["INSTRUCTION"])
_READY = Path(os.environ["DIR"], "ready")

_has_worker = False
_count = 0


def _trace_calls(frame: FrameType, _event: str, _arg: object) -> Any:
    if not frame.f_code.co_filename.startswith(_PACKAGE):
        return None
    if frame.f_code.co_name == "spawn":
        return _trace_spawn
    if frame.f_code.co_name in _FUNCTIONS:
        frame.f_trace_opcodes = True
        return _trace_instructions
    return None


def _trace_spawn(_frame: FrameType, event: str, _arg: object) -> Any:
    global _has_worker  # noqa: PLW0603 - a trace function has no other state
    _has_worker = _has_worker or event == "return"
    return _trace_spawn


def _trace_instructions(frame: FrameType, event: str, _arg: object) -> Any:
    global _count  # noqa: PLW0603 - a trace function has no other state
    if event == "opcode" and _has_worker:
        _count += 1
        if _count == _INSTRUCTION:
            sys.settrace(None)
            assert eventually(_READY.exists)
            Path(os.environ["DIR"], "place").write_text(f"{frame.f_code.co_name}, line {frame.f_lineno}")
            signal.raise_signal(signal.SIGINT)  # the handler runs here, and raises in the traced function
    return _trace_instructions


def _fail(_agent: LocalElasticAgent, _timeout_s: float) -> None:
    assert eventually(_READY.exists)
    raise RuntimeError("the agent's loop is broken")


if __name__ == "__main__":
    if os.environ.get("IS_BROKEN"):
        LocalElasticAgent._wait_for_event = _fail  # type: ignore[assignment, method-assign]
    sys.settrace(_trace_calls)
    sys.exit(alone.main())
