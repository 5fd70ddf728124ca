"""``start_processes`` and the contexts that it returns, for programs, and the arguments that it refuses."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import workers
from tests.conformance.contexts import content, exit_codes, finished
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conformance.implementations import Implementation


# ---- programs


def test_programs_that_succeed(impl: Implementation, shell: Callable[..., Any]) -> None:
    context = shell("exit 0", "exit 0")
    assert isinstance(context, impl.mp.SubprocessContext)
    assert isinstance(context, impl.mp.PContext)
    result = finished(context)
    assert isinstance(result, impl.mp.RunProcsResult)
    assert not result.is_failed()
    assert (result.return_values, result.failures) == ({0: None, 1: None}, {})
    assert (result.stdouts, result.stderrs) == ({0: "", 1: ""}, {0: "", 1: ""})


@pytest.mark.needs("filtered-files")
def test_attributes_of_a_context(shell: Callable[..., Any]) -> None:
    context = shell("exec sleep 1000", "exec sleep 1000", name="trainer")
    assert (context.name, context.entrypoint, context.nprocs) == ("trainer", "/bin/sh", 2)
    assert context.args == {0: ("-c", "exec sleep 1000"), 1: ("-c", "exec sleep 1000")}
    assert context.envs[1]["RANK"] == "1"
    assert context.error_files[1].endswith("/attempt_0/1/error.json")
    assert (context.filtered_stdout, context.filtered_stderr) == (None, None)
    assert context.pids() == {rank: handler.proc.pid for rank, handler in context.subprocess_handlers.items()}
    assert all(os.getpgid(pid) == os.getsid(pid) == pid for pid in context.pids().values())


def test_waiting_has_an_end(shell: Callable[..., Any]) -> None:
    context = shell("exec sleep 1000")
    assert context.wait(0) is None
    assert context.wait(0.05, period=0.01) is None
    assert context._poll() is None


def test_the_environment_of_a_program(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    monkeypatch.setenv("CHANGED", "by the agent")
    code = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    context = start(sys.executable, ("-c", code, tmp_path / "env"), env={"CHANGED": "for the worker"})
    finished(context)
    environment = json.loads(content(tmp_path / "env"))
    expected = {"INHERITED": "yes", "CHANGED": "for the worker", "RANK": "0"}
    assert {name: environment.get(name) for name in expected} == expected
    assert environment["TORCHELASTIC_ERROR_FILE"] == context.error_files[0]


def test_arguments_become_text(start: Callable[..., Any], tmp_path: Path) -> None:
    finished(start("/bin/sh", ("-c", f'echo "$@" > {tmp_path}/out', "sh", 1, 2.5, None, tmp_path)))
    assert content(tmp_path / "out") == f"1 2.5 None {tmp_path}\n"


def test_a_program_that_does_not_exist(start: Callable[..., Any]) -> None:
    with pytest.raises(FileNotFoundError):
        start("/nonexistent/program", ())


@pytest.mark.needs("stopped-are-failures")
def test_only_real_failures_are_failures(impl: Implementation, shell: Callable[..., Any]) -> None:
    context = shell("exec sleep 1000", "exit 7", "exec sleep 1000")
    pids = context.pids()
    result = finished(context)
    assert result.is_failed()
    assert result.return_values == {}
    assert exit_codes(result.failures) == impl.expect("real-failures", torch={0: -15, 1: 7, 2: -15}, ours={1: 7})
    assert (result.failures[1].pid, result.failures[1].local_rank) == (pids[1], 1)
    assert exit_codes(getattr(result, "stopped", {})) == impl.expect("real-failures", torch={}, ours={0: -15, 2: -15})


def test_death_by_a_signal(shell: Callable[..., Any]) -> None:
    failure = finished(shell("kill -SEGV $$")).failures[0]
    assert (failure.exitcode, failure.signal_name()) == (-signal.SIGSEGV, "SIGSEGV")
    assert failure.message == f"Signal 11 (SIGSEGV) received by PID {failure.pid}"


def test_the_error_that_a_worker_leaves(shell: Callable[..., Any]) -> None:
    error = '{"message": {"message": "boom", "extraInfo": {"py_callstack": "trace", "timestamp": "17"}}}'
    failure = finished(shell(f"echo '{error}' > $TORCHELASTIC_ERROR_FILE; exit 3")).failures[0]
    assert (failure.exitcode, failure.timestamp, failure.message["message"]) == (3, 17, "boom")


def test_a_damaged_error_file(impl: Implementation, shell: Callable[..., Any]) -> None:
    def survives() -> bool:
        try:
            return bool(finished(shell("echo '{' > $TORCHELASTIC_ERROR_FILE; exit 3")).is_failed())
        except ValueError:
            return False

    assert survives() == impl.expect("corrupt-error-file", torch=False, ours=True)


def test_starting_twice(shell: Callable[..., Any]) -> None:
    context = shell("exec sleep 1000")
    with pytest.raises(ValueError, match="subprocess handlers already initialized"):
        context.start()


def test_close_stops_and_may_be_repeated(shell: Callable[..., Any]) -> None:
    context = shell("exec sleep 1000", "exit 0")
    handlers = context.subprocess_handlers
    handlers[1].proc.wait(60)
    context.close()
    assert (handlers[0].proc.poll(), handlers[1].proc.poll()) == (-signal.SIGTERM, 0)
    context.close()
    assert context._close(signal.SIGTERM, 30) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_close_with_another_signal(shell: Callable[..., Any], number: signal.Signals) -> None:
    context = shell("exec sleep 1000")
    context.close(number, 30)
    assert context.subprocess_handlers[0].proc.poll() == -number


def test_a_worker_that_ignores_the_signal_is_killed_after_the_timeout(
    shell: Callable[..., Any], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "ready")
    context = shell(f"trap '' TERM; echo > {tmp_path}/ready; while :; do sleep 1000; done")
    content(tmp_path / "ready")
    context.close(signal.SIGTERM, timeout=1)
    assert context.subprocess_handlers[0].proc.poll() == -signal.SIGKILL


@pytest.mark.needs("stopped-are-failures")
def test_the_peers_of_a_failed_worker_have_time(
    impl: Implementation, shell: Callable[..., Any], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "ready")
    saving = f"""
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open("{tmp_path}/ready", "w").write("ready")
signal.sigwait([signal.SIGTERM])
open("{tmp_path}/saved", "w").write("saved\\n")
sys.exit(4)
"""
    result = finished(shell(f"exec {sys.executable} -c '{saving}'", f"cat {tmp_path}/ready; exit 9"))
    assert content(tmp_path / "saved") == "saved\n"
    assert exit_codes(result.failures) == impl.expect("real-failures", torch={0: 4, 1: 9}, ours={1: 9})


def test_children_of_a_dead_worker(impl: Implementation, shell: Callable[..., Any], tmp_path: Path) -> None:
    """torch leaves them running."""
    finished(shell(f"sleep 1000 & echo $! > {tmp_path}/pid; exit 5"))
    child = int(content(tmp_path / "pid"))

    def is_gone() -> bool:
        try:
            return content(f"/proc/{child}/stat").rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    assert is_gone() == impl.expect("whole-groups", torch=False, ours=True)
    if not is_gone():
        os.kill(child, signal.SIGKILL)
        assert eventually(is_gone)


# ---- what is refused


@pytest.mark.parametrize("entrypoint", ["/bin/true", workers.give])
@pytest.mark.parametrize(
    ("args", "envs", "message"),
    [
        ({0: (), 2: ()}, {0: {}, 1: {}}, "args, local rank mapping mismatch"),
        ({0: (), 1: ()}, {0: {}}, "envs, local rank mapping mismatch"),
        ({1: ()}, {1: {}}, "args, local rank mapping mismatch"),
    ],
)
def test_gaps_between_ranks(
    impl: Implementation, tmp_path: Path, entrypoint: Any, args: Any, envs: Any, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message) as raised:
        impl.mp.start_processes("worker", entrypoint, args, envs, impl.mp.DefaultLogsSpecs(str(tmp_path)))
    assert "expected: {0" in str(raised.value)


def test_logs_that_do_not_cover_all_ranks(impl: Implementation, start: Callable[..., Any]) -> None:
    class Specs(impl.mp.LogsSpecs):  # type: ignore[misc,name-defined]  # whose class is known when the test runs
        root_log_dir = ""

        def reify(self, envs: Any) -> Any:
            return impl.mp.LogsDest(stdouts={0: ""}, stderrs={0: "", 1: ""}, error_files={0: "", 1: ""})

    with pytest.raises(RuntimeError, match="stdouts, local rank mapping mismatch"):
        start("/bin/true", (), (), logs_specs=Specs())


def test_abstract_context(impl: Implementation, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="abstract"):
        impl.mp.PContext("x", "/bin/true", {}, {}, impl.mp.DefaultLogsSpecs(str(tmp_path)))


def test_a_context_that_was_written_for_torch(impl: Implementation, tmp_path: Path) -> None:
    """A subclass has three methods, and gets the waiting, the logs and the signals."""

    class Instant(impl.mp.PContext):  # type: ignore[misc,name-defined]  # as above
        looks = 0

        def _start(self) -> None:
            self.closed_with: Any = None

        def _poll(self) -> Any:
            self.looks += 1
            return impl.mp.RunProcsResult(return_values={0: "done"}) if self.looks == 3 else None

        def pids(self) -> dict[int, int]:
            return {0: 1}

        def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
            self.closed_with = (death_sig, timeout)

    context = Instant("x", workers.give, {0: ()}, {0: {}}, impl.mp.DefaultLogsSpecs(str(tmp_path)))
    context.start()
    assert context.wait(0) is None
    assert context.wait(-1, period=0.001).return_values == {0: "done"}
    context.close(timeout=4)
    assert context.closed_with == (signal.SIGTERM, 4)
