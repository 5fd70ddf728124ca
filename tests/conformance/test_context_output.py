"""Where a context puts the output of its workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance.contexts import content, finished

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.implementations import Implementation


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


@pytest.mark.needs("filtered-files")
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
