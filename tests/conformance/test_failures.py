"""``ProcessFailure`` from all kinds of error files, and ``ChildFailedError``."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conformance.implementations import Implementation

DOCS = "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html"
TRAITS = {"category": "system_terminated_error", "retryability": "False"}


@pytest.fixture
def make(impl: Implementation, tmp_path: Path) -> Callable[..., Any]:
    """Makes a failure whose worker left ``content``: nothing, text or what becomes JSON."""

    def build(content: Any = None, exitcode: int = 1, local_rank: int = 0, pid: int = 997) -> Any:
        path = tmp_path / f"error_{len(list(tmp_path.iterdir()))}.json"
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return impl.errors.ProcessFailure(local_rank=local_rank, pid=pid, exitcode=exitcode, error_file=str(path))

    return build


def error(text: str = "boom", timestamp: Any = "1234", **extra: Any) -> dict[str, Any]:
    return {"message": {"message": text, "extraInfo": {"py_callstack": "the\ntrace", "timestamp": timestamp}}, **extra}


class TestProcessFailure:
    @pytest.mark.needs("error-traits")
    def test_no_error_file(self, make: Callable[..., Any]) -> None:
        before = int(time.time())
        failure = make()
        assert before <= failure.timestamp <= time.time()
        assert (failure.local_rank, failure.pid, failure.exitcode, failure.error_file) == (0, 997, 1, "<N/A>")
        assert failure.message == DOCS
        assert failure.error_file_data == {"message": "<NONE>", "errorTraits": TRAITS}
        assert failure.signal_name() == "<N/A>"

    @pytest.mark.parametrize(
        ("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV"), (signal.SIGTERM, "SIGTERM")]
    )
    def test_a_signal(self, make: Callable[..., Any], number: int, name: str) -> None:
        failure = make(exitcode=-number)
        assert failure.signal_name() == name
        assert failure.message == f"Signal {number} ({name}) received by PID 997"

    def test_a_signal_without_a_name(self, make: Callable[..., Any]) -> None:
        failure = make(exitcode=-200)
        assert failure.signal_name() == "<N/A>"
        assert failure.message == "Signal 200 (<N/A>) received by PID 997"

    @pytest.mark.needs("error-traits")
    def test_failures_do_not_share_their_messages(self, impl: Implementation, make: Callable[..., Any]) -> None:
        make()
        later = make(exitcode=-9)
        shared = impl.expect(
            "no-shared-default", torch={"message": "<NONE>", "errorTraits": TRAITS}, ours={"message": "<NONE>"}
        )
        assert later.error_file_data == shared

    def test_a_recorded_exception(self, make: Callable[..., Any]) -> None:
        content = error()
        failure = make(content, exitcode=-11)
        assert failure.error_file.endswith(".json")
        assert (failure.message, failure.error_file_data, failure.timestamp) == (content["message"], content, 1234)
        assert failure.timestamp_isoformat() == time.strftime("%Y-%m-%d_%H:%M:%S", time.localtime(1234))

    def test_a_message_of_text(self, make: Callable[..., Any]) -> None:
        failure = make({"message": "out of memory", "timestamp": 12})
        assert (failure.message, failure.timestamp) == ("out of memory", 12)

    @pytest.mark.needs("error-traits")
    def test_an_empty_message(self, make: Callable[..., Any]) -> None:
        failure = make({"message": "", "timestamp": 12})
        assert (failure.message, failure.timestamp) == (DOCS, 12)
        assert failure.error_file_data["errorTraits"] == TRAITS
        assert make({"message": "", "timestamp": 12}, exitcode=-9).message == "Signal 9 (SIGKILL) received by PID 997"

    def test_a_message_of_text_without_a_time(self, impl: Implementation, make: Callable[..., Any]) -> None:
        failure = make({"message": "boom"})
        assert failure.message == "boom"
        is_now = failure.timestamp > 0
        assert is_now == impl.expect("unknown-time", torch=False, ours=True)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            '{"message": {"message": "boo',
            "[]",
            "{}",
            "null",
            '{"message": {"message": "boom"}}',
            '{"message": {"message": "boom", "extraInfo": {}}}',
            '{"message": {"message": "boom", "extraInfo": {"timestamp": "soon"}}}',
        ],
    )
    def test_a_damaged_file(self, impl: Implementation, make: Callable[..., Any], content: str) -> None:
        def exit_code() -> int | None:
            try:
                return int(make(content, exitcode=3).exitcode)
            except Exception:  # noqa: BLE001 - torch raises what reading happens to raise
                return None

        assert exit_code() == impl.expect("corrupt-error-file", torch=None, ours=3)

    def test_compares_by_value(self, make: Callable[..., Any]) -> None:
        assert make({"message": "x", "timestamp": 1}) != make({"message": "x", "timestamp": 1}, exitcode=4)
        assert "ProcessFailure(local_rank=0, pid=997, exitcode=1, error_file=" in repr(make())


class TestChildFailedError:
    def test_it_takes_a_failure(self, impl: Implementation) -> None:
        with pytest.raises(AssertionError):
            impl.errors.ChildFailedError("train.py", {})

    def test_the_first_failure(self, impl: Implementation, make: Callable[..., Any]) -> None:
        failures = {4: make(error(timestamp="30")), 2: make(error(timestamp="10")), 3: make(error(timestamp="20"))}
        raised: Any = impl.errors.ChildFailedError("train.py", failures)
        assert raised.get_first_failure() == (2, failures[2])
        assert (raised.name, raised.failures) == ("train.py", failures)
        assert raised.args == (raised.format_msg(),)
        assert isinstance(raised, Exception)

    def test_of_failures_at_the_same_time_the_one_named_first(
        self, impl: Implementation, make: Callable[..., Any]
    ) -> None:
        failures = {rank: make(error(timestamp="30")) for rank in (3, 1, 2)}
        assert impl.errors.ChildFailedError("train.py", failures).get_first_failure()[0] == 3

    @pytest.mark.needs("signal-names")
    def test_the_report(self, impl: Implementation, make: Callable[..., Any]) -> None:
        failures = {
            8: make(error(timestamp="30"), exitcode=1, local_rank=0, pid=100),
            9: make({"message": "text", "timestamp": "10"}, exitcode=-9, local_rank=1, pid=101),
        }
        text = str(impl.errors.ChildFailedError("train.py", failures))
        at = {rank: failure.timestamp_isoformat() for rank, failure in failures.items()}
        files = {rank: failure.error_file for rank, failure in failures.items()}
        blank = impl.expect("tidy-report", torch=" ", ours="")
        border, line = "=" * 60, "-" * 60
        assert (
            text
            == f"""
{border}
train.py FAILED
{line}
Failures:
[0]:
  time      : {at[8]}
  host      : {socket.getfqdn()}
  rank      : 8 (local_rank: 0)
  exitcode  : 1 (pid: 100){blank}
  error_file: {files[8]}
  traceback : the
  trace
{line}
Root Cause (first observed failure):
[1]:
  time      : {at[9]}
  host      : {socket.getfqdn()}
  rank      : 9 (local_rank: 1)
  exitcode  : -9 (pid: 101) {blank}(SIGKILL)
  error_file: {files[9]}
  traceback : text
{border}"""
        )

    def test_the_report_of_one_failure(self, impl: Implementation, make: Callable[..., Any]) -> None:
        error: Any = impl.errors.ChildFailedError("x", {0: make()})
        text = error.format_msg(boarder_delim="*", section_delim="~")
        lines = text.split("\n")
        width = min(60, max(map(len, lines)))
        assert lines[1] == lines[-1] == "*" * 60
        assert width == 60
        assert lines[3:6] == ["~" * 60, "Failures:", "  <NO_OTHER_FAILURES>"]
        assert f"  traceback : {DOCS}" in lines

    @pytest.mark.needs("enriched-signal-failures")
    @pytest.mark.parametrize(("code", "is_asked"), [(-11, True), (1, False)])
    def test_the_handler_enriches_the_report_of_a_signal(
        self, impl: Implementation, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, code: int, is_asked: bool
    ) -> None:
        handler = mock.Mock()
        handler.maybe_enrich_signal_failure_message.side_effect = lambda message, _file: (
            f"{message} (GPU 3: page fault)"
        )
        monkeypatch.setattr(impl.errors, "get_error_handler", lambda: handler)
        failure = make(exitcode=code)
        text = str(impl.errors.ChildFailedError("x", {0: failure}))
        assert ("(GPU 3: page fault)" in text) == is_asked
        if is_asked:
            handler.maybe_enrich_signal_failure_message.assert_called_with(failure.message, failure.error_file)
            assert f"  traceback : {failure.message} (GPU 3: page fault)\n" in text

    @pytest.mark.needs("enriched-signal-failures")
    def test_a_handler_that_fails_to_enrich_is_a_warning(
        self,
        impl: Implementation,
        make: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        handler = mock.Mock()
        handler.maybe_enrich_signal_failure_message.side_effect = ZeroDivisionError
        monkeypatch.setattr(impl.errors, "get_error_handler", lambda: handler)
        failure = make(exitcode=-11)
        assert f"  traceback : {failure.message}\n" in str(impl.errors.ChildFailedError("x", {0: failure}))
        (record,) = caplog.records
        assert (record.levelname, record.getMessage()) == ("WARNING", "Failed to enrich signal failure message")

    def test_text_that_looks_like_a_template(self, impl: Implementation, make: Callable[..., Any]) -> None:
        text = str(impl.errors.ChildFailedError("$name ${title}", {0: make({"message": "cost: $5", "timestamp": 1})}))
        assert "$name ${title} FAILED" in text
        assert "  traceback : cost: $5" in text

    @pytest.mark.parametrize(
        ("message", "shown"),
        [
            ({"extraInfo": {"py_callstack": "a\nb", "timestamp": 1}}, "a\n  b"),
            ({"message": "only\nthis", "extraInfo": {"timestamp": 1}}, "only\n  this"),
            ({"extraInfo": {"timestamp": 1}}, "<N/A>"),
        ],
    )
    def test_the_shown_part_of_a_message(
        self, impl: Implementation, make: Callable[..., Any], message: Any, shown: str
    ) -> None:
        text = str(impl.errors.ChildFailedError("x", {0: make({"message": message})}))
        assert re.search(rf"^  traceback : {re.escape(shown)}\n=", text, re.MULTILINE)

    def test_a_message_of_several_lines(self, impl: Implementation, make: Callable[..., Any]) -> None:
        text = str(impl.errors.ChildFailedError("x", {0: make({"message": "one\ntwo", "timestamp": 1})}))
        assert f"traceback : one\n{impl.expect('tidy-report', torch='two', ours='  two')}\n" in text
