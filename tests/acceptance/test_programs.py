"""Programs that call torch's launcher: ``ferrorun --exec``, and ``ferroelastic.install()`` before the import of torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import FERRORUN, ROOT
from tests.support.waiting import eventually, is_alive

from ferroelastic import _exec

if TYPE_CHECKING:
    from tests.support.harness import Launcher

EXEC = (*FERRORUN, "--exec")
HOOK = str(Path(_exec.__file__).parent / "hook")

# Standard output of a worker: the threads of its agent, and the parts of the hook that it has inherited.
WORKER = """
import os, sys
threads = [open(f"/proc/{os.getppid()}/task/{task}/comm").read().strip() for task in os.listdir(f"/proc/{os.getppid()}/task")]
hooks = [name for name in ("PATH", "PYTHONPATH") if "/_exec/" in os.environ.get(name, "")]
hooks += [name for name in ("FERROELASTIC_EXEC",) if name in os.environ]
hooks += [name for name in ("ferroelastic._install",) if name in sys.modules]
print("ferro-sup" in threads, hooks, flush=True)
sys.exit(int(os.environ.get("CODE", "0")))
"""
OURS = "True []"

WARM_WORKER = """
import sys, sitecustomize
kind = getattr(sys, "_ferroelastic_warm", "cold")
# One write, so that the lines of two workers do not mix.
sys.stdout.write(f"{kind} {sitecustomize.marks} {'ferroelastic._install' in sys.modules}\\n")
"""

# A program that knows torch only.
PROGRAM = """
import sys
from torch.distributed.launcher.api import LaunchConfig, launch_agent
config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="demo", max_restarts=0
)
launch_agent(config, sys.executable, sys.argv[1:])
"""


def hooked(**variables: str) -> dict[str, str]:
    """The environment of a program of ``ferrorun --exec``."""
    environment = {"PATH": os.environ["PATH"], **variables}
    _exec._add(environment)
    return environment


def test_a_program_runs_our_agent_and_its_workers_do_not_inherit_the_hook(launch: Launcher) -> None:
    pytest.importorskip("torch")
    program, worker = launch.write("program.py", PROGRAM), launch.write("worker.py", WORKER)
    job = launch.start(*EXEC, sys.executable, program, worker)
    assert job.lines(2) == [OURS, OURS], job.story
    assert job.end() == 0, job.story


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_function_workers_do_not_inherit_the_hook(launch: Launcher, start_method: str) -> None:
    pytest.importorskip("torch")
    program = f"""
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, launch_agent

def work():
    return "/_exec/" in Path("/proc/self/environ").read_text()

if __name__ == "__main__":
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="demo",
        start_method={start_method!r},
    )
    print("/_exec/" in Path("/proc/self/environ").read_text(), launch_agent(config, work, []))
"""
    job = launch.start(*EXEC, sys.executable, launch.write("program.py", program))
    assert job.end() == 0, job.story
    assert job.output == b"True {0: False}\n"


@pytest.mark.parametrize(
    "options", [["-m", "torch.distributed.run"], ["-u", "-Bm", "torch.distributed.launch", "--use-env"]]
)
def test_torchs_launcher_as_a_module_is_ferrorun(launch: Launcher, options: list[str]) -> None:
    job = launch.start(
        *(*EXEC, sys.executable, *options, "--standalone", "--nproc-per-node=1", launch.write("worker.py", WORKER)),
        env={"CODE": "3"},
    )
    assert job.lines(1) == [OURS], job.story
    assert job.end() == 3, job.story


def test_a_program_that_installs_before_it_imports_torch(launch: Launcher) -> None:
    pytest.importorskip("torch")
    program = launch.write("program.py", f"import ferroelastic\nferroelastic.install()\n{PROGRAM}")
    job = launch.start(sys.executable, program, launch.write("worker.py", WORKER))
    assert job.lines(2) == [OURS, OURS], job.story
    assert job.end() == 0, job.story


def test_the_classes_of_torch_that_are_defined_under_the_hook_have_torchs_bases(launch: Launcher) -> None:
    pytest.importorskip("torch")
    program = """
import ferroelastic
ferroelastic.install()
import torch.distributed.run
ferroelastic.uninstall()
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
print({base.__module__.partition(".")[0] for base in LocalElasticAgent.__mro__} - {"abc", "builtins"})
"""
    job = launch.start(sys.executable, launch.write("program.py", program))
    assert job.end() == 0, job.story
    assert job.output == b"{'torch'}\n"


def test_a_thread_that_installs_during_the_import_of_torch_has_the_names(launch: Launcher) -> None:
    pytest.importorskip("torch")
    job = launch.start(
        sys.executable,
        launch.write(
            "program.py",
            """
import sys, threading, time
import ferroelastic

