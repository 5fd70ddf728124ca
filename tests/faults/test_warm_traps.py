"""Imports and commands that warm workers do not survive: each is detected, the workers start cold, and one line has the reason."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import ALONE, ROOT
from tests.support.waiting import LONG_S, eventually
from tests.support.warm import WORKER, cold_lines, expect_parked, name_of, start_warm, warm_processes

if TYPE_CHECKING:
    from tests.support.harness import Job, Launcher

pytestmark = pytest.mark.skipif(os.environ.get("FERROELASTIC_PIDFD") == "0", reason="warm workers need pidfds")

IMPORTS = {
    "device": ("import torch", "the imports have initialised cuda, which a forked process cannot use"),
    "thread": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
        r"the imports have started 1 thread\(s\) \(.+\), which a fork does not copy; OMP_NUM_THREADS=1 prevents those of math libraries",
    ),
    "descriptor": (
        "import os\nos.open('/dev/zero', os.O_RDONLY)",
        r"the imports have left descriptor \d+ open \(/dev/zero\)",
    ),
    "replaced descriptor": (
        "import os\nos.dup2(os.open('/dev/zero', os.O_RDONLY), 0)",
        r"the imports have left descriptor 0 open \(/dev/zero\)",
    ),
    "child": (
        "import subprocess\nsubprocess.Popen(['sleep', '1000'])",
        r"the imports have started process \d+, which would not be a child of the worker",
    ),
    "timer": (
        "import signal\nsignal.setitimer(signal.ITIMER_REAL, 1000)",
        "the imports have started a timer of the process, which a fork does not copy",
    ),
    "variable of a worker": (
        "import os\nrank = os.environ.get('LOCAL_RANK', '0')",
        "the imports have read the environment variable LOCAL_RANK, which is set for each worker",
    ),
    "folder": ("import os\nos.chdir('/')", "the imports have changed the working directory"),
    "tracer": (
        "import sys\nsys.settrace(lambda *_: None)",
        "a tracer, profiler or coverage tool runs in the interpreter",
    ),
    "profiler": (
        "import sys\nsys.setprofile(lambda *_: None)",
        "a tracer, profiler or coverage tool runs in the interpreter",
    ),
    "file": ("open(__file__, 'a').write('#')", "{folder}/light.py has changed during the imports"),
    "exception": (
        "def check():\n    raise ValueError('no\\nlicense')\ncheck()",
        r"importing light failed: ValueError: no license \({folder}/light.py:2\)",
    ),
    "long text": ("raise ValueError('x' * 1_000_000)", "importing light failed: ValueError: x+"),
    "exit": ("import sys\nsys.exit(7)", r"importing light failed: SystemExit: 7 \({folder}/light.py:2\)"),
    "interrupt": ("raise KeyboardInterrupt", r"importing light failed: KeyboardInterrupt: \({folder}/light.py:1\)"),
}


def runs_cold(job: Job, launch: Launcher, reason: str) -> None:
    """The reason is in the log before the restart, once. The restart is cold, and the job succeeds."""
    assert job.lines(1) == ["0 cold"]
    pattern = reason.replace("{folder}", re.escape(str(launch.folder)))
    assert eventually(lambda: bool(cold_lines(job)), LONG_S), job.story
    assert re.fullmatch(pattern, cold_lines(job)[0]), cold_lines(job)
    assert eventually(lambda: not warm_names(job), LONG_S), job.story
    launch.gates[0].let_pass()
    assert job.lines(1) == ["1 cold"]
    assert job.end() == 0, job.story
    assert len(cold_lines(job)) == 1, cold_lines(job)
    assert "Traceback" not in job.errors


def warm_names(job: Job) -> list[int]:
    return [pid for pid in job.processes() if name_of(pid) == "ferro-warm"]


@pytest.mark.parametrize("trap", IMPORTS)
def test_imports_that_a_fork_does_not_survive_are_refused(launch: Launcher, trap: str) -> None:
    launch.gate()
    light, reason = IMPORTS[trap]
    launch.write("torch.py", "class cuda:\n    is_initialized = staticmethod(lambda: True)\n")
    runs_cold(start_warm(launch, light=light), launch, reason)


@pytest.mark.parametrize(
    ("imports", "reason"),
    [
        ("nowhere", "importing nowhere failed: ModuleNotFoundError: No module named 'nowhere'"),
        ("light:build", r"calling light:build failed: RuntimeError: no vocabulary \({folder}/light.py:2\)"),
        ("light:missing", "calling light:missing failed: AttributeError: module 'light' has no attribute 'missing'"),
    ],
)
def test_missing_modules_and_failing_functions_are_refused(launch: Launcher, imports: str, reason: str) -> None:
    launch.gate()
    light = "def build():\n    raise RuntimeError('no vocabulary')\n"
    runs_cold(start_warm(launch, light=light, imports=imports), launch, reason)


def test_imports_that_do_not_end_are_ended(launch: Launcher) -> None:
    launch.gate()
    job = start_warm(
        launch, light="import threading\nthreading.Event().wait()", env={"FERROELASTIC_WARM_TIMEOUT_S": "0.5"}
    )
    runs_cold(job, launch, "the imports have not ended within 0.5 s")


@pytest.mark.parametrize(
    ("light", "reason"),
    [
        ("import threading\nthreading.Event().wait()", "the imports have not ended within 0.5 s"),
        ("raise ValueError('no license')", r"importing light failed: ValueError: no license \(.*/light.py:1\)"),
        ("import os\nos._exit(9)", r"the zygote \(pid \d+\) exited with code 9"),
        ("import os\nos.abort()", r"the zygote \(pid \d+\) was killed by signal 6"),
    ],
    ids=["endless", "exception", "exit", "abort"],
)
def test_a_preload_that_fails_lets_the_job_go_on(launch: Launcher, light: str, reason: str) -> None:
    job = start_warm(launch, "--preload", light=light, restarts=0, env={"FERROELASTIC_WARM_TIMEOUT_S": "0.5"})
    assert job.lines(1) == ["0 cold"]
    assert job.end() == 0
    assert cold_lines(job), job.story
    assert re.fullmatch(reason, cold_lines(job)[0]), cold_lines(job)
    assert len(cold_lines(job)) == 1, cold_lines(job)


def test_a_descriptor_of_a_loaded_library_is_no_reason_for_a_cold_start(launch: Launcher) -> None:
    light = """
