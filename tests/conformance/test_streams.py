"""Output of processes and of this one: ``redirects``, ``tail_log`` and ``subprocess_handler``."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conformance.implementations import Implementation


# ---- redirects


@contextmanager
def streams_of_a_program() -> Iterator[None]:
    """Let ``sys.stdout`` and ``sys.stderr`` write to descriptors 1 and 2, which pytest has put something else in place of."""
    before = sys.stdout, sys.stderr
    with open(1, "w", closefd=False) as stdout, open(2, "w", closefd=False) as stderr:
        sys.stdout, sys.stderr = stdout, stderr
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


class TestRedirects:
    @pytest.mark.parametrize("name", ["stdout", "stderr"])
    def test_everything_goes_to_the_file(self, impl: Implementation, tmp_path: Path, name: str) -> None:
        module = impl("multiprocessing.redirects")
        number = {"stdout": 1, "stderr": 2}[name]
        before = os.fstat(number).st_ino
        with streams_of_a_program(), getattr(module, f"redirect_{name}")(str(tmp_path / "log")):
            print("python", file=getattr(sys, name), flush=True)
            os.system(f"echo child >&{number}")
            ctypes.CDLL(None).dprintf(number, b"c\n")
        assert (tmp_path / "log").read_text() == "python\nchild\nc\n"
        assert os.fstat(number).st_ino == before

    def test_buffers_are_written_out(self, impl: Implementation, tmp_path: Path) -> None:
        with streams_of_a_program(), impl("multiprocessing.redirects").redirect_stdout(str(tmp_path / "log")):
            print("python", end=" ")
            ctypes.CDLL(None).printf(b"c ")
        assert sorted((tmp_path / "log").read_text().split()) == ["c", "python"]

    def test_the_file_is_overwritten(self, impl: Implementation, tmp_path: Path) -> None:
        (tmp_path / "log").write_text("earlier")
        with streams_of_a_program(), impl("multiprocessing.redirects").redirect("stdout", str(tmp_path / "log")):
            pass
        assert (tmp_path / "log").read_text() == ""

    def test_an_exception_restores_the_stream(self, impl: Implementation, tmp_path: Path) -> None:
        before = os.fstat(2).st_ino
        redirect = impl("multiprocessing.redirects").redirect_stderr
        with pytest.raises(KeyError), streams_of_a_program(), redirect(str(tmp_path / "log")):
            raise KeyError
        assert os.fstat(2).st_ino == before

    def test_both_at_the_same_time(self, impl: Implementation, tmp_path: Path) -> None:
        module = impl("multiprocessing.redirects")
        out, err = tmp_path / "out", tmp_path / "err"
        with streams_of_a_program(), module.redirect_stdout(str(out)), module.redirect_stderr(str(err)):
            os.system("echo out; echo err >&2")
        assert (out.read_text(), err.read_text()) == ("out\n", "err\n")

    def test_a_stream_that_is_not_the_descriptor(
        self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in a notebook."""
        with open(tmp_path / "cell", "w") as cell:
            monkeypatch.setattr(sys, "stdout", cell)
            with impl("multiprocessing.redirects").redirect_stdout(str(tmp_path / "log")):
                print("python", flush=True)
                os.system("echo child")
        found = (tmp_path / "log").read_text()
        assert found == impl.expect("notebook-streams", torch="python\n", ours="python\nchild\n")

    def test_unknown_streams(self, impl: Implementation, tmp_path: Path) -> None:
        redirect = impl("multiprocessing.redirects").redirect
        with (
            pytest.raises(ValueError, match=r"unknown standard stream <stdin>, must be one of \{"),
            redirect("stdin", str(tmp_path / "log")),
        ):
            pass

    def test_a_folder_that_is_not_there(self, impl: Implementation, tmp_path: Path) -> None:
        redirect = impl("multiprocessing.redirects").redirect_stdout
        with pytest.raises(FileNotFoundError), streams_of_a_program(), redirect(str(tmp_path / "none" / "log")):
            pass


# ---- tail_log


