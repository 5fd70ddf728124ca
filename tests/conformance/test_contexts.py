"""``start_processes`` and the contexts it returns, for programs and for functions."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import workers
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conformance.implementations import Implementation
    from tests.support.waiting import WhenWaiting


@pytest.fixture
def start(impl: Implementation, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts one worker per tuple of arguments: ``start(entrypoint, arguments of rank 0, …)``."""
    contexts = []

    def build(entrypoint: Any, *args: tuple[Any, ...], **options: Any) -> Any:
        std = impl.mp.Std
        folder = options.pop("log_dir", str(tmp_path / "logs"))
        specs = impl.mp.DefaultLogsSpecs(
            folder,
            options.pop("redirects", std.NONE),
            options.pop("tee", std.NONE),
            options.pop("local_ranks_filter", None),
        )
        env = options.pop("env", {})
        contexts.append(
            impl.mp.start_processes(
                name=options.pop("name", "worker"),
                entrypoint=entrypoint,
                args=dict(enumerate(args)),
                envs={rank: {"RANK": str(rank), **env} for rank in range(len(args))},
                logs_specs=options.pop("logs_specs", specs),
                **({"start_method": "fork"} | options),
            )
        )
        return contexts[-1]

    yield build
    for context in contexts:
        context.close(signal.SIGKILL, 1)
    contexts.clear()  # pytest holds on to `build` while it looks for leaks


@pytest.fixture
def shell(start: Callable[..., Any]) -> Callable[..., Any]:
    """Starts one shell script per rank."""

    def build(*scripts: str, **options: Any) -> Any:
        return start("/bin/sh", *(("-c", script) for script in scripts), **options)

    return build


def finished(context: Any) -> Any:
    result = context.wait(60, period=0.02)
    assert result is not None
    return result


def exit_codes(failures: dict[int, Any]) -> dict[int, int]:
    return {rank: failure.exitcode for rank, failure in failures.items()}


def content(path: str | Path) -> str:
    return Path(path).read_text()


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


def test_what_a_context_tells(shell: Callable[..., Any]) -> None:
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


