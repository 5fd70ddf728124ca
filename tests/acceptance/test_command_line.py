"""What stands on the command line of ``ferrorun``, and around it, is what workers get."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.harness import FERRORUN, Launcher

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torch")

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

# Leaves what it was given in a file.
SHOW = """
import json, os, sys
facts = {"argv": sys.argv, "name": __name__, "file": __file__, "env": dict(os.environ), "unbuffered": sys.stdout.write_through}
with open(f"{os.environ['DIR']}/facts.{os.environ['RANK']}", "w") as file:
    json.dump(facts, file)
"""

# Says the same on both streams.
SPEAK = """
import os, sys
for stream in (sys.stdout, sys.stderr):
    name = stream.name.strip("<>")
    print(f"loss of {os.environ['RANK']} on {name}\\nother words", file=stream)
"""


def facts(launch: Launcher, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(launch.read(f"facts.{rank}"))
    return found


def run(launch: Launcher, *arguments: str, nproc: int = 2, **env: str) -> None:
    job = launch(*arguments, nproc=nproc, env=env)
    assert job.end() == 0, job.story


def run_folder(launch: Launcher) -> Path:
    """The folder that the only run has made under ``--log-dir``."""
    (folder,) = (path for path in (launch.folder / "logs").iterdir() if not path.is_symlink())
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# ---- what a worker runs


@pytest.mark.parametrize("launcher", [FERRORUN, TORCHRUN], ids=["ferrorun", "torchrun"])
def test_a_script_gets_its_arguments_whatever_they_look_like(launch: Launcher, launcher: tuple[str, ...]) -> None:
    script = launch.write("show.py", SHOW)
    arguments = ["--nproc-per-node=9", "-m", "--lr", "0.1", "--", "--tee=3", "a b", "${local_rank}", "", "-x"]
    job = launch(script, *arguments, nproc=1, launcher=(*launcher, "--standalone"))
    assert job.end() == 0, job.story
    arguments[arguments.index("${local_rank}")] = "0"
    assert facts(launch)["argv"] == [script, *arguments]
    assert facts(launch)["name"] == "__main__"
    assert facts(launch)["unbuffered"]


def test_a_module(launch: Launcher) -> None:
    (launch.folder / "package").mkdir()
    launch.write("package/__init__.py", "")
    path = launch.write("package/show.py", SHOW)
    run(launch, "-m", "package.show", "--lr=1", PYTHONPATH=str(launch.folder))
    for rank in (0, 1):
        assert facts(launch, rank)["argv"] == [path, "--lr=1"]
        assert facts(launch, rank)["name"] == "__main__"


def test_a_script_in_an_interpreter_of_multiprocessing(launch: Launcher) -> None:
    script = launch.write("show.py", SHOW)
    run(launch, "--run-path", script, "--lr=1")
    for rank in (0, 1):
        assert facts(launch, rank)["argv"] == [script, "--lr=1"]
        assert facts(launch, rank)["name"] == "__main__"
        assert facts(launch, rank)["env"]["WORLD_SIZE"] == "2"


def test_a_script_in_an_interpreter_of_multiprocessing_that_fails(launch: Launcher) -> None:
    script = launch.write("fail.py", "raise ValueError('what was wrong')")
    job = launch("--run-path", script, nproc=1)
    assert job.end() == 1
    assert "ValueError: what was wrong" in job.errors


def test_a_program_that_is_not_python(launch: Launcher) -> None:
    job = launch("--no-python", "sh", "-c", 'echo "$0 $1 $RANK of $WORLD_SIZE"', "first", "second")
    assert job.end() == 0
    assert sorted(job.output.decode().splitlines()) == ["first second 0 of 2", "first second 1 of 2"]


def test_standard_input_is_inherited(launch: Launcher) -> None:
    read_fd, write_fd = os.pipe()
    script = launch.write("read.py", "import sys; print(sys.stdin.read().upper())")
    job = launch(script, nproc=1, stdin=read_fd)
    os.close(read_fd)
    os.write(write_fd, b"line for the worker")
    os.close(write_fd)
    assert job.end() == 0
    assert job.output == b"LINE FOR THE WORKER\n"


# ---- what it finds around it


def test_flags_from_the_environment(launch: Launcher) -> None:
    script = launch.write("show.py", SHOW)
    env = {"PET_STANDALONE": "1", "PET_NPROC_PER_NODE": "3", "PET_MAX_RESTARTS": "7", "PET_ROLE": "trainer"}
    job = launch.start(*FERRORUN, "--role=other", script, env=env)
    assert job.end() == 0, job.story
    found = facts(launch, 2)["env"]
    assert (found["WORLD_SIZE"], found["TORCHELASTIC_MAX_RESTARTS"], found["ROLE_NAME"]) == ("3", "7", "other")


def test_workers_have_the_environment_that_torchrun_gives_them(launch: Launcher) -> None:
    script = launch.write("show.py", SHOW)
    environments = []
    for launcher in (TORCHRUN, FERRORUN):
        job = launch(script, launcher=(*launcher, "--standalone"), env={"COMMON": "1"})
        assert job.end() == 0, job.story
        environments.append(facts(launch, 1)["env"])
    theirs, ours = environments
    assert set(ours) - set(theirs) == {"FERROELASTIC_RUN", "FERROELASTIC_STOP_FILE"}
    assert set(theirs) - set(ours) == set()
    differing = {name for name in theirs if theirs[name] != ours[name]}
    assert differing <= {
        "FERRO_TEST_JOB",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_ERROR_FILE",
        "TORCHELASTIC_RUN_ID",
    }
    assert ours["OMP_NUM_THREADS"] == "1"


def test_a_virtual_local_rank_sees_one_device(launch: Launcher) -> None:
    script = launch.write("show.py", SHOW)
    run(launch, "--virtual-local-rank", script, CUDA_VISIBLE_DEVICES="4,5")
    for rank, device in ((0, "4"), (1, "5")):
        env = facts(launch, rank)["env"]
        assert (env["RANK"], env["LOCAL_RANK"], env["CUDA_VISIBLE_DEVICES"]) == (str(rank), "0", device)


# ---- where its output goes


def test_redirected_output_is_in_the_log_folder_only(launch: Launcher) -> None:
    script = launch.write("speak.py", SPEAK)
    job = launch(f"--log-dir={launch.folder}/logs", "-r", "3", script)
    assert job.end() == 0, job.story
    assert job.output == b""
    assert "loss" not in job.errors
    assert contents(run_folder(launch)) == {
        f"attempt_0/{rank}/{name}.log": f"loss of {rank} on {name}\nother words\n"
        for rank in (0, 1)
        for name in ("stdout", "stderr")
    }


def test_streams_can_be_chosen_by_rank(launch: Launcher) -> None:
    script = launch.write("speak.py", SPEAK)
    job = launch(f"--log-dir={launch.folder}/logs", "-r", "0:1,1:2", script)
    assert job.end() == 0, job.story
    assert sorted(contents(run_folder(launch))) == ["attempt_0/0/stdout.log", "attempt_0/1/stderr.log"]
    assert job.output.decode().splitlines() == ["loss of 1 on stdout", "other words"]
    assert "loss of 0 on stderr" in job.errors


def test_teed_lines_have_the_prefix_of_the_template(launch: Launcher) -> None:
    script = launch.write("speak.py", SPEAK)
    template = "<${role_name} ${rank} ${local_rank}> "
    job = launch(
        f"--log-dir={launch.folder}/logs",
        "-t",
        "3",
        "--role=trainer",
        script,
        env={"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": template},
    )
    assert job.end() == 0, job.story
    for name, text in (("stdout", job.output.decode()), ("stderr", job.errors)):
        lines = [line for line in text.splitlines() if line.startswith("<")]
        expected = [
            f"<trainer {rank} {rank}> {text}"
            for rank in (0, 1)
            for text in (f"loss of {rank} on {name}", "other words")
        ]
        assert sorted(lines) == sorted(expected)
    assert len(contents(run_folder(launch))) == 4


def test_only_some_ranks_on_the_console(launch: Launcher) -> None:
    script = launch.write("speak.py", SPEAK)
    job = launch(f"--log-dir={launch.folder}/logs", "-t", "1", "--local-ranks-filter=1", script)
    assert job.end() == 0, job.story
    assert job.output.decode().splitlines() == ["[default1]:loss of 1 on stdout", "[default1]:other words"]
    assert sorted(contents(run_folder(launch))) == ["attempt_0/0/stdout.log", "attempt_0/1/stdout.log"]


def test_lines_of_interest_in_one_file(launch: Launcher) -> None:
    script = launch.write("speak.py", SPEAK)
    job = launch(f"--log-dir={launch.folder}/logs", "-t", "1", "--duplicate-stdout-filters=loss,epoch", script)
    assert job.end() == 0, job.story
    filtered = contents(run_folder(launch))["attempt_0/filtered_stdout.log"]
    assert sorted(filtered.splitlines()) == [f"[default{rank}]:loss of {rank} on stdout" for rank in (0, 1)]


def test_every_attempt_has_a_folder(launch: Launcher) -> None:
    script = launch.write("fail.py", "import os, sys; print(os.environ['TORCHELASTIC_RESTART_COUNT']); sys.exit(4)")
    job = launch(f"--log-dir={launch.folder}/logs", "-r", "1", "--max-restarts=2", script, nproc=1)
    assert job.end() == 4
    files = contents(run_folder(launch))
    assert json.loads(files.pop("failure.json"))["first"]["exit_code"] == 4
    assert files == {f"attempt_{n}/0/stdout.log": f"{n}\n" for n in range(3)}


# ---- what it says


def test_the_console_script_is_the_same_program(launch: Launcher) -> None:
    script = launch.write("show.py", SHOW)
    job = launch(script, "--lr=1", nproc=1, launcher=(f"{sys.exec_prefix}/bin/ferrorun", "--standalone"))
    assert job.end() == 0, job.story
    assert facts(launch)["argv"] == [script, "--lr=1"]


def test_a_failed_job_is_explained_once(launch: Launcher) -> None:
    job = launch(launch.write("fail.py", "raise ValueError('what was wrong')"), nproc=1)
    assert job.end() == 1
    output, _, report = job.errors.partition("fail.py FAILED")
    lines = [line for line in output.splitlines() if not line.startswith("{")]  # without the events
    assert lines.count("ValueError: what was wrong") == 1  # the worker's own traceback
    assert report.count("Root Cause (first observed failure):") == 1
    assert report.count("Traceback (most recent call last):") == 1


def test_a_usage_error_starts_nothing(launch: Launcher) -> None:
    job = launch(f"--log-dir={launch.folder}/logs", "--tee=9", launch.write("show.py", SHOW), nproc=1)
    assert job.end() == 2
    assert "9" in job.errors
    assert len(job.errors.splitlines()) == 1
    assert not list(launch.folder.glob("facts.*"))


def test_interrupting_a_job_from_the_terminal_ends_it_with_130(launch: Launcher) -> None:
    job = launch(launch.write("wait.py", "import signal, sys; sys.stdout.write('ready\\n'); signal.pause()"))
    assert job.lines(2) == ["ready"] * 2
    job.settle(2)
    job.send(signal.SIGINT)
    assert job.end() == 130


def test_help_needs_no_torch() -> None:
    code = "import sys; from ferroelastic.run import cli; sys.modules['torch'] = None; cli(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "--nproc-per-node" in done.stdout
