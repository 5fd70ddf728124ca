from __future__ import annotations

import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from ferroelastic.multiprocessing import DefaultLogsSpecs, LogsSpecs, Std

if TYPE_CHECKING:
    from pathlib import Path

Envs = dict[int, dict[str, str]]


def envs(count: int, **common: str) -> Envs:
    return {rank: dict(common) for rank in range(count)}


def test_folders_and_files_of_an_attempt(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), redirects={0: Std.ALL}, tee={1: Std.OUT})
    environments = envs(2, TORCHELASTIC_RUN_ID="job", TORCHELASTIC_RESTART_COUNT="4")
    dest = specs.reify(environments)

    (run,) = tmp_path.iterdir()
    assert run.name.startswith("job_")
    attempt = run / "attempt_4"
    assert dest.stdouts == {0: f"{attempt}/0/stdout.log", 1: f"{attempt}/1/stdout.log"}
    assert dest.stderrs == {0: f"{attempt}/0/stderr.log", 1: ""}
    assert dest.tee_stdouts == {1: f"{attempt}/1/stdout.log"}
    assert dest.tee_stderrs == {}
    assert dest.error_files == {rank: f"{attempt}/{rank}/error.json" for rank in (0, 1)}
    assert {rank: env["TORCHELASTIC_ERROR_FILE"] for rank, env in environments.items()} == dest.error_files
    assert dest.filtered_stdout == f"{attempt}/filtered_stdout.log"
    assert dest.filtered_stderr == f"{attempt}/filtered_stderr.log"
    assert (attempt / "0").is_dir()
    assert (attempt / "1").is_dir()


def test_an_earlier_attempt_is_never_deleted(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT)
    first = specs.reify(envs(1))
    with open(first.stdouts[0], "w") as log:
        log.write("precious")
    paths = [specs.reify(envs(1)).stdouts[0] for _ in range(2)]
    folders = [os.path.basename(os.path.dirname(os.path.dirname(path))) for path in [first.stdouts[0], *paths]]
    assert folders == ["attempt_0", "attempt_0.1", "attempt_0.2"]
    with open(first.stdouts[0]) as log:
        assert log.read() == "precious"


def test_ranks_outside_the_filter_do_not_show(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), redirects={10: Std.ERR}, tee=Std.OUT, local_ranks_filter={11})
    dest = specs.reify(envs(12))
    assert list(dest.tee_stdouts) == [11]
    assert dest.stdouts[10].endswith("/10/stdout.log")
    assert dest.stderrs[10].endswith("/10/stderr.log")
    assert dest.stderrs[0] == os.devnull
    assert dest.stderrs[11] == ""


def test_devnull_writes_nothing() -> None:
    specs = DefaultLogsSpecs(os.devnull, redirects=Std.ALL, tee=Std.ALL)
    environments = envs(2)
    dest = specs.reify(environments)
    assert dest.stdouts == {0: "", 1: ""}
    assert dest.tee_stderrs == {0: os.devnull, 1: os.devnull}
    assert dest.error_files == {0: os.devnull, 1: os.devnull}
    assert environments[1]["TORCHELASTIC_ERROR_FILE"] == ""
    assert dest.filtered_stdout == os.devnull


def test_no_log_dir_makes_a_temporary_one() -> None:
    specs = DefaultLogsSpecs()
    assert os.path.isdir(specs.root_log_dir)
    os.rmdir(specs.root_log_dir)


def test_a_file_as_log_dir_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        DefaultLogsSpecs(str(file))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_an_unwritable_log_dir_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    specs = DefaultLogsSpecs(str(tmp_path))
    with pytest.raises(PermissionError, match="failed to create log folder"):
        specs.reify(envs(1))


def test_an_impossible_log_dir_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"failed to create log folder .*choose a writable log_dir"):
        DefaultLogsSpecs(str(tmp_path / "file" / "logs"))


def test_a_run_id_may_hold_slashes(tmp_path: Path) -> None:
    DefaultLogsSpecs(str(tmp_path)).reify(envs(1, TORCHELASTIC_RUN_ID="team/job"))
    assert [path.name[:9] for path in tmp_path.iterdir()] == ["team_job_"]


def test_no_workers_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert DefaultLogsSpecs(str(tmp_path)).reify({}).stdouts == {}
    assert "Empty envs map" in caplog.text


def test_equality_and_repr(tmp_path: Path) -> None:
    one, same = (DefaultLogsSpecs(str(tmp_path), tee=Std.OUT) for _ in range(2))
    assert one == same
    assert one != DefaultLogsSpecs(str(tmp_path))
    assert one != "something else"
    assert f"root_log_dir={tmp_path}" in repr(one)


def test_logs_specs_is_abstract() -> None:
    with pytest.raises(TypeError):
        LogsSpecs()  # type: ignore[abstract]  # the point


def run_with_link(root: Path) -> str:
    """Make the folder of a run; return its name."""
    specs = DefaultLogsSpecs(str(root))
    specs.link_latest = True
    names = {os.path.relpath(specs.reify(envs(1)).error_files[0], root).split(os.sep)[0] for _attempt in range(2)}
    (name,) = names
    return name


def test_a_link_points_to_the_newest_run(tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        runs.append(run_with_link(tmp_path))
        assert os.readlink(tmp_path / "latest") == runs[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*runs, "latest"])


def test_a_broken_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("deleted")
    assert run_with_link(tmp_path) == os.readlink(tmp_path / "latest")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_or_a_file_is_never_replaced_by_the_link(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    latest = tmp_path / "latest"
    latest.mkdir() if kind == "folder" else latest.write_text("mine")
    run = run_with_link(tmp_path)
    assert not latest.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {run, "latest"}
    assert f"failed to link {latest} to the log folder of this run, {tmp_path / run}: it exists" in caplog.text


def test_jobs_that_start_together_leave_a_link_to_one_of_them(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(run_with_link, [tmp_path] * 40))
    assert os.readlink(tmp_path / "latest") in runs
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*runs, "latest"])