def install():
    while "torch.distributed.elastic.agent.server" not in sys.modules:
        time.sleep(0)
    ferroelastic.install()
    print(*{sys.modules[f"torch.distributed.{name}"].LocalElasticAgent.__module__ for name in names}, flush=True)

names = ("elastic.agent.server.local_elastic_agent",)
thread = threading.Thread(target=install)
thread.start()
import torch.distributed.run
thread.join()
print(torch.distributed.run.run.__module__, torch.distributed.launcher.api.LocalElasticAgent.__module__)
ferroelastic.uninstall()
agent = sys.modules["torch.distributed.elastic.agent.server.local_elastic_agent"].LocalElasticAgent
print({base.__module__.partition(".")[0] for base in agent.__mro__} - {"abc", "builtins"})
""",
        ),
    )
    assert job.end() == 0, job.story
    assert job.output.decode().splitlines() == [
        "ferroelastic.agent.server.local_elastic_agent",
        "ferroelastic.run ferroelastic.agent.server.local_elastic_agent",
        "{'torch'}",
    ]


def test_a_killed_program_takes_the_children_of_its_workers_with_it(launch: Launcher) -> None:
    pytest.importorskip("torch")
    script = launch.write("worker.sh", 'sleep 1000 &\necho $! > "$DIR/pid.tmp"\nmv "$DIR/pid.tmp" "$DIR/pid"\nwait\n')
    program = PROGRAM.replace("sys.executable, sys.argv[1:]", "sys.argv[1], sys.argv[2:]").replace(
        "nproc_per_node=2", "nproc_per_node=1"
    )
    job = launch.start(*EXEC, sys.executable, launch.write("program.py", program), "/bin/sh", script)
    assert eventually((launch.folder / "pid").exists, 60), job.story
    (child,) = launch.pids("pid")
    assert eventually(lambda: len(job.guards()) == 1), job.story  # an executed guard has its name after a while
    job.send(signal.SIGKILL)
    job.end()
    assert eventually(lambda: not is_alive(child))


def test_the_guard_of_a_program_ends_with_its_agent(launch: Launcher) -> None:
    pytest.importorskip("torch")
    program = f"{PROGRAM}\nprint('end', flush=True)\nsys.stdin.read()\n"
    reader, writer = os.pipe()
    job = launch.start(*EXEC, sys.executable, launch.write("program.py", program), "-c", "", stdin=reader)
    os.close(reader)
    job.lines(1)
    assert job.guards() == []
    os.close(writer)
    assert job.end() == 0, job.story


def test_a_shell_script_that_calls_torchrun(launch: Launcher) -> None:
    worker = launch.write("worker.py", WORKER)
    script = launch.write("script.sh", f"torchrun --standalone --nproc-per-node=1 {worker}\n")
    job = launch.start(*EXEC, "/bin/sh", script, env={"CODE": "7"})
    assert job.lines(1) == [OURS], job.story
    assert job.end() == 7, job.story


def test_a_second_python_inherits_the_hook(launch: Launcher) -> None:
    inner = launch.write("inner.py", "from ferroelastic import _install\nprint(_install.is_installed())")
    outer = launch.write(
        "outer.py", "import subprocess, sys\nsubprocess.run([sys.executable, sys.argv[1]], check=True)"
    )
    job = launch.start(*EXEC, sys.executable, outer, inner)
    assert job.end() == 0, job.story
    assert job.output == b"True\n"


@pytest.mark.parametrize("options", [["-S"], ["-I"], ["-E"]])
def test_a_python_that_reads_no_environment_has_no_hook(launch: Launcher, options: list[str]) -> None:
    program = launch.write("program.py", "import sys\nprint('ferroelastic._install' in sys.modules)")
    job = launch.start(*EXEC, sys.executable, *options, program)
    assert job.end() == 0, job.story
    assert job.output == b"False\n"


def test_ferrorun_within_ferrorun_within_exec(launch: Launcher) -> None:
    worker = launch.write("worker.py", WORKER)
    job = launch.start(
        *(*EXEC, *FERRORUN, "--standalone", "--no-python", "--nproc-per-node=1"),
        *(*FERRORUN, "--standalone", "--nproc-per-node=1", worker),
        env={"CODE": "5"},
    )
    assert job.lines(1) == [OURS], job.story
    assert job.end() == 5, job.story


@pytest.mark.parametrize("inherits", [False, True])
def test_the_hook_and_warm_workers_leave_the_users_sitecustomize(launch: Launcher, *, inherits: bool) -> None:
    """A zygote and the hook both take the place of ``sitecustomize``."""
    launch.write("sitecustomize.py", "marks = globals().get('marks', 0) + 1")
    program = f"""
