"""``record`` and ``ErrorHandler``: how the error of a worker gets to its agent."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.implementations import Implementation


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "my_error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


class OldHandler:
    """An error handler that records its calls, with the methods that torch 2.6 calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def initialize(self) -> None:
        self.calls.append("initialize")

    def record_exception(self, e: BaseException) -> None:
        self.calls.append(e)

    def dump_error_file(self, rootcause_error_file: str, error_code: int = 0) -> None:
        self.calls.append((rootcause_error_file, error_code))


class Handler(OldHandler):
    """The same for the newest version of torch, without a note of its hooks."""

    def set_entrypoint_fn_name(self, fn_name: str | None) -> None:
        pass

    def record_success(self) -> None:
        pass


class HandlerWithHooks(OldHandler):
    """The same, with notes of its hooks."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails

    def set_entrypoint_fn_name(self, fn_name: str | None) -> None:
        self.calls.append(("name", fn_name))

    def record_success(self) -> None:
        self.calls.append("success")
        if self.fails:
            raise ZeroDivisionError("of the hook")


def main_of_nothing() -> str:
    return "done"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


class TestRecord:
    def test_success(self, impl: Implementation, error_file: Path) -> None:
        @impl.errors.record  # type: ignore[untyped-decorator]  # whichever implementation it is
        def main(one: int, *, two: int) -> int:
            """What it does."""
            return one + two

        assert main(1, two=2) == 3
        assert not error_file.exists()
        assert (main.__name__, main.__doc__) == ("main", "What it does.")

    def test_an_exception(self, impl: Implementation, error_file: Path) -> None:
        error = ValueError("boom")

        @impl.errors.record  # type: ignore[untyped-decorator]  # whichever implementation it is
        def main() -> None:
            raise error

        before = int(time.time())
        with pytest.raises(ValueError, match="boom") as raised:
            main()
        assert raised.value is error
        message = read(error_file)["message"]
        assert message["message"] == "ValueError: boom"
        info = message["extraInfo"]
        assert before <= int(info["timestamp"]) <= time.time()
        assert info["py_callstack"].startswith("Traceback (most recent call last):\n")
        assert "raise error" in info["py_callstack"]
        assert info["py_callstack"].endswith("ValueError: boom\n")
        assert set(info) == {"py_callstack", "timestamp"} | impl.expect(
            "nanoseconds", torch=set(), ours={"timestamp_ns"}
        )

    def test_a_record_becomes_a_failure(self, impl: Implementation, error_file: Path) -> None:
        with pytest.raises(KeyError):
            impl.errors.record({}.pop)("missing")
        failure = impl.errors.ProcessFailure(0, 1, 2, str(error_file))
        assert failure.message["message"] == "KeyError: 'missing'"

    @pytest.mark.parametrize("code", [0, False])
    def test_leaving_with_0_is_a_return(self, impl: Implementation, error_file: Path, code: Any) -> None:
        assert impl.errors.record(sys.exit)(code) is None
        assert not error_file.exists()

    @pytest.mark.parametrize("code", [1, 7, None, "text"])
    def test_leaving_otherwise(self, impl: Implementation, error_file: Path, code: Any) -> None:
        with pytest.raises(SystemExit) as raised:
            impl.errors.record(sys.exit)(code)
        assert raised.value.code == code
        assert not error_file.exists()

    def test_an_interrupt_is_not_recorded(self, impl: Implementation, error_file: Path) -> None:
        def main() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            impl.errors.record(main)()
        assert not error_file.exists()

    def test_the_error_of_a_child_is_handed_on(self, impl: Implementation, error_file: Path, tmp_path: Path) -> None:
        failures = {}
        for rank, timestamp in ((0, 20), (1, 10)):
            path = tmp_path / f"{rank}.json"
            path.write_text(json.dumps({"message": {"message": f"of {rank}", "extraInfo": {"timestamp": timestamp}}}))
            failures[rank] = impl.errors.ProcessFailure(rank, 100 + rank, 40 + rank, str(path))
        error = impl.errors.ChildFailedError("train.py", failures)

        def main() -> None:
            raise error

        with pytest.raises(impl.errors.ChildFailedError) as raised:
            impl.errors.record(main)()
        assert raised.value is error
        assert read(error_file) == {"message": {"message": "of 1", "extraInfo": {"timestamp": 10}, "errorCode": 41}}

    def test_a_child_without_an_error_file(self, impl: Implementation, error_file: Path) -> None:
        error = impl.errors.ChildFailedError("train.py", {0: impl.errors.ProcessFailure(0, 1, -9, "/nonexistent")})

        def main() -> None:
            raise error

        with pytest.raises(impl.errors.ChildFailedError):
            impl.errors.record(main)()
        assert not error_file.exists()

    def test_a_handler_of_ones_own(self, impl: Implementation) -> None:
        handler, error = Handler(), ValueError("boom")

        def main() -> None:
            raise error

        with pytest.raises(ValueError, match="boom"):
            impl.errors.record(main, handler)()
        assert handler.calls == ["initialize", error]

    def test_a_handler_of_ones_own_and_a_child(self, impl: Implementation, tmp_path: Path) -> None:
        path = tmp_path / "child.json"
        path.write_text('{"message": "x", "timestamp": 1}')
        failure = impl.errors.ProcessFailure(0, 1, 5, str(path))
        handler = Handler()

        def main() -> None:
            raise impl.errors.ChildFailedError("x", {0: failure})

        with pytest.raises(impl.errors.ChildFailedError):
            impl.errors.record(main, error_handler=handler)()
        assert handler.calls == ["initialize", (str(path), 5)]

    def test_the_handler_that_a_program_puts_in_place(
        self, impl: Implementation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handler = Handler()
        monkeypatch.setattr(impl.errors, "get_error_handler", lambda: handler)
        impl.errors.record(len)([])
        assert handler.calls == ["initialize"]

    def test_a_handler_without_hooks(self, impl: Implementation) -> None:
        def outcome() -> Any:
            try:
                return impl.errors.record(main_of_nothing, OldHandler())()
            except AttributeError:
                return AttributeError

        assert outcome() == impl.expect("older-handlers", torch=AttributeError, ours="done")

    @pytest.mark.needs("hooks-of-the-error-handler")
    def test_the_hooks_of_a_success(self, impl: Implementation) -> None:
        handler = HandlerWithHooks()
        assert impl.errors.record(main_of_nothing, handler)() == "done"
        assert handler.calls == [("name", "main_of_nothing"), "initialize", "success"]

    @pytest.mark.needs("hooks-of-the-error-handler")
    def test_a_function_without_a_name(self, impl: Implementation) -> None:
        handler = HandlerWithHooks()
        impl.errors.record(functools.partial(main_of_nothing), handler)()
        assert handler.calls == [("name", None), "initialize", "success"]

    @pytest.mark.needs("hooks-of-the-error-handler")
    @pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), SystemExit(0), KeyboardInterrupt()])
    def test_no_success_after_an_exception(self, impl: Implementation, error: BaseException) -> None:
        def main() -> None:
            raise error

        handler = HandlerWithHooks()
        with contextlib.suppress(BaseException):
            impl.errors.record(main, handler)()
        assert "success" not in handler.calls

    @pytest.mark.needs("hooks-of-the-error-handler")
    def test_an_exception_of_the_hook_is_none_of_the_function(self, impl: Implementation) -> None:
        handler = HandlerWithHooks(fails=True)
        with pytest.raises(ZeroDivisionError, match="of the hook"):
            impl.errors.record(main_of_nothing, handler)()
        assert [call for call in handler.calls if isinstance(call, BaseException)] == []


class TestErrorHandler:
    @pytest.mark.needs("hooks-of-the-error-handler")
    def test_the_hooks_of_the_default(
        self, impl: Implementation, error_file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """They change nothing, and write nothing that a user sees."""
        handler = impl.errors.ErrorHandler()
        assert handler._fn_name is None
        handler.set_entrypoint_fn_name("train.main")
        assert handler._fn_name == "train.main"
        assert handler.record_success() is None
        assert handler.maybe_enrich_signal_failure_message("text", "file") == "text"
        assert not error_file.exists()
        assert not caplog.records

    def test_the_default(self, impl: Implementation) -> None:
        assert type(impl.errors.get_error_handler()) is impl.errors.ErrorHandler
        assert impl("multiprocessing.errors.handlers").get_error_handler is impl.errors.get_error_handler

    def test_where_it_writes(self, impl: Implementation, error_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        handler = impl.errors.ErrorHandler()
        assert handler._get_error_file_path() == str(error_file)
        monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
        assert handler._get_error_file_path() is None

    @pytest.mark.parametrize("variable", [None, ""])
    def test_without_a_file_nothing_is_written(
        self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
    ) -> None:
        if variable is not None:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", variable)
        monkeypatch.chdir(tmp_path)
        impl.errors.ErrorHandler().record_exception(ValueError("boom"))
        assert list(tmp_path.iterdir()) == []

    def test_an_exception_that_is_not_being_handled(self, impl: Implementation, error_file: Path) -> None:
        impl.errors.ErrorHandler().record_exception(ValueError("boom"))
        stack = read(error_file)["message"]["extraInfo"]["py_callstack"]
        assert stack == impl.expect("own-traceback", torch="NoneType: None\n", ours="ValueError: boom\n")

    def test_a_folder_that_is_not_there(
        self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))

        def outcome() -> str:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    impl.errors.ErrorHandler().record_exception(ValueError("boom"))
                except FileNotFoundError:
                    return "raises"
            return str(caught[0].message)

        expected = impl.expect("recording-never-raises", torch="raises", ours="Unable to write error to file")
        assert outcome().startswith(expected)

    def test_initialize_turns_on_the_fault_handler(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        monkeypatch.setattr("faulthandler.enable", lambda **options: calls.append(options))
        impl.errors.ErrorHandler().initialize()
        assert calls == [{"all_threads": True}]

    def test_initialize_does_not_fail(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**_options: Any) -> None:
            raise RuntimeError("no descriptor")

        monkeypatch.setattr("faulthandler.enable", refuse)
        with pytest.warns(UserWarning, match="Unable to enable fault handler. RuntimeError: no descriptor"):
            impl.errors.ErrorHandler().initialize()

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            ({"message": {"message": "x"}}, {"message": {"message": "x", "errorCode": 9}}),
            ({"message": {"errorCode": 1}}, {"message": {"errorCode": 9}}),
            ({"message": "text"}, {"message": "text"}),
            ({"other": 1}, {"other": 1}),
        ],
    )
    def test_the_exit_code_is_put_into_the_error(self, impl: Implementation, error: Any, expected: Any) -> None:
        impl.errors.ErrorHandler().override_error_code_in_rootcause_data("file", error, 9)
        assert error == expected

    def test_dumping(self, impl: Implementation, error_file: Path, tmp_path: Path) -> None:
        child = tmp_path / "child.json"
        child.write_text('{"message": {"message": "x"}}')
        error_file.write_text("something else")
        handler = impl.errors.ErrorHandler()
        handler.dump_error_file(str(child), 0)
        assert read(error_file) == {"message": {"message": "x"}}
        handler.dump_error_file(str(child), error_code=-11)
        assert read(error_file) == {"message": {"message": "x", "errorCode": -11}}

    def test_dumping_without_a_file(
        self, impl: Implementation, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        child = tmp_path / "child.json"
        child.write_text('{"message": "x"}')
        impl.errors.ErrorHandler().dump_error_file(str(child))
        assert "no error file defined for parent" in caplog.text
        assert list(tmp_path.iterdir()) == [child]

    @pytest.mark.parametrize("content", [None, "{"])
    def test_dumping_an_unreadable_file(
        self, impl: Implementation, error_file: Path, tmp_path: Path, content: str | None
    ) -> None:
        child = tmp_path / "child.json"
        if content is not None:
            child.write_text(content)

        def raises() -> bool:
            try:
                impl.errors.ErrorHandler().dump_error_file(str(child), 1)
            except (OSError, ValueError):
                return True
            return False

        assert raises() == impl.expect("recording-never-raises", torch=True, ours=False)
        assert not error_file.exists()

    def test_a_subclass(self, impl: Implementation, tmp_path: Path) -> None:
        class Elsewhere(impl.errors.ErrorHandler):  # type: ignore[misc,name-defined]  # whose class is known when the test runs
            def _get_error_file_path(self) -> str:
                return str(tmp_path / "elsewhere.json")

        with pytest.raises(ZeroDivisionError):
            impl.errors.record(divmod, Elsewhere())(1, 0)
        assert read(tmp_path / "elsewhere.json")["message"]["message"].startswith("ZeroDivisionError: ")
