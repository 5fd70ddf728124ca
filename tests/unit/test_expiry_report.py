"""What an agent says about a worker whose timer has expired, from files as they are found."""

from __future__ import annotations

import logging
import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ferroelastic.agent.server import _watchdog
from ferroelastic.multiprocessing.errors import ChildFailedError, ProcessFailure

if TYPE_CHECKING:
    from pathlib import Path

FAULTHANDLER = """\
Thread 0x00007f2 (most recent call first):
  File "{source}", line 1 in other

Current thread 0x00007f1 [python] (most recent call first):
  File "{source}", line 2 in hang
  File "<string>", line 7 in <module>

"""

PY_SPY = """\
Process 4711: python train.py
Python v3.11.7 (/usr/bin/python3.11)

Thread 4712 (idle): "Thread-1"
    wait (threading.py:327)
Thread 4711 (active): "MainThread"
    hang (train.py:26)
    <module> (train.py:42)
"""


def expiry(**fields: Any) -> Any:
    known = {
        "pid": 4711,
        "scope": "step",
        "expiration_time": 1700000000.25,
        "signal": signal.SIGKILL,
        "late_ns": 250_000,
        "outcome": "signalled",
        "evidence": [],
    }
    return SimpleNamespace(**{**known, **fields})


def explained(folder: Path, text: str | None) -> list[str]:
    if text is not None:
        (folder / "stacks.4711.txt").write_text(text)
    failure = ProcessFailure(0, 4711, -9, "")
    _watchdog.explain(failure, expiry(evidence=[str(folder / "evidence.txt"), str(folder / "stacks.4711.txt")]))
    return str(failure.message).splitlines()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text("first = 1\n    second = receive()  # here\n")
    return path


def test_the_dump_of_the_worker_is_shown_with_its_source(tmp_path: Path, source: Path) -> None:
    text = FAULTHANDLER.replace("{source}", str(source))
    lines = explained(tmp_path, text.replace("hang", "earlier") + text)  # the file grows with each expiry
    assert lines[2:] == [
        "stack (most recent call first):",
        f'  File "{source}", line 2 in hang',
        "    second = receive()  # here",
        '  File "<string>", line 7 in <module>',
        f"evidence  : {tmp_path} (evidence.txt, stacks.4711.txt)",
    ]


def test_where_the_main_thread_blocks_the_signal_another_is_shown(tmp_path: Path) -> None:
    lines = explained(tmp_path, 'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in a\n')
    assert lines[3] == '  File "a.py", line 1 in a'


def test_the_dump_of_py_spy(tmp_path: Path) -> None:
    assert explained(tmp_path, PY_SPY)[2:5] == [
        "stack (most recent call first):",
        "    hang (train.py:26)",
        "    <module> (train.py:42)",
    ]


@pytest.mark.parametrize("text", [None, "", "\0\xff garbage", "Current thread 0x1 (most recent call first):\n"])
def test_an_empty_dump(tmp_path: Path, text: str | None) -> None:
    assert len(explained(tmp_path, text)) == 3


def test_of_a_deep_stack_so_much_is_shown(tmp_path: Path) -> None:
    frames = "".join(f'  File "deep.py", line {number} in recurse\n' for number in range(100))
    lines = explained(tmp_path, f"Current thread 0x1 (most recent call first):\n{frames}")
    assert lines[2 + 20] == '  File "deep.py", line 19 in recurse'
    assert lines[2 + 21] == "  ... and 80 callers"
    assert len(lines) == 2 + 1 + 20 + 1 + 1


def test_evidence_of_other_ranks_is_pointed_to(tmp_path: Path) -> None:
    failure = ProcessFailure(0, 4711, -9, "")
    _watchdog.explain(failure, expiry(evidence=["/logs/0/evidence.txt", "/logs/1/evidence.txt"]))
    assert str(failure.message).splitlines()[-1] == (
        "evidence  : /logs/0 (evidence.txt); evidence of the other ranks is in the folders next to it"
    )


def test_the_cause() -> None:
    text = _watchdog.describe(expiry(), 4711)
    assert text.startswith("timer 'step' expired: deadline 2023-11-1")
    assert text.endswith(".250, noticed 0.2 ms late, sent SIGKILL")
    assert "of its child process 4711" in _watchdog.describe(expiry(), 1)
    assert "deadline nan" in _watchdog.describe(expiry(expiration_time=float("nan")), 4711)
    assert _watchdog.describe(expiry(signal=47), 4711).endswith("sent signal 47")


def test_the_final_report_has_it(tmp_path: Path, source: Path) -> None:
    failure = ProcessFailure(0, 4711, -9, "")
    (tmp_path / "stacks.4711.txt").write_text(FAULTHANDLER.replace("{source}", str(source)))
    _watchdog.explain(failure, expiry(evidence=[str(tmp_path / "stacks.4711.txt")]))
    report = ChildFailedError("train.py", {0: failure}).format_msg().splitlines()
    (cause,) = (number for number, line in enumerate(report) if line.startswith("  traceback : timer 'step' expired"))
    assert report[cause + 3 : cause + 5] == [f'    File "{source}", line 2 in hang', "      second = receive()  # here"]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [(None, 2), ("0", 0), ("0.5", 0.5), ("10", 10), ("-1", 2), ("inf", 2), ("nan", 2), ("two", 2), ("", 2)],
)
def test_how_long_evidence_may_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str | None, expected: float
) -> None:
    monkeypatch.delenv(_watchdog.EVIDENCE_S_ENV, raising=False)
    if variable is not None:
        monkeypatch.setenv(_watchdog.EVIDENCE_S_ENV, variable)
    assert _watchdog._evidence_s() == expected
    is_wrong = variable is not None and expected == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * is_wrong
