"""The judge of reports accepts a cause only where it is."""

from __future__ import annotations

import pytest
from tests.support.failing import CASES, Cause
from tests.support.judge import judge, mismatches, report_of, reports_of

CAUSE = Cause("exit", 1, 3, texts=("no data",))
REPORT = """\
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 10)  (SIGTERM)
  traceback : no data
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : 3 (pid: 11)
  traceback : {text}
============================================================
"""
BOX = """\
============================================================
train.py FAILED: rank 1 exited with code 3
------------------------------------------------------------
  rank      : 1 (local_rank: 1, node_rank: 0)
  exit code : 3
  exception : ValueError: no data
============================================================
"""


def test_a_report_with_all_of_the_cause_is_right() -> None:
    report = REPORT.format(text="ValueError: no data")
    assert judge(CAUSE, report, report) == (True, True, True)
    assert judge(CAUSE, BOX, BOX) == (True, True, True)


def test_text_about_another_rank_does_not_count() -> None:
    report = REPORT.format(text="see the documentation")
    assert judge(CAUSE, report, report) == (False, True, True)


def test_text_outside_of_the_report_is_in_the_whole_output() -> None:
    report = BOX.replace("ValueError: no data", "none")
    assert judge(CAUSE, report, f"ValueError: no data\n{report}") == (False, True, True)


def test_another_rank_is_wrong() -> None:
    assert judge(CAUSE, BOX.replace("rank 1", "rank 0").replace(": 1", ": 0"), "") == (False, False, False)


def test_another_exit_code_is_wrong() -> None:
    assert not judge(CAUSE, BOX.replace("3", "30"), BOX).exit


def test_nothing_is_right_without_a_report() -> None:
    assert judge(CAUSE, "ValueError: no data\n", "[rank1]: ValueError: no data\n") == (False, True, False)


def test_the_last_report_counts() -> None:
    console = f"WARNING: x\n{REPORT}bye\n{BOX}"
    assert reports_of(console) == [REPORT.rstrip(), BOX.rstrip()]
    assert report_of(console) == BOX.rstrip()


def test_differences_of_the_json_are_named() -> None:
    first = {"kind": "exit", "rank": 1, "exit_code": 3, "signal": None, "sender": None, "exception": None}
    failure = {"first": {**first, "stderr": ["no data"]}, "advice": None}
    assert mismatches(failure, CAUSE) == []
    failure["first"] = {**first, "rank": 0, "stderr": []}
    assert mismatches(failure, CAUSE) == ["rank is 0, not (1,)", "nothing matches 'no data'"]


@pytest.mark.parametrize("name", CASES)
def test_the_name_of_a_script_is_no_cause(name: str) -> None:
    cause = CASES[name].cause
    console = f"{'=' * 20}\n/train/{CASES[name].script} FAILED\n  rank      : {cause.rank or 0}\n{'=' * 20}\n"
    assert not judge(cause, console, console).report


def test_there_are_twenty_causes() -> None:
    assert len(CASES) == 20