import os
library = next(line.split()[-1] for line in open("/proc/self/maps") if "r-xp" in line and ".so" in line)
os.open(library, os.O_RDONLY)  # as libffi does
"""
    job = start_warm(launch, "--preload", light=light, restarts=0)
    assert job.lines(1) == ["0 warm"], job.story
    assert job.end() == 0


def test_without_pidfds_the_job_starts_cold(launch: Launcher) -> None:
    job = start_warm(launch, "--preload", light="", restarts=0, env={"FERROELASTIC_PIDFD": "0"})
    assert job.lines(1) == ["0 cold"]
    assert job.end() == 0
    (reason,) = cold_lines(job)
    assert reason.startswith("the zygote cannot be started: failed to create a pool of warm workers without pidfds"), (
        reason
    )


def test_functions_of_at_release_run_in_the_worker_before_its_script(launch: Launcher) -> None:
    light = "import os\nfrom ferroelastic import warm\n@warm.at_release\ndef set_rank():\n    global rank\n    rank = os.environ['RANK']\n"
    worker = "import light\nfrom ferroelastic import warm\nprint(f'{light.rank} {warm.is_warm()} {warm.in_zygote()}\\n', end='')"
    job = start_warm(launch, "--preload", light=light, worker=worker, restarts=0, nproc=2)
    assert sorted(job.lines(2)) == ["0 True False", "1 True False"]
    assert job.end() == 0
    assert cold_lines(job) == []


def test_a_function_of_at_release_that_fails_lets_its_worker_start_cold(launch: Launcher) -> None:
    """A cold worker calls the function at its registration, where the script can catch the error."""
    light = "from ferroelastic import warm\n@warm.at_release\ndef fail():\n    if warm.is_warm():\n        raise ValueError('no rank')\n"
    worker = "import light\nfrom ferroelastic import warm\nprint('warm' if warm.is_warm() else 'cold')"
    job = start_warm(launch, "--preload", light=light, worker=worker, restarts=0)
    assert job.lines(1) == ["cold"]
    assert job.end() == 0
    failed = [line for line in job.errors.splitlines() if "at_release" in line]
    place = f"({launch.folder}/light.py:5)"
    assert failed == [
        f"ferroelastic: a function of at_release failed, starting without warm imports: ValueError: no rank {place}"
    ]


def test_a_command_that_fits_in_no_message_starts_cold(launch: Launcher) -> None:
    filler = {f"FILLER_{number}": "x" * 100_000 for number in range(2)}
    job = start_warm(launch, "--preload", restarts=0, env=filler)
    assert job.lines(1) == ["0 cold"]
    assert job.end() == 0
    assert re.search(
        r"A worker starts without warm imports: its command and environment have 20\d{4} bytes", job.errors
    )


# ---- commands


def other_commands(launch: Launcher) -> dict[str, tuple[tuple[str, ...], str]]:
    script = str(launch.folder / "worker.py")
    wrapper = launch.write("wrapper", f'#!/bin/sh\nexec "{sys.executable}" -I "$@"\n')
    os.chmod(wrapper, 0o755)
    shell = launch.write("worker.sh", WORKER_IN_SHELL)
    return {
        "isolated": ((sys.executable, "-I", script), "the workers use the interpreter option -I"),
        "no site": ((sys.executable, "-S", script), "the workers use the interpreter option -S"),
        "text": ((sys.executable, "-c", WORKER), "the workers use the interpreter option -c"),
        "other interpreter": (
            (wrapper, script),
            rf"the workers run {re.escape(wrapper)}, not the interpreter of the agent \({re.escape(sys.executable)}\)",
        ),
        "shell": (
            ("/bin/sh", shell),
            rf"the workers run /bin/sh, not the interpreter of the agent \({re.escape(sys.executable)}\)",
        ),
    }


WORKER_IN_SHELL = """
echo "$TORCHELASTIC_RESTART_COUNT cold"
if test "$TORCHELASTIC_RESTART_COUNT" -lt "$TORCHELASTIC_MAX_RESTARTS"; then read x < "$DIR/gate"; exit 3; fi
"""


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
@pytest.mark.parametrize("command", ["isolated", "no site", "text", "other interpreter", "shell"])
def test_commands_that_no_zygote_can_run_start_cold(launch: Launcher, command: str, preload: tuple[str, ...]) -> None:
    launch.gate()
    program, reason = other_commands(launch)[command]
    job = start_warm(launch, *preload, "--no-python", program=program)
    runs_cold(job, launch, reason)


def test_a_script_that_poses_as_the_interpreter_is_found_out(launch: Launcher) -> None:
    """It would start the zygote with options that skip the hook, and the zygote would run the training."""
    launch.gate()
    wrapper = launch.write("python", f'#!/bin/sh\nexec "{sys.executable}" -I "$@"\n')
    os.chmod(wrapper, 0o755)
    program = launch.write(
        "posing.py",
        f"import sys\nsys.executable = {wrapper!r}\nfrom tests.faults.alone import main\nsys.exit(main())\n",
    )
    launch.write("light.py", "")
    job = launch(
        "--warm-workers",
        "--warm-imports=light",
        "--max-restarts=1",
        launch.write("worker.py", WORKER),
        launcher=(sys.executable, program, *ALONE[3:]),
        nproc=1,
        env={"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
    )
    runs_cold(job, launch, rf"{re.escape(wrapper)} is not the interpreter itself, and may start it with other options")


# ---- changes after the import


def change_time(path: Path) -> None:
    os.utime(path, (1_000_000_000, 1_000_000_000))


def change_size(path: Path) -> None:
    stat = path.stat()
    path.write_text("longer = 1\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [change_time, change_size, Path.unlink], ids=["time", "size", "deleted"])
def test_a_module_that_changes_after_its_import_is_imported_again(launch: Launcher, change: object) -> None:
    gate = launch.gate()
    job = start_warm(launch, restarts=2)
    assert job.lines(1) == ["0 cold"]
    expect_parked(job, 1)
    change(launch.folder / "light.py")  # type: ignore[operator]
    gate.let_pass()
    assert job.lines(1) == ["1 cold"]
    assert eventually(lambda: bool(cold_lines(job)), LONG_S)
    assert cold_lines(job)[0] == f"{launch.folder}/light.py has changed since its import"
    if change is not Path.unlink:  # a new zygote has imported the new file
        expect_parked(job, 1)
    gate.let_pass()
    assert job.lines(1) == [f"2 {'cold' if change is Path.unlink else 'warm'}"]
    assert job.end() == 0


def write_archive(path: Path, value: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archived/__init__.py", "")
        archive.writestr("archived/part.py", f"# {value}\n")
        archive.writestr("of_worker.py", f"value = {value!r}\n")


@pytest.mark.parametrize("imports", ["light,archived.part", "light"], ids=["imported", "searched"])
def test_an_archive_that_changes_after_an_import_is_read_again(launch: Launcher, imports: str) -> None:
    """An importer keeps the places of the modules in the archive. So the archive counts even if only the worker imports from it."""
    gate = launch.gate()
    archive = launch.folder / "archive.zip"
    write_archive(archive, "old")
    os.utime(archive, (1_000_000_000, 1_000_000_000))
    paths = (str(archive), str(ROOT), os.environ.get("PYTHONPATH"))
    job = start_warm(
        launch,
        imports=imports,
        worker="import of_worker\nprint(of_worker.value, flush=True)\n" + WORKER,
        env={"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert job.lines(2) == ["0 cold", "old"]
    expect_parked(job, 1)
    write_archive(archive, "another value of a greater length")
    gate.let_pass()
    assert job.lines(2) == ["1 cold", "another value of a greater length"]
    assert cold_lines(job)[0] == f"{archive} has changed since its import"
    assert job.end() == 0


def test_a_restart_does_not_wait_for_imports(launch: Launcher) -> None:
    gate, hold = launch.gate(), launch.gate("hold")
    light = "import os\nopen(os.environ['DIR'] + '/importing', 'w').close()\nopen(os.environ['DIR'] + '/hold', 'rb', buffering=0).read(1)"
    job = start_warm(launch, light=light, restarts=2)
    assert job.lines(1) == ["0 cold"]
    assert eventually((launch.folder / "importing").exists, LONG_S)
    gate.let_pass()
    assert job.lines(1) == ["1 cold"]
    assert cold_lines(job) == ["the imports of the zygote have not ended yet"]
    hold.let_pass()
    expect_parked(job, 1)
    gate.let_pass()
    assert job.lines(1) == ["2 warm"]
    assert job.end() == 0
    assert len(cold_lines(job)) == 1


def test_two_rounds_of_crashes_in_a_row_end_warm_starts(launch: Launcher) -> None:
    gate = launch.gate()
    crash = "import signal\n" + WORKER.replace("sys.exit(3)", "os.kill(os.getpid(), signal.SIGSEGV)")
    job = start_warm(launch, worker=crash, restarts=4)
    for attempt, kind in enumerate(["cold", "warm", "warm", "cold", "cold"]):
        assert job.lines(1) == [f"{attempt} {kind}"]
        if attempt < 2:
            expect_parked(job, 1)
        if attempt < 4:
            gate.let_pass()
    assert job.end() == 0
    assert cold_lines(job) == ["warm workers crashed in 2 rounds in a row (SIGSEGV)"]
    assert not warm_processes(job).parked


@pytest.mark.parametrize(("first", "second"), [("SIGSEGV", "SIGTERM"), ("SIGKILL", "SIGKILL")])
def test_other_ends_of_warm_workers_do_not_count_as_crashes(launch: Launcher, first: str, second: str) -> None:
    gate = launch.gate()
    end = f"os.kill(os.getpid(), (signal.{first}, signal.{second})[attempt % 2])"
    job = start_warm(launch, worker="import signal\n" + WORKER.replace("sys.exit(3)", end), restarts=4)
    for attempt in range(5):
        assert job.lines(1) == [f"{attempt} {'warm' if attempt else 'cold'}"]
        if attempt < 4:
            expect_parked(job, 1)
            gate.let_pass()
    assert job.end() == 0
    assert not cold_lines(job)


def test_variables_that_an_import_sets_reach_the_worker(launch: Launcher) -> None:
    gate = launch.gate()
    light = "import os\nos.environ['OF_IMPORT'] = 'set'\nos.environ['CHANGED'] = 'by import'\nos.environ.pop('REMOVED', None)\n"
    worker = WORKER + "\nprint([os.environ.get(name) for name in ('OF_IMPORT', 'CHANGED', 'REMOVED')])\n"
    job = start_warm(launch, light=light, worker=worker, env={"CHANGED": "by user", "REMOVED": "1"})
    job.lines(1)
    expect_parked(job, 1)
    gate.let_pass()
    assert job.lines(2) == ["1 warm", "['set', 'by import', None]"]
    assert job.end() == 0