class TestTailLog:
    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[int, str]:
        for rank in range(3):
            (tmp_path / f"{rank}.log").write_text("".join(f"line {number} of {rank}\n" for number in range(100)))
        return {rank: str(tmp_path / f"{rank}.log") for rank in range(3)}

    def test_lines_with_headers(self, impl: Implementation, files: dict[int, str]) -> None:
        dst = io.StringIO()
        tail = impl("multiprocessing.tail_log").TailLog("writer", files, dst)
        assert tail.start() is tail
        assert not tail.stopped()
        tail.stop()
        assert tail.stopped()
        assert tail._threadpool._shutdown
        lines = dst.getvalue().splitlines()
        assert sorted(lines) == sorted(f"[writer{rank}]:line {n} of {rank}" for rank in files for n in range(100))
        of_one = [line for line in lines if line.startswith("[writer1]")]
        assert of_one == [f"[writer1]:line {number} of 1" for number in range(100)]

    def test_prefixes(self, impl: Implementation, files: dict[int, str]) -> None:
        dst = io.StringIO()
        tail_log = impl("multiprocessing.tail_log").TailLog
        tail_log("writer", files, dst, log_line_prefixes={0: "<0>", 2: ""}).start().stop()
        starts = {line.partition("line")[0] for line in dst.getvalue().splitlines()}
        assert starts == {"<0>", "[writer1]:", ""}

    @pytest.mark.needs("filtered-files")
    def test_only_lines_that_pass(self, impl: Implementation, files: dict[int, str]) -> None:
        dst = io.StringIO()
        tail_log = impl("multiprocessing.tail_log").TailLog
        tail_log("writer", files, dst, log_line_filter=lambda line: " 77 " in line).start().stop()
        assert sorted(dst.getvalue().splitlines()) == [f"[writer{rank}]:line 77 of {rank}" for rank in files]

    @pytest.mark.needs("filtered-files")
    def test_lines_that_are_written_until_the_end(self, impl: Implementation, tmp_path: Path) -> None:
        """A worker writes its last lines and ends, just before the event is read."""
        log, dst = tmp_path / "log", io.StringIO()
        log.write_text("first\n")

        class Finished(threading.Event):
            def finish(self) -> None:
                if not super().is_set():
                    with log.open("a") as file:
                        file.write("last\n")
                    self.set()

            def is_set(self) -> bool:
                if dst.getvalue():
                    self.finish()
                return super().is_set()

            def wait(self, timeout: float | None = None) -> bool:
                assert eventually(lambda: bool(dst.getvalue()))
                self.finish()
                return super().wait(timeout)

        keep_all: dict[str, Any] = {"log_line_filter": lambda _line: True}
        impl("multiprocessing.tail_log").tail_logfile("> ", str(log), dst, Finished(), 0.01, **keep_all)
        lost = impl.expect("last-lines", torch="> first\n", ours="> first\n> last\n")
        assert dst.getvalue() == lost

    @pytest.mark.needs("filtered-files")
    def test_a_file_that_is_made_just_before_the_end(self, impl: Implementation, tmp_path: Path) -> None:
        log, dst = tmp_path / "log", io.StringIO()

        class Finished(threading.Event):
            def is_set(self) -> bool:
                if not super().is_set():
                    log.write_text("only\n")
                    self.set()
                return True

        keep_all: dict[str, Any] = {"log_line_filter": lambda _line: True}
        impl("multiprocessing.tail_log").tail_logfile("> ", str(log), dst, Finished(), 0.01, **keep_all)
        assert dst.getvalue() == impl.expect("last-lines", torch="", ours="> only\n")

    def test_a_file_that_comes_later(self, impl: Implementation, tmp_path: Path) -> None:
        dst = io.StringIO()
        tail = impl("multiprocessing.tail_log").TailLog("writer", {0: str(tmp_path / "log")}, dst, interval_sec=0.01)
        tail.start()
        (tmp_path / "log").write_text("late\n")
        assert eventually(lambda: dst.getvalue() == "[writer0]:late\n")
        tail.stop()

    def test_a_file_that_never_comes(self, impl: Implementation, tmp_path: Path) -> None:
        dst = io.StringIO()
        tail_log = impl("multiprocessing.tail_log").TailLog
        tail_log("writer", {0: str(tmp_path / "log")}, dst, interval_sec=0.01).start().stop()
        assert dst.getvalue() == ""
        assert (tmp_path / "log").exists() == impl.expect("tail-makes-files", torch=False, ours=True)

    def test_nothing_to_follow(self, impl: Implementation) -> None:
        tail = impl("multiprocessing.tail_log").TailLog("writer", {}, sys.stdout)
        tail.start()
        tail.stop()
        assert tail.stopped()

    def test_bytes_that_are_no_text(self, impl: Implementation, tmp_path: Path) -> None:
        (tmp_path / "log").write_bytes(b"a\xffb\n")
        dst = io.StringIO()
        impl("multiprocessing.tail_log").TailLog("x", {0: str(tmp_path / "log")}, dst).start().stop()
        assert dst.getvalue() == "[x0]:a\ufffdb\n"

    @pytest.mark.needs("filtered-files")
    def test_the_function(self, impl: Implementation, files: dict[int, str]) -> None:
        dst, finished = io.StringIO(), threading.Event()
        finished.set()
        impl("multiprocessing.tail_log").tail_logfile("> ", files[0], dst, finished, 0.01, lambda line: "7 " in line)
        assert dst.getvalue().splitlines() == [f"> line {n} of 0" for n in range(7, 100, 10)]

    @pytest.mark.needs("filtered-files")
    def test_the_function_without_a_filter(self, impl: Implementation, files: dict[int, str]) -> None:
        dst, finished = io.StringIO(), threading.Event()
        finished.set()
        impl("multiprocessing.tail_log").tail_logfile("> ", files[0], dst, finished, 0.01)
        assert len(dst.getvalue().splitlines()) == impl.expect("no-filter-keeps-all", torch=0, ours=100)

    def test_the_function_without_a_file(self, impl: Implementation, tmp_path: Path) -> None:
        dst, finished = io.StringIO(), threading.Event()
        finished.set()
        impl("multiprocessing.tail_log").tail_logfile("> ", str(tmp_path / "none"), dst, finished, 0.01)
        assert dst.getvalue() == ""


