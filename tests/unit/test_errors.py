from __future__ import annotations

import copy
import json
import linecache
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from ferroelastic.multiprocessing.errors import (
    ChildFailedError,
    ErrorHandler,
    ProcessFailure,
    get_error_handler,
    record,
)
from ferroelastic.multiprocessing.errors._failures import failed_at_ns

if TYPE_CHECKING:
    from pathlib import Path

NS = 1_000_000_000
HINT = "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html"


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The error file of this process."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def failure(exitcode: int = 1, error_file: object = "none", **more: Any) -> ProcessFailure:
    return ProcessFailure(local_rank=0, pid=997, exitcode=exitcode, error_file=str(error_file), **more)


def exit_at(seconds: float) -> Any:
    return SimpleNamespace(realtime_ns=int(seconds * NS))


@record
def raise_it(error: BaseException) -> None:
    raise error


def test_an_exit_without_error_file_points_to_the_documentation() -> None:
    before = int(time.time())
    made = failure(exitcode=138)
    assert (made.message, made.error_file, made.signal_name()) == (HINT, "<N/A>", "<N/A>")
    assert made.error_file_data == {
        "message": "<NONE>",
        "errorTraits": {"category": "system_terminated_error", "retryability": "False"},
    }
    assert made.timestamp >= before


@pytest.mark.parametrize(("number", "name"), [(signal.SIGSEGV, "SIGSEGV"), (200, "<N/A>")])
def test_a_signal_is_named(number: int, name: str) -> None:
    made = failure(exitcode=-number)
    assert made.signal_name() == name
    assert made.message == f"Signal {number:d} ({name}) received by PID 997"


def test_failures_do_not_share_their_data() -> None:
    failure(exitcode=1)
    assert failure(exitcode=-9).error_file_data == {"message": "<NONE>"}


