"""The options for lines of workers, before any worker starts."""

from __future__ import annotations

import json
import logging
import socket
from typing import TYPE_CHECKING

import pytest

from ferroelastic._json_log import JsonFormatter
from ferroelastic._usage import UsageError
from ferroelastic._usage_logs import parse_log_options, with_files
from ferroelastic.agent.server._environment import checked_template
from ferroelastic.multiprocessing import Std
from ferroelastic.multiprocessing._line_heads import json_heads, prefix_of, unknown_macros, with_pids
from ferroelastic.multiprocessing._log_options import LogOptions
from ferroelastic.run import parse_args

if TYPE_CHECKING:
    from collections.abc import Sequence

pytest.importorskip("ferroelastic._rust")


def options_of(*line: str) -> LogOptions | None:
    return parse_log_options(parse_args([*line, "train.py"]))


def test_without_options_there_are_none() -> None:
    assert options_of("--tee=3") is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [("0", [0]), ("0,8-10", [0, 8, 9, 10]), ("1 - 2, 11", [1, 2, 11]), ("3,3-3", [3])],
)
def test_global_ranks_are_a_list_of_ranks_and_ranges(text: str, shown: list[int]) -> None:
    options = options_of(f"--ranks-filter={text}")
    assert options is not None
    assert [rank for rank in range(12) if options.shows(rank)] == shown


def test_a_large_range_costs_nothing() -> None:
    options = options_of("--ranks-filter=5-1000000000000")
    assert options is not None
    assert options.shows(10**12)
    assert not options.shows(4)


@pytest.mark.parametrize("text", ["a", "1,", "3-1", "-1", "1-", "1-2-3", "1;2", "0x1"])
def test_an_invalid_list_of_ranks_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--ranks-filter=.* is neither a rank nor a range of ranks; write e.g. "):
        options_of(f"--ranks-filter={text}")


def test_the_reason_begins_after_the_last_equals_sign() -> None:
    options = options_of("--fail-on-log", "loss=nan= the loss is NaN", "--fail-on-log=a=b", "--warn-on-log", "^x$=y")
    assert options is not None
    assert options.fail_on == (("loss=nan", "the loss is NaN"), ("a", "b"))
    assert options.warn_on == (("^x$", "y"),)


def test_the_variable_has_one_rule_per_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_FAIL_ON_LOG", "a=b\nc=d")
    options = options_of()
    assert options is not None
    assert options.fail_on == (("a", "b"), ("c", "d"))
    options = options_of("--fail-on-log=e=f")
    assert options is not None
    assert options.fail_on == (("e", "f"),)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("nan", "has no pattern or no reason"),
        ("nan=", "has no pattern or no reason"),
        ("=reason", "has no pattern or no reason"),
        ("a=b\tc", "has a control character"),
        ("loss=(nan=reason", "the pattern is invalid at character 6: unclosed group"),
        (".*=reason", "the pattern matches every line"),
        (r"\Anan=reason", r"the pattern contains \\A or \\z"),
        (r"(a)\1=reason", "the pattern is invalid at character 4"),
    ],
)
def test_an_invalid_rule_is_refused(text: str, fault: str) -> None:
    for option in ("--fail-on-log", "--warn-on-log"):
        with pytest.raises(UsageError, match=f"^{option}=.*{fault}"):
            options_of("--warn-on-log=fine=reason", f"{option}={text}")


def test_a_program_gets_an_exception_for_an_invalid_value() -> None:
    with pytest.raises(ValueError, match="format='xml' is not a format of log lines; use one of text, json"):
        LogOptions(format="xml")
    with pytest.raises(ValueError, match="unclosed group"):
        LogOptions(warn_on=[("(", "reason")])


def masks(options: LogOptions | None, redirects: Std | dict[int, Std], tee: Std | dict[int, Std]) -> Sequence[int]:
    teed = with_files(options, redirects, tee, Std, 2)
    return [int(teed[rank]) for rank in range(2)] if isinstance(teed, dict) else [int(teed)]


def test_streams_of_the_console_are_teed_if_the_options_need_files() -> None:
    rules, ranks = LogOptions(fail_on=[("nan", "bad")]), LogOptions(ranks=(range(1),))
    assert masks(rules, Std.NONE, Std.NONE) == [3, 3]
    assert masks(LogOptions(format="json"), {0: Std.ALL, 1: Std.ERR}, {0: Std.OUT}) == [1, 1]
    assert masks(ranks, Std.NONE, Std.OUT) == masks(None, Std.NONE, Std.OUT) == [1]


def test_macros_of_a_prefix() -> None:
    template = "${time} $hostname $$ ${role_name} ${rank}/${local_rank} ${pid} ${round} ${other}"
    prefix = prefix_of(template, "trainer", 12, 3, 1)
    assert prefix == f"${{time}} {socket.gethostname()} $ trainer 12/3 ${{pid}} 1 ${{other}}"
    assert with_pids({3: prefix}, {3: 77})[3] == prefix.replace("${pid}", "77")


def test_unknown_macros_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert unknown_macros("${rank} $time $$ [${rnk}] $ls ${ ") == ["${rnk}", "$ls", "${ "]
    with caplog.at_level(logging.WARNING):
        assert checked_template("${rank}") == "${rank}"
        assert not caplog.records
        assert checked_template("${rnk}:") == "${rnk}:"
    assert "unknown macros, which stay unchanged: ${rnk}; the macros are ${role_name}, ${rank}, " in caplog.text


def test_a_line_of_a_worker_is_the_last_string_of_an_object() -> None:
    heads = json_heads("stderr", {0: {"RANK": "12", "TORCHELASTIC_RESTART_COUNT": "2"}, 1: {}})
    first, second = (json.loads(head + 'text"}') for head in heads.values())
    assert list(first) == ["time", "rank", "local_rank", "host", "stream", "round", "message"]
    assert (first["rank"], first["local_rank"], first["stream"], first["round"]) == (12, 0, "stderr", 2)
    assert (second["rank"], second["local_rank"], second["round"], second["message"]) == (1, 1, 0, "text")


def test_a_record_of_the_launcher_is_one_object() -> None:
    record = logging.LogRecord("ferroelastic", logging.ERROR, "", 1, "failed: %s\n%s", ("a", '"b"'), None)
    record.created = 1_700_000_000.0625
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["time"], found["level"], found["rank"]) == ("2023-11-14T22:13:20.062Z", "ERROR", None)
    assert (found["stream"], found["message"]) == ("ferrorun", 'failed: a\n"b"')