# ---- subprocess_handler


class TestSubprocessHandler:
    @pytest.fixture
    def make(self, impl: Implementation) -> Iterator[Callable[..., Any]]:
        made = []

        def build(*args: Any, **options: Any) -> Any:
            chosen = {"env": {}, "stdout": "", "stderr": "", "local_rank_id": 0, **options}
            made.append(
                impl("multiprocessing.subprocess_handler").get_subprocess_handler(
                    entrypoint=chosen.pop("entrypoint", "/bin/sh"), args=args, **chosen
                )
            )
            return made[-1]

        yield build
        for handler in made:
            if handler.proc.poll() is None:
                handler.proc.kill()
                handler.proc.wait(30)
        made.clear()

    def test_a_program(self, impl: Implementation, make: Callable[..., Any], tmp_path: Path) -> None:
        script = "echo out $NEW; echo err $1 >&2; exit 5"
        handler = make(
            *("-c", script, "sh", 42),
            env={"NEW": "value"},
            stdout=str(tmp_path / "out"),
            stderr=str(tmp_path / "err"),
            local_rank_id=3,
        )
        assert isinstance(handler, impl("multiprocessing.subprocess_handler").SubprocessHandler)
        assert handler.local_rank_id == 3
        assert handler.proc.wait(60) == 5
        assert (handler.proc.poll(), handler.proc.returncode) == (5, 5)
        assert ((tmp_path / "out").read_text(), (tmp_path / "err").read_text()) == ("out value\n", "err 42\n")
        assert list(handler.proc.args) == ["/bin/sh", "-c", script, "sh", "42"]
        self.close_files(handler)

    def close_files(self, handler: Any) -> None:
        for file in (getattr(handler, "_stdout", None), getattr(handler, "_stderr", None)):
            if file is not None:
                file.close()

    def test_log_files_are_overwritten(self, make: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "out").write_text("earlier and longer")
        handler = make("-c", "echo new", stdout=str(tmp_path / "out"))
        assert handler.proc.wait(60) == 0
        assert (tmp_path / "out").read_text() == "new\n"
        self.close_files(handler)

    def test_a_session_of_its_own(self, make: Callable[..., Any]) -> None:
        pid = make("-c", "exec sleep 1000").proc.pid
        assert os.getsid(pid) == os.getpgid(pid) == pid

    @pytest.mark.parametrize(
        ("death_sig", "expected"),
        [((), signal.SIGTERM), ((None,), signal.SIGTERM), ((signal.SIGKILL,), signal.SIGKILL)],
    )
    def test_close_signals_the_group(
        self, make: Callable[..., Any], death_sig: tuple[Any, ...], expected: signal.Signals
    ) -> None:
        handler = make("-c", "sleep 1000; true")
        handler.close(*death_sig)
        assert handler.proc.wait(30) == -expected

    def test_close_after_the_end(self, impl: Implementation, make: Callable[..., Any]) -> None:
        handler = make("-c", "exit 0")
        handler.proc.wait(60)

        def raises() -> bool:
            try:
                handler.close()
            except ProcessLookupError:
                return True
            return False

        assert raises() == impl.expect("close-never-raises", torch=True, ours=False)

    def test_waiting_has_an_end(self, make: Callable[..., Any]) -> None:
        import subprocess

        handler = make("-c", "exec sleep 1000")
        with pytest.raises(subprocess.TimeoutExpired):
            handler.proc.wait(0.01)
        assert handler.proc.poll() is None
        handler.proc.terminate()
        assert handler.proc.wait() == -signal.SIGTERM
        handler.proc.send_signal(signal.SIGTERM)

    def test_a_program_that_does_not_exist(self, make: Callable[..., Any]) -> None:
        with pytest.raises(FileNotFoundError):
            make(entrypoint="/nonexistent")

    @pytest.mark.needs("numa-functions")
    def test_binding_to_cpus(
        self, impl: Implementation, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a host without the program ``numactl``."""
        cpu = min(os.sched_getaffinity(0))
        module = impl("numa.binding")
        finder = "_get_validated_logical_cpus_to_bind_to" if impl.is_torch else "cpus_for_worker"
        monkeypatch.setattr(module, finder, lambda *_args, **_options: {cpu})
        monkeypatch.setenv("PATH", str(tmp_path))
        options = module.NumaOptions(module.AffinityMode.NODE)

        def bound_to() -> str | None:
            script = (
                "while read name value; do test $name != Cpus_allowed_list: || echo $value; done < /proc/self/status"
            )
            try:
                handler = make("-c", script, stdout=str(tmp_path / "out"), numa_options=options)
            except FileNotFoundError:
                return None
            assert handler.proc.wait(60) == 0
            return (tmp_path / "out").read_text().strip()

        assert bound_to() == impl.expect("no-numactl", torch=None, ours=str(cpu))

    def test_a_program_in_the_path(self, make: Callable[..., Any]) -> None:
        assert make("-c", "exit 3", entrypoint="sh").proc.wait(60) == 3
