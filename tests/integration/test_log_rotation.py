"""Log files with a size limit, while their writers hold them open."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.integration.test_log_lines import Ended

from ferroelastic._usage import UsageError
from ferroelastic._usage_logs import parse_log_options
from ferroelastic.multiprocessing import DefaultLogsSpecs, LogOptions, Std, start_processes
from ferroelastic.run import parse_args

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

LINES = 40_000
WIDTH = 99
FLOOD = """
import os, sys
lines, width = int(sys.argv[1]), int(sys.argv[2])
for start in range(0, lines, 100):
    text = "".join(f"{line:0{width}}\\n" for line in range(start, start + 100))
    os.write(1, text.encode())
    if len(sys.argv) > 3 and start == lines // 2:
        os.system(sys.argv[3])
"""


def content(current: Path) -> str:
    """Lines of a log file and of its numbered files, oldest first. Without the spaces and the hole at the start of the current file."""
    numbered = sorted(current.parent.glob(f"{current.name}.[0-9]*"), key=lambda path: -int(path.suffix[1:]))
    texts = [path.read_text() for path in numbered]
    assert all(re.match("[0-9]", text) and text.endswith("\n") for text in texts), (
        "a numbered file has whole lines only"
    )
    rest = re.sub(r"\A[\0 ]+\n", "", current.read_text())
    return "".join([*texts, rest.lstrip("\0")])


def flood(folder: Path, *line: str, command: str = "") -> Ended:
    (folder / "flood.py").write_text(FLOOD)
    return Ended(folder, *line, "flood.py", str(LINES), str(WIDTH), *filter(None, [command]))


ALL = "".join(f"{line:0{WIDTH}}\n" for line in range(LINES))


def test_no_line_is_lost_or_torn(tmp_path: Path) -> None:
    options = ("--tee=1", "--log-max-size=512K", "--log-max-files=99", "--warn-on-log=000$=a thousand")
    job = flood(tmp_path, *options, command="sleep 0.5")
    assert job.code == 0, job.errors
    shown: dict[str, list[str]] = {"[default0]": [], "[default1]": []}
    for line in job.output.decode().splitlines():
        head, _, text = line.partition(":")
        shown[head].append(text)
    for rank, head in enumerate(shown):
        assert "".join(f"{text}\n" for text in shown[head]) == ALL
        folder = tmp_path / "logs" / "latest" / "attempt_0" / str(rank)
        assert len(list(folder.glob("stdout.log.*"))) > 2
        assert content(folder / "stdout.log") == ALL
    assert "failed" not in job.errors


def test_the_oldest_files_are_deleted(tmp_path: Path) -> None:
    job = flood(tmp_path, "--redirects=1", "--log-max-size=256K", "--log-max-files=2", command="sleep 0.5")
    assert job.code == 0, job.errors
    (tmp_path / "logs" / "latest").resolve()
    folder = tmp_path / "logs" / "latest" / "attempt_0" / "0"
    assert {path.name for path in folder.glob("stdout.log.*")} <= {"stdout.log.1", "stdout.log.2"}
    kept = content(folder / "stdout.log")
    assert ALL.endswith(kept)
    assert kept


def append_lines(lines: int) -> None:
    for line in range(lines):
        sys.stdout.write(f"{line:0{WIDTH}}\n")
    sys.stdout.flush()
    time.sleep(1)
    sys.stdout.write("the end\n")
    sys.stdout.flush()


def test_function_workers_append_to_the_shortened_file(tmp_path: Path) -> None:
    context = start_processes(
        "worker",
        append_lines,
        {0: (LINES,)},
        {0: {}},
        DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT),
        start_method="fork",
        log_options=LogOptions(max_size=1 << 18, max_files=99),
    )
    result = context.wait(60)
    assert result is not None
    assert not result.is_failed()
    current = Path(context.stdouts[0])
    assert current.with_name("stdout.log.1").exists()
    assert content(current) == f"{ALL}the end\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory of 6 MiB. It frees ranges of files and does not remove them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)], check=False, capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("cannot mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_system_without_removal_frees_the_space(tmp_path: Path, small_disk: Path) -> None:
    job = flood(
        tmp_path, "--nproc-per-node=1", f"--log-dir={small_disk}", "--redirects=1", "--log-max-size=512K",
        "--log-max-files=2", command="sleep 0.5",
    )  # fmt: skip
    assert job.code == 0, job.errors
    (current,) = small_disk.glob("latest/attempt_0/0/stdout.log")
    assert ALL.endswith(content(current))
    assert current.stat().st_blocks * 512 < current.stat().st_size


def test_a_full_disk_is_reported_once_and_the_job_goes_on(tmp_path: Path, small_disk: Path) -> None:
    fill = f"dd if=/dev/zero of={small_disk}/full bs=64k 2>/dev/null; sleep 1"
    job = flood(
        tmp_path, "--nproc-per-node=1", f"--log-dir={small_disk}", "--redirects=1", "--log-max-size=1M", command=fill
    )  # fmt: skip
    assert "which is larger than its limit: No space left on device" in job.errors, job.errors
    assert job.errors.count("larger than its limit") == 1


def test_a_deleted_log_folder_is_reported_once_and_the_job_goes_on(tmp_path: Path) -> None:
    command = f"rm -r {tmp_path}/logs; sleep 1"
    job = flood(tmp_path, "--nproc-per-node=1", "--tee=1", "--log-max-size=256K", command=command)
    assert job.code == 0, job.errors
    assert job.output.decode().replace("[default0]:", "") == ALL
    assert job.errors.count("which is larger than its limit: No such file or directory") == 1
    shutil.rmtree(tmp_path / "logs", ignore_errors=True)


@pytest.mark.parametrize("text", ["x", "63K", "1.5M", "-1", "0", "M", "65535"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--log-max-size=.* is not a size of at least 64K; give bytes, or a number"):
        parse_log_options(parse_args([f"--log-max-size={text}", "train.py"]))


def test_sizes_have_units() -> None:
    for text, size in {"65536": 65536, "64K": 65536, "100m": 100 << 20, "2G": 2 << 30}.items():
        options = parse_log_options(parse_args([f"--log-max-size={text}", "--log-max-files=3", "train.py"]))
        assert options is not None
        assert (options.max_size, options.max_files) == (size, 3)
    with pytest.raises(UsageError, match=r"^--log-max-files=0 must be at least 1"):
        parse_log_options(parse_args(["--log-max-size=1M", "--log-max-files=0", "train.py"]))