def test_a_recorded_exception_is_read_back(error_file: Path) -> None:
    with pytest.raises(KeyError):
        raise_it(KeyError("foobar"))
    data = json.loads(error_file.read_text())
    info = data["message"]["extraInfo"]
    assert data["message"]["message"] == "KeyError: 'foobar'"
    assert "in raise_it" in info["py_callstack"]
    assert info["timestamp"] == str(int(info["timestamp_ns"]) // NS)
    assert list(error_file.parent.iterdir()) == [error_file]

    made = failure(error_file=error_file)
    assert made.message == data["message"]
    assert made.error_file_data == data
    assert made.timestamp == int(info["timestamp"])


@pytest.mark.parametrize("stamp", [10, "10"])
def test_a_plain_message_is_read(tmp_path: Path, stamp: object) -> None:
    path = tmp_path / "error.json"
    path.write_text(json.dumps({"message": "text", "timestamp": stamp}))
    made = failure(error_file=path)
    assert (made.message, made.timestamp) == ("text", 10)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"message": {"mess', b"\xff\xfe", b"[]", b"3", b'{"unknown": 1}', b'{"message": null}', b"[" * 100_000],
)
@pytest.mark.parametrize(("exitcode", "cause"), [(-9, "Signal 9 (SIGKILL)"), (1, HINT)])
def test_a_damaged_error_file_is_reported_and_does_not_raise(
    tmp_path: Path, content: bytes, exitcode: int, cause: str
) -> None:
    path = tmp_path / "error.json"
    path.write_bytes(content)
    made = failure(exitcode, path)
    assert isinstance(made.message, str)
    assert made.message.startswith(cause)
    assert f"error file {path} is not usable" in made.message
    assert made.error_file == str(path)
    assert str(path) in str(ChildFailedError("train.py", {0: made}))


@pytest.mark.parametrize("extra", [{}, {"extraInfo": 3}, {"extraInfo": {"timestamp": "soon", "py_callstack": None}}])
def test_missing_details_of_a_message_do_not_raise(tmp_path: Path, extra: dict[str, Any]) -> None:
    path = tmp_path / "error.json"
    path.write_text(json.dumps({"message": {"message": "text", **extra}}))
    made = failure(error_file=path)
    assert abs(made.timestamp - time.time()) < 60
    assert "  traceback : text" in str(ChildFailedError("train.py", {0: made}))


def test_torchs_own_record_is_read(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "error.json"
    program = (
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main(): raise ValueError('from torch')\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    made = failure(error_file=path)
    assert isinstance(made.message, dict)
    assert made.message["message"] == "ValueError: from torch"
    assert "ValueError: from torch" in str(ChildFailedError("train.py", {0: made}))


def test_the_kernel_tells_which_failure_was_first() -> None:
    later, first = failure(exit=exit_at(100.2)), failure(exit=exit_at(100.1))
    assert (later.timestamp, first.timestamp) == (100, 100)
    assert ChildFailedError("train.py", {0: later, 1: first}).get_first_failure() == (1, first)


def test_without_the_kernel_whole_seconds_and_then_the_order_tell(tmp_path: Path) -> None:
    made = []
    for number, stamp in enumerate((11, 10, 10)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"message": "text", "timestamp": stamp}))
        made.append(failure(error_file=path))
    assert ChildFailedError("train.py", dict(enumerate(made))).get_first_failure() == (1, made[1])


@pytest.mark.parametrize(
    ("written", "first"),
    [
        ({"timestamp": "100", "timestamp_ns": str(100 * NS + 500_000_000)}, "slow to end"),
        ({"timestamp": "100", "timestamp_ns": str(100 * NS + 700_000_000)}, "killed"),
        # torch's error files give whole seconds: anything within that second may have been before or after.
        ({"timestamp": "100"}, "killed"),
        ({"timestamp": "99"}, "slow to end"),
    ],
)
def test_an_error_counts_from_when_it_was_written(tmp_path: Path, written: dict[str, str], first: str) -> None:
    path = tmp_path / "error.json"
    path.write_text(json.dumps({"message": {"message": "text", "extraInfo": written}}))
    failures = {0: failure(-11, exit=exit_at(100.6)), 1: failure(1, path, exit=exit_at(103))}
    rank, _ = ChildFailedError("train.py", failures).get_first_failure()
    assert ("killed", "slow to end")[rank] == first


def test_a_copy_or_pickle_keeps_the_order_without_the_native_object() -> None:
    made = failure(exit=exit_at(100.25))
    for again in (pickle.loads(pickle.dumps(made)), copy.copy(made), copy.deepcopy(made)):
        assert again == made
        assert again.exit is None
        assert failed_at_ns(again) == int(100.25 * NS)


def test_the_report_has_torchs_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferroelastic.multiprocessing.errors._failures.hostname_for_report", lambda: "node1")
    other, root = failure(1, exit=exit_at(200)), failure(-11, exit=exit_at(100))
    text = str(ChildFailedError("train.py", {3: other, 5: root}))
    stamp = r"\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d"
    expected = f"""
{"=" * 60}
train.py FAILED
{"-" * 60}
Failures:
[0]:
  time      : {stamp}
  host      : node1
  rank      : 3 (local_rank: 0)
  exitcode  : 1 (pid: 997)
  error_file: <N/A>
  traceback : {HINT}
{"-" * 60}
Root Cause (first observed failure):
[1]:
  time      : {stamp}
  host      : node1
  rank      : 5 (local_rank: 0)
  exitcode  : -11 (pid: 997) (SIGSEGV)
  error_file: <N/A>
  traceback : Signal 11 (SIGSEGV) received by PID 997
{"=" * 60}"""
    assert re.fullmatch(re.escape(expected).replace(re.escape(stamp), stamp), text)


def test_one_failure_has_no_others() -> None:
    assert "Failures:\n  <NO_OTHER_FAILURES>\n" in str(ChildFailedError("train.py", {0: failure()}))


def test_no_failure_is_no_report() -> None:
    with pytest.raises(AssertionError, match=r"failures of 'train.py' is empty"):
        ChildFailedError("train.py", {})


def test_record_returns_the_value_of_the_function(error_file: Path) -> None:
    assert record(lambda value: value + 1)(2) == 3
    assert not error_file.exists()


def test_record_lets_an_exit_pass_but_for_zero(error_file: Path) -> None:
    raise_it(SystemExit(0))  # returns
    with pytest.raises(SystemExit) as caught:
        raise_it(SystemExit(3))
    assert caught.value.code == 3
    assert not error_file.exists()


def test_record_without_error_file_raises_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(ValueError, match="reason"):
        raise_it(ValueError("reason"))


def test_record_hands_the_first_childs_error_on(error_file: Path, tmp_path: Path) -> None:
    childs = tmp_path / "child.json"
    with mock.patch.dict(os.environ, TORCHELASTIC_ERROR_FILE=str(childs)):
        ErrorHandler().record_exception(ValueError("child's"))
    with pytest.raises(ChildFailedError):
        raise_it(ChildFailedError("train.py", {0: failure(7, childs)}))
    expected = json.loads(childs.read_text())
    expected["message"]["errorCode"] = 7
    assert json.loads(error_file.read_text()) == expected


def test_record_does_not_record_a_childs_failure_as_its_own(error_file: Path) -> None:
    with pytest.raises(ChildFailedError):
        raise_it(ChildFailedError("train.py", {0: failure()}))
    assert not error_file.exists()


@pytest.mark.parametrize("content", [None, '{"mess'])
def test_record_survives_a_childs_error_file_that_is_gone_or_damaged(
    error_file: Path, tmp_path: Path, content: str | None
) -> None:
    childs = tmp_path / "child.json"
    childs.write_text("{}")
    error = ChildFailedError("train.py", {0: failure(7, childs)})
    childs.unlink() if content is None else childs.write_text(content)
    with pytest.raises(ChildFailedError):
        raise_it(error)
    assert not error_file.exists()


def test_record_uses_the_handler_it_is_given() -> None:
    handler = mock.Mock(spec=ErrorHandler)

    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - the handler is what matters
        record(fail, error_handler=handler)()
    handler.initialize.assert_called_once_with()
    handler.record_exception.assert_called_once()


def test_the_recorded_traceback_is_the_exceptions_own(error_file: Path) -> None:
    ErrorHandler().record_exception(ValueError("never raised"))
    stack = json.loads(error_file.read_text())["message"]["extraInfo"]["py_callstack"]
    assert stack == "ValueError: never raised\n"


def test_an_exception_without_text_is_recorded(error_file: Path) -> None:
    class Awkward(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise RuntimeError

    ErrorHandler().record_exception(Awkward())
    assert "Awkward" in json.loads(error_file.read_text())["message"]["message"]


def test_an_error_file_is_never_seen_half_written(error_file: Path) -> None:
    error_file.write_text('"former"')
    with mock.patch("os.replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        ErrorHandler().record_exception(ValueError("text"))
    assert error_file.read_text() == '"former"'


def test_a_file_that_cannot_be_replaced_is_written_in_place(error_file: Path) -> None:
    # A file that is mounted on its own, as Kubernetes' termination log is, cannot be renamed over.
    with mock.patch("os.replace", side_effect=OSError(16, "busy")):
        ErrorHandler().record_exception(ValueError("text"))
    assert json.loads(error_file.read_text())["message"]["message"] == "ValueError: text"
    assert list(error_file.parent.iterdir()) == [error_file]


def test_a_pipe_is_written_not_replaced(error_file: Path) -> None:
    os.mkfifo(error_file)
    reader = os.open(error_file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ErrorHandler().record_exception(ValueError("text"))
        assert json.loads(os.read(reader, 65536))["message"]["message"] == "ValueError: text"
    finally:
        os.close(reader)
    assert error_file.is_fifo()


def test_an_error_file_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    with pytest.warns(UserWarning, match="Unable to write error to file"), pytest.raises(KeyError):
        raise_it(KeyError("the cause"))


def test_a_link_stays_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(link))
    ErrorHandler().record_exception(ValueError("text"))
    assert link.is_symlink()
    assert json.loads(target.read_text())["message"]["message"] == "ValueError: text"


def test_dumping_overwrites_an_existing_file(error_file: Path, tmp_path: Path) -> None:
    childs = tmp_path / "child.json"
    childs.write_text('{"message": "child\'s"}')
    error_file.write_text("former")
    ErrorHandler().dump_error_file(str(childs), 3)
    assert json.loads(error_file.read_text()) == {"message": "child's"}


def test_initialize_survives_a_fault_handler_that_does_not() -> None:
    with mock.patch("faulthandler.enable", side_effect=RuntimeError("no stderr")) as enable:
        with pytest.warns(UserWarning, match="no stderr"):
            get_error_handler().initialize()
        enable.assert_called_once_with(all_threads=True)


class TextlessError(Exception):
    def __str__(self) -> str:
        raise LookupError("no text")

    def __repr__(self) -> str:
        raise LookupError("no text either")


class WarningError(Exception):
    def __str__(self) -> str:
        warnings.warn("as CPython 3.15 does", DeprecationWarning, stacklevel=1)
        return "the text"


def recorded(error_file: Path) -> tuple[str, str]:
    message = json.loads(error_file.read_text())["message"]
    return message["message"], message["extraInfo"]["py_callstack"]


def test_a_warning_that_is_an_error_does_not_lose_the_report(error_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.15 warns while it formats the traceback of a spawned process: the module there has no loader."""
    lazycache = linecache.lazycache

    def warn_and_go_on(*arguments: Any) -> Any:
        warnings.warn("Module globals have no loader", DeprecationWarning, stacklevel=1)
        return lazycache(*arguments)

    monkeypatch.setattr(linecache, "lazycache", warn_and_go_on)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(WarningError):
            record(raise_it)(WarningError())
    message, stack = recorded(error_file)
    assert message == "WarningError: the text"
    assert "in raise_it" in stack
    assert stack.rstrip().endswith("WarningError: the text")


def test_the_record_of_an_exception_that_cannot_be_formatted(error_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("traceback.format_exception", fail)
    with pytest.raises(TextlessError):
        record(raise_it)(TextlessError())
    message, stack = recorded(error_file)
    assert message == "TextlessError: <no text: its __str__ raised>"
    assert f'  File "{__file__}", line ' in stack
    assert "in raise_it" in stack
    assert stack.splitlines()[-2:] == [
        "TextlessError: <no text: its __str__ raised>",
        "(the rest of the traceback could not be formatted: RuntimeError: broken)",
    ]


@pytest.mark.parametrize("path", ["/proc/none/error.json", "nul\0l"])
def test_a_report_that_cannot_be_written_does_not_replace_the_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    monkeypatch.setattr(ErrorHandler, "_get_error_file_path", lambda _self: path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError):
            record(raise_it)(KeyError("k"))
    assert "Unable to write error to file" in caplog.text


def test_a_fault_handler_that_cannot_be_enabled_is_no_error_where_warnings_are() -> None:
    with warnings.catch_warnings(), mock.patch("faulthandler.enable", side_effect=RuntimeError("no descriptor")):
        warnings.simplefilter("error")
        assert record(lambda: 3)() == 3


@pytest.mark.parametrize("stamp", ["1" * 30, float("inf")])
def test_an_invalid_time_does_not_lose_the_report(tmp_path: Path, stamp: Any) -> None:
    path = tmp_path / "error.json"
    path.write_text(
        json.dumps({"message": {"message": "boom", "extraInfo": {"timestamp": stamp, "timestamp_ns": stamp}}})
    )
    failure = ProcessFailure(0, 999, 1, str(path))
    assert "boom" in str(ChildFailedError("train.py", {0: failure}))