def test_who_ignores_the_signal_is_killed_after_the_timeout(shell: Callable[..., Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    context = shell(f"trap '' TERM; echo > {tmp_path}/ready; while :; do sleep 1000; done")
    content(tmp_path / "ready")
    context.close(signal.SIGTERM, timeout=1)
    assert context.subprocess_handlers[0].proc.poll() == -signal.SIGKILL


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


# ---- where the output goes


def test_redirects(impl: Implementation, shell: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    std = impl.mp.Std
    script = "echo out of $RANK; echo err of $RANK >&2"
    context = shell(*[script] * 4, redirects={0: std.ALL, 1: std.OUT, 2: std.ERR})
    result = finished(context)
    assert [content(result.stdouts[rank]) for rank in (0, 1)] == ["out of 0\n", "out of 1\n"]
    assert [content(result.stderrs[rank]) for rank in (0, 2)] == ["err of 0\n", "err of 2\n"]
    assert result.stdouts[0].endswith("/attempt_0/0/stdout.log")
    assert result.stderrs[0].endswith("/attempt_0/0/stderr.log")
    assert [result.stdouts[rank] for rank in (2, 3)] == [result.stderrs[rank] for rank in (1, 3)] == ["", ""]
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == ["out of 2", "out of 3"]
    assert sorted(shown.err.splitlines()) == ["err of 1", "err of 3"]


def test_teed_lines(impl: Implementation, shell: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    std = impl.mp.Std
    script = "echo out of $RANK; echo err of $RANK >&2"
    result = finished(shell(*[script] * 3, name="trainer", tee={0: std.ALL, 2: std.ERR}))
    assert (content(result.stdouts[0]), content(result.stderrs[2])) == ("out of 0\n", "err of 2\n")
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == ["[trainer0]:out of 0", "out of 1", "out of 2"]
    assert sorted(shown.err.splitlines()) == ["[trainer0]:err of 0", "[trainer2]:err of 2", "err of 1"]


def test_prefixes_of_teed_lines(
    impl: Implementation, shell: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    context = shell("echo a; echo b", "echo c", tee=impl.mp.Std.OUT, log_line_prefixes={0: "<zero> "})
    finished(context)
    assert sorted(capfd.readouterr().out.splitlines()) == ["<zero> a", "<zero> b", "[worker1]:c"]


def test_a_last_line_without_end(
    impl: Implementation, shell: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    finished(shell("printf unfinished", tee=impl.mp.Std.OUT))
    shown = capfd.readouterr().out
    assert shown == impl.expect("whole-lines", torch="[worker0]:unfinished", ours="[worker0]:unfinished\n")


def test_only_some_ranks_are_shown(
    impl: Implementation, shell: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    std = impl.mp.Std
    result = finished(
        shell(*["echo out of $RANK; echo err of $RANK >&2"] * 3, tee={0: std.OUT, 1: std.OUT}, local_ranks_filter={1})
    )
    assert [content(result.stdouts[rank]) for rank in (0, 1)] == ["out of 0\n", "out of 1\n"]
    assert result.stdouts[2] == result.stderrs[0] == result.stderrs[2] == os.devnull
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("[worker1]:out of 1\n", "err of 1\n")


def test_filtered_lines_of_all_ranks(
    impl: Implementation, shell: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    std = impl.mp.Std
    context = shell(
        "echo loss 1; echo other; echo loss 2; echo warning >&2",
        "echo loss 3; echo note >&2; echo error >&2",
        "echo loss 4; echo error 2 >&2",
        tee={0: std.ALL, 1: std.ALL, 2: std.OUT},
        duplicate_stdout_filters=["loss", "never"],
        duplicate_stderr_filters=["warn", "err"],
    )
    files = context.filtered_stdout, context.filtered_stderr
    finished(context)
    folder = Path(context.error_files[0]).parent.parent
    assert [Path(file.name) for file in files] == [folder / "filtered_stdout.log", folder / "filtered_stderr.log"]
    assert all(file.closed for file in files)
    assert sorted(content(folder / "filtered_stdout.log").splitlines()) == [
        "[worker0]:loss 1",
        "[worker0]:loss 2",
        "[worker1]:loss 3",
        "[worker2]:loss 4",
    ]
    assert sorted(content(folder / "filtered_stderr.log").splitlines()) == ["[worker0]:warning", "[worker1]:error"]
    assert "[worker0]:other\n" in capfd.readouterr().out


def test_no_logs_at_all(impl: Implementation, shell: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    context = shell("echo out", log_dir=os.devnull, redirects=impl.mp.Std.ALL, tee=impl.mp.Std.ALL)
    assert context.error_files == {0: os.devnull}
    assert context.envs[0]["TORCHELASTIC_ERROR_FILE"] == ""
    result = finished(context)
    assert (result.stdouts, result.stderrs) == ({0: ""}, {0: ""})
    assert capfd.readouterr().out == "out\n"


# ---- functions


def test_functions_return_values(impl: Implementation, start: Callable[..., Any]) -> None:
    context = start(workers.give, ("zero",), ({"one": [1]},), (None,))
    assert isinstance(context, impl.mp.MultiprocessContext)
    assert context.start_method == "fork"
    pids = context.pids()
    assert list(pids) == [0, 1, 2]
    result = finished(context)
    assert result.return_values == {0: "zero", 1: {"one": [1]}, 2: None}
    assert not result.is_failed()
    assert context.pids() == pids


def test_large_return_values(start: Callable[..., Any]) -> None:
    assert finished(start(workers.give, (b"x" * 3_000_000,))).return_values == {0: b"x" * 3_000_000}


def test_spawned_functions(impl: Implementation, start: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    context = start(
        workers.speak, ("hello",), name="fn", start_method="spawn", tee=impl.mp.Std.OUT, redirects=impl.mp.Std.ALL
    )
    result = finished(context)
    assert result.return_values == {0: "hello"}
    assert content(result.stdouts[0]) == "hello out\nhello child out\n"
    assert content(result.stderrs[0]) == "hello err\nhello child err\n"
    shown = capfd.readouterr()
    assert shown.out == "[fn0]:hello out\n[fn0]:hello child out\n"


def test_an_exception_in_a_function(impl: Implementation, start: Callable[..., Any], tmp_path: Path) -> None:
    ready = str(tmp_path / "ready")
    os.mkfifo(ready)
    both = ((workers.wait_and_raise_error, ready, "boom"), (workers.announce_and_wait, ready))
    context = start(workers.by_rank, both, both, redirects=impl.mp.Std.ALL)
    pids = context.pids()
    result = finished(context)
    assert exit_codes(result.failures) == {0: 1}
    failure = result.failures[0]
    assert (failure.local_rank, failure.pid) == (0, pids[0])
    assert failure.error_file == context.error_files[0]
    assert failure.message["message"] == "ValueError: boom"
    assert "in wait_and_raise_error" in failure.message["extraInfo"]["py_callstack"]
    is_logged = "ValueError: boom" in content(result.stderrs[0])
    assert is_logged == impl.expect("traceback-in-log", torch=False, ours=True)


@pytest.mark.parametrize(
    ("function", "argument", "exitcode"),
    [
        (workers.leave, 3, 3),
        (workers.leave_at_once, 4, 4),
        (workers.kill_self, signal.SIGKILL, -9),
        (workers.kill_self, signal.SIGSEGV, -11),
    ],
)
def test_how_a_function_ends(start: Callable[..., Any], function: Any, argument: Any, exitcode: int) -> None:
    result = finished(start(function, (argument,)))
    assert exit_codes(result.failures) == {0: exitcode}


@pytest.mark.parametrize("code", [0, False])
def test_sys_exit_0_is_a_success(start: Callable[..., Any], code: Any) -> None:
    result = finished(start(workers.leave, (code,)))
    assert (result.return_values, result.is_failed()) == ({0: None}, False)


def test_the_environment_of_a_function(start: Callable[..., Any], tmp_path: Path) -> None:
    finished(start(workers.write_environment, (str(tmp_path),), env={"MY_VARIABLE": "x"}))
    environment = json.loads(content(tmp_path / "0.json"))
    assert (environment["RANK"], environment["MY_VARIABLE"]) == ("0", "x")
    assert environment["TORCHELASTIC_ERROR_FILE"].endswith("/attempt_0/0/error.json")
    assert "MY_VARIABLE" not in os.environ


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_function_that_has_returned_is_held_until_all_have(
    start: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    arguments = (str(tmp_path), str(gate))
    context = start(workers.return_and_note_the_end, arguments, arguments, start_method=method)
    assert eventually((tmp_path / "returned 0").exists, 60)
    assert context.wait(0) is None
    with open(gate, "w"):
        pass
    assert sorted(finished(context).return_values) == [0, 1]
    assert [content(tmp_path / f"end of {rank}") for rank in range(2)] == ["returned 0,returned 1"] * 2


def test_functions_are_stopped(impl: Implementation, start: Callable[..., Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    context = start(workers.announce_and_wait, (str(tmp_path / "ready"),))
    content(tmp_path / "ready")
    assert context.wait(0) is None
    (process,) = context._pc.processes
    context.close(signal.SIGTERM, 30)
    assert process.exitcode == impl.expect("clean-handlers", torch=1, ours=-signal.SIGTERM)
    context.close()


_SENT_AFTER_FORK: list[signal.Signals] = []


def _send_after_fork() -> None:
    for number in _SENT_AFTER_FORK:
        os.kill(os.getpid(), number)


os.register_at_fork(after_in_child=_send_after_fork)


def test_a_signal_while_a_worker_is_being_forked(impl: Implementation, start: Callable[..., Any]) -> None:
    """Python ignores what a handler raises while it runs the hooks of a fork. The worker would live on."""
    _SENT_AFTER_FORK.append(signal.SIGTERM)
    try:
        result = finished(start(workers.give, ("it lives",)))
    finally:
        _SENT_AFTER_FORK.clear()
    is_lost = not result.is_failed()
    assert is_lost == impl.expect("clean-handlers", torch=True, ours=False)


def test_starting_functions_twice(start: Callable[..., Any]) -> None:
    context = start(workers.wait_for_ever, ())
    with pytest.raises(ValueError, match="process context already initialized"):
        context.start()


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


# ---- signals


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}),
        ("SIGUSR1", {"SIGUSR1"}),
        ("SIGUSR2, SIGTERM", {"SIGUSR2", "SIGTERM"}),
        ("SIGNONSENSE,SIGUSR1", {"SIGUSR1"}),
    ],
)
def test_which_signals_are_handled(
    impl: Implementation,
    shell: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    expected: set[str],
) -> None:
    if variable is not None:
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", variable)
    watched = [getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2")]
    before = {number: signal.getsignal(number) for number in watched}

    def changed() -> set[str]:
        return {number.name for number in watched if signal.getsignal(number) is not before[number]}

    context = shell("exit 0")
    assert changed() == expected
    finished(context)
    assert changed() == impl.expect("handlers-are-restored", torch=expected, ours=set())


def test_a_signal_raises_while_waiting(impl: Implementation, shell: Callable[..., Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    context = shell(f"read line < {tmp_path}/go; kill -TERM {os.getpid()}; exec sleep 1000")
    with pytest.raises(impl.mp.SignalException, match=rf"^Process {os.getpid()} got signal: ") as raised:
        tell_and_wait(context, tmp_path / "go")
    assert raised.value.sigval is signal.SIGTERM
    context.close(raised.value.sigval, 30)
    assert context.subprocess_handlers[0].proc.poll() == -signal.SIGTERM


def test_a_signal_while_closing(
    impl: Implementation, shell: Callable[..., Any], tmp_path: Path, when_waiting: WhenWaiting
) -> None:
    """The worker saves when it is told to end, and has the time to."""
    os.mkfifo(tmp_path / "ready")
    script = f"trap 'sleep 0.5; : > {tmp_path}/saved; exit 0' TERM; : > {tmp_path}/ready; while :; do sleep 0.01; done"
    context = shell(script)
    (tmp_path / "ready").read_text()
    when_waiting(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(impl.mp.SignalException):
        context.close(signal.SIGTERM, 30)
    was_saved = (tmp_path / "saved").exists()
    assert was_saved == impl.expect("signal-in-a-stop", torch=False, ours=True)
    context.close(signal.SIGTERM, 30)


def test_what_a_worker_that_succeeded_leaves_may_finish(
    impl: Implementation, shell: Callable[..., Any], tmp_path: Path
) -> None:
    """It is done before the result is there; torch does not wait for it."""
    os.mkfifo(tmp_path / "go")
    context = shell(f"(read line < {tmp_path}/go; sleep 0.3; : > {tmp_path}/saved) & exit 0")
    thread = threading.Thread(target=(tmp_path / "go").write_text, args=("\n",))
    thread.start()
    assert not finished(context).is_failed()
    was_saved = (tmp_path / "saved").exists()
    thread.join()
    assert was_saved == impl.expect("success-leaves-time", torch=False, ours=True)
    assert eventually((tmp_path / "saved").exists)


def tell_and_wait(context: Any, fifo: Path) -> None:
    fifo.write_text("\n")
    context.wait(60, period=0.01)


def test_nohup(impl: Implementation, shell: Callable[..., Any]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    finished(shell("exit 0"))
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert is_ignored == impl.expect("nohup", torch=False, ours=True)


def test_on_another_thread_signals_stay(shell: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    results = []
    thread = threading.Thread(target=lambda: results.append(finished(shell("exit 0"))))
    thread.start()
    thread.join(60)
    assert not results[0].is_failed()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "running on a child thread" in caplog.text