import ferroelastic
ferroelastic.install(workers={inherits})
from ferroelastic.run import main
main(["--standalone", "--nproc-per-node=2", "--preload", "--warm-imports=json", {launch.write("worker.py", WARM_WORKER)!r}])
"""
    path = os.pathsep.join([str(launch.folder), *sys.path])
    job = launch.start(*EXEC, sys.executable, launch.write("program.py", program), env={"PYTHONPATH": path})
    assert job.lines(2) == [f"worker 1 {inherits}"] * 2, job.story
    assert job.end() == 0, job.story


def test_exec_within_exec_has_the_hook_once(launch: Launcher) -> None:
    program = "import os\nprint([os.environ[name].count('/_exec/') for name in ('PATH', 'PYTHONPATH')])"
    job = launch.start(*EXEC, *EXEC, sys.executable, launch.write("program.py", program))
    assert job.end() == 0, job.story
    assert job.output == b"[1, 1]\n"


def test_the_program_replaces_ferrorun(launch: Launcher) -> None:
    program = "import os, signal\nprint(os.getpid(), flush=True)\nsignal.pause()"
    job = launch.start(*EXEC, sys.executable, launch.write("program.py", program))
    assert job.lines(1) == [str(job.process.pid)]
    job.send(signal.SIGTERM)
    assert job.end() == -signal.SIGTERM


def test_the_program_has_the_signals_of_a_new_process(launch: Launcher) -> None:
    program = ("grep", "SigIgn", "/proc/self/status")
    job = launch.start(*EXEC, *program)
    assert job.end() == 0
    # The interpreter of `ferrorun` ignores SIGPIPE and SIGXFSZ.
    assert job.output == subprocess.run(program, capture_output=True, check=True).stdout


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_arguments_reach_the_program_unchanged(launch: Launcher, separator: list[str]) -> None:
    job = launch.start(*EXEC, *separator, "printf", "%s|", "--nnodes", "--", "--exec", "-h", "")
    assert job.end() == 0
    assert job.output == b"--nnodes|--|--exec|-h||"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "--exec needs a program, for example: ferrorun --exec accelerate launch train.py"),
        (["--nnodes=1"], 2, "--exec: '--nnodes=1' is an option; write the program right after --exec, and its options after it"),
        (["no-such-program"], 127, "--exec: program 'no-such-program' is not in PATH, or the interpreter of its first line is missing"),
        (["./no-such"], 127, "--exec: program './no-such' does not exist, or the interpreter of its first line is missing"),
        (["/etc/passwd"], 126, "--exec: program '/etc/passwd' cannot be executed: permission denied"),
    ],
)  # fmt: skip
def test_a_program_that_cannot_be_started_is_a_usage_error(words: list[str], code: int, message: str) -> None:
    ended = subprocess.run([*EXEC, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr) == (code, f"ferrorun: error: {message}\n")


def test_options_before_exec_are_a_usage_error() -> None:
    command = [*FERRORUN, "--nnodes=2", "--exec", "true"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 2
    assert "--exec must be the first argument" in ended.stderr


class TestSitecustomize:
    """The ``sitecustomize`` of the hook, and the one that it hides."""

    @staticmethod
    def run(python: str, program: str, environment: dict[str, str]) -> tuple[str, str]:
        ended = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, check=True)
        return ended.stdout, ended.stderr

    def test_that_of_the_user_runs_and_keeps_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text("print('of the user')")
        program = "import sys; print(sys.modules['sitecustomize'].__file__, 'ferroelastic._install' in sys.modules)"
        environment = hooked(PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
        assert self.run(sys.executable, program, environment) == (
            f"of the user\n{tmp_path / 'sitecustomize.py'} True\n",
            "",
        )

    def test_without_one_nothing_is_left(self, tmp_path: Path) -> None:
        venv.create(tmp_path, with_pip=False)
        program = "import sys; print('sitecustomize' in sys.modules, [one for one in sys.path if '_exec' in one])"
        assert self.run(str(tmp_path / "bin" / "python"), program, hooked()) == ("False []\n", "")

    @pytest.mark.parametrize("has_torch", [False, True])
    def test_an_environment_without_ferroelastic_runs_unchanged(self, tmp_path: Path, *, has_torch: bool) -> None:
        venv.create(tmp_path, with_pip=False)
        python = str(tmp_path / "bin" / "python")
        if has_torch:
            (folder,) = tmp_path.glob("lib/python*/site-packages")
            (folder / "torch").mkdir()
            (folder / "torch" / "__init__.py").touch()
        child = "import os; print([name for name in os.environ if '_exec' in os.environ[name] or 'EXEC' in name])"
        program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        output, errors = self.run(python, program, hooked())
        assert output == "[]\n"
        assert errors.count("\n") == has_torch
        if has_torch:
            assert errors == (
                f"ferrorun --exec: {python} runs without ferroelastic (ModuleNotFoundError: No module named 'ferroelastic'); "
                "install ferroelastic in its environment\n"
            )
