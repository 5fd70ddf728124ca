"""``Std``, ``to_map``, ``LogsSpecs`` and the folders that ``DefaultLogsSpecs`` makes."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from tests.conformance.implementations import Implementation


class TestStd:
    def test_is_a_mask(self, impl: Implementation) -> None:
        std = impl.mp.Std
        assert [int(one) for one in (std.NONE, std.OUT, std.ERR, std.ALL)] == [0, 1, 2, 3]
        assert std.OUT | std.ERR == std.ALL
        assert std.ALL & std.OUT == std.OUT

    @pytest.mark.parametrize(("text", "value"), [("0", 0), ("1", 1), ("2", 2), ("3", 3)])
    def test_one_for_all_ranks(self, impl: Implementation, text: str, value: int) -> None:
        std = impl.mp.Std.from_str(text)
        assert std == value
        assert isinstance(std, impl.mp.Std)

    @pytest.mark.parametrize(
        ("text", "value"), [("0:3", {0: 3}), ("0:3,1:0,2:1,3:2", {0: 3, 1: 0, 2: 1, 3: 2}), ("1:1,1:2", {1: 2})]
    )
    def test_by_rank(self, impl: Implementation, text: str, value: dict[int, int]) -> None:
        by_rank = impl.mp.Std.from_str(text)
        assert by_rank == value
        assert all(isinstance(std, impl.mp.Std) for std in by_rank.values())

    @pytest.mark.parametrize("text", ["", "4", "-1", "33", "0:4", "0:", ":1", "0:1,", ",0:1", "0:1;1:1", "a:1", "0:1 "])
    def test_invalid_masks(self, impl: Implementation, text: str) -> None:
        with pytest.raises(ValueError, match=text or "mask|match"):
            impl.mp.Std.from_str(text)

    def test_rank_numbers_with_several_digits(self, impl: Implementation) -> None:
        def read() -> Any:
            try:
                return impl.mp.Std.from_str("0:1,10:3,127:2")
            except ValueError:
                return None

        assert read() == impl.expect("any-rank-number", torch=None, ours={0: 1, 10: 3, 127: 2})

    def test_a_line_break_at_the_end(self, impl: Implementation) -> None:
        def is_read() -> bool:
            try:
                impl.mp.Std.from_str("1\n")
            except ValueError:
                return False
            return True

        assert is_read() == impl.expect("strict-text", torch=True, ours=False)


class TestToMap:
    def test_one_for_all(self, impl: Implementation) -> None:
        assert impl.mp.to_map(impl.mp.Std.OUT, 3) == {0: 1, 1: 1, 2: 1}
        assert impl.mp.to_map(impl.mp.Std.OUT, 0) == {}

    def test_missing_ranks_have_none_and_others_are_dropped(self, impl: Implementation) -> None:
        std = impl.mp.Std
        assert impl.mp.to_map({1: std.OUT, 7: std.ALL}, 3) == {0: 0, 1: 1, 2: 0}


class TestGetStdCm:
    def test_nothing_to_redirect(self, impl: Implementation) -> None:
        assert isinstance(impl("multiprocessing.api").get_std_cm("", None), nullcontext)

    def test_a_file(self, impl: Implementation) -> None:
        redirect = mock.Mock()
        assert impl("multiprocessing.api").get_std_cm("file", redirect) is redirect.return_value
        redirect.assert_called_once_with("file")


class TestLogsSpecs:
    def test_arguments_of_a_subclass(self, impl: Implementation) -> None:
        class Specs(impl.mp.LogsSpecs):  # type: ignore[misc,name-defined]  # whose class is known when the test runs
            def reify(self, envs: Any) -> Any:
                return impl.mp.LogsDest()

            @property
            def root_log_dir(self) -> str:
                return str(self._root_log_dir)

        std = impl.mp.Std
        specs = Specs("/logs", std.OUT, {0: std.ERR}, {0})
        assert specs.root_log_dir == "/logs"
        assert (specs._redirects, specs._tee, specs._local_ranks_filter) == (std.OUT, {0: std.ERR}, {0})
        specs = Specs()
        assert (specs._root_log_dir, specs._redirects, specs._tee, specs._local_ranks_filter) == (None, 0, 0, None)

    def test_abstract(self, impl: Implementation) -> None:
        with pytest.raises(TypeError, match="abstract"):
            impl.mp.LogsSpecs()


@pytest.mark.needs("filtered-files")
def test_a_destination_without_values(impl: Implementation) -> None:
    dest = impl.mp.LogsDest()
    assert (dest.stdouts, dest.stderrs, dest.tee_stdouts, dest.tee_stderrs, dest.error_files) == ({},) * 5
    assert (dest.filtered_stdout, dest.filtered_stderr) == ("", "")
    assert dest.stdouts is not dest.stderrs


def below(path: str, folder: Path) -> str:
    """A path without its root, whose last folder has a random part."""
    parts = Path(path).relative_to(folder).parts
    return "/".join(parts[1:])


class TestDefaultLogsSpecs:
    @pytest.fixture
    def envs(self) -> dict[int, dict[str, str]]:
        return {
            rank: {"TORCHELASTIC_RUN_ID": "my_run", "TORCHELASTIC_RESTART_COUNT": "0", "RANK": str(rank)}
            for rank in range(3)
        }

    @pytest.mark.needs("filtered-files")
    def test_paths(self, impl: Implementation, tmp_path: Path, envs: dict[int, dict[str, str]]) -> None:
        std = impl.mp.Std
        specs = impl.mp.DefaultLogsSpecs(str(tmp_path), {0: std.OUT, 1: std.ALL}, {1: std.OUT, 2: std.ERR})
        assert specs.root_log_dir == str(tmp_path)
        dest = specs.reify(envs)
        (run_folder,) = tmp_path.iterdir()
        assert run_folder.name.startswith("my_run_")
        found = {
            name: {rank: below(path, tmp_path) if path else "" for rank, path in getattr(dest, name).items()}
            for name in ("stdouts", "stderrs", "tee_stdouts", "tee_stderrs", "error_files")
        }
        assert found == {
            "stdouts": {0: "attempt_0/0/stdout.log", 1: "attempt_0/1/stdout.log", 2: ""},
            "stderrs": {0: "", 1: "attempt_0/1/stderr.log", 2: "attempt_0/2/stderr.log"},
            "tee_stdouts": {1: "attempt_0/1/stdout.log"},
            "tee_stderrs": {2: "attempt_0/2/stderr.log"},
            "error_files": {rank: f"attempt_0/{rank}/error.json" for rank in range(3)},
        }
        assert below(dest.filtered_stdout, tmp_path) == "attempt_0/filtered_stdout.log"
        assert below(dest.filtered_stderr, tmp_path) == "attempt_0/filtered_stderr.log"
        assert sorted(path.name for path in (run_folder / "attempt_0").iterdir()) == ["0", "1", "2"]
        assert isinstance(dest, impl.mp.LogsDest)

    def test_workers_get_their_error_file(
        self, impl: Implementation, tmp_path: Path, envs: dict[int, dict[str, str]]
    ) -> None:
        expected = {rank: dict(env) for rank, env in envs.items()}
        dest = impl.mp.DefaultLogsSpecs(str(tmp_path)).reify(envs)
        for rank, env in expected.items():
            env["TORCHELASTIC_ERROR_FILE"] = dest.error_files[rank]
        assert envs == expected

    def test_some_ranks_are_not_shown(
        self, impl: Implementation, tmp_path: Path, envs: dict[int, dict[str, str]]
    ) -> None:
        std = impl.mp.Std
        dest = impl.mp.DefaultLogsSpecs(str(tmp_path), std.ERR, std.OUT, {1}).reify(envs)
        assert list(dest.tee_stdouts) == [1]
        assert all(path.endswith(".log") for path in (*dest.stdouts.values(), *dest.stderrs.values()))
        dest = impl.mp.DefaultLogsSpecs(str(tmp_path), local_ranks_filter={1}).reify(envs)
        assert dest.stdouts == dest.stderrs == {0: os.devnull, 1: "", 2: os.devnull}
        dest = impl.mp.DefaultLogsSpecs(str(tmp_path), local_ranks_filter=set()).reify(envs)
        assert dest.stdouts == dest.stderrs == {0: "", 1: "", 2: ""}

    def test_attempts_of_a_run_share_a_folder(
        self, impl: Implementation, tmp_path: Path, envs: dict[int, dict[str, str]]
    ) -> None:
        specs = impl.mp.DefaultLogsSpecs(str(tmp_path))
        first = specs.reify(envs).error_files[0]
        for env in envs.values():
            env["TORCHELASTIC_RESTART_COUNT"] = "1"
        second = specs.reify(envs).error_files[0]
        assert second == first.replace("attempt_0", "attempt_1")
        assert len(list(tmp_path.iterdir())) == 1
        impl.mp.DefaultLogsSpecs(str(tmp_path)).reify(envs)
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_start_with_the_same_restart_count(
        self, impl: Implementation, tmp_path: Path, envs: dict[int, dict[str, str]]
    ) -> None:
        specs = impl.mp.DefaultLogsSpecs(str(tmp_path))
        Path(specs.reify(envs).error_files[0]).write_text("of the earlier attempt")
        again = specs.reify(envs).error_files[0]
        name = impl.expect("attempts-are-kept", torch="attempt_0", ours="attempt_0.1")
        assert below(again, tmp_path) == f"{name}/0/error.json"
        kept = [path.read_text() for path in tmp_path.glob("*/attempt_0/0/error.json")]
        assert kept == impl.expect("attempts-are-kept", torch=[], ours=["of the earlier attempt"])

    def test_names_where_the_environment_says_nothing(self, impl: Implementation, tmp_path: Path) -> None:
        dest = impl.mp.DefaultLogsSpecs(str(tmp_path)).reify({0: {}})
        assert Path(dest.error_files[0]).relative_to(tmp_path).parts[0].startswith("test_run_id_")
        assert below(dest.error_files[0], tmp_path) == "attempt_0/0/error.json"

    def test_a_run_id_with_a_slash(self, impl: Implementation, tmp_path: Path) -> None:
        def works() -> bool:
            try:
                impl.mp.DefaultLogsSpecs(str(tmp_path)).reify({0: {"TORCHELASTIC_RUN_ID": "team/run"}})
            except FileNotFoundError:
                return False
            return True

        assert works() == impl.expect("any-run-id", torch=False, ours=True)

    def test_no_workers(self, impl: Implementation, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        dest = impl.mp.DefaultLogsSpecs(str(tmp_path)).reify({})
        assert (dest.stdouts, dest.stderrs, dest.error_files) == ({}, {}, {})
        assert "Empty envs map" in caplog.text

    @pytest.mark.needs("filtered-files")
    def test_the_null_device(self, impl: Implementation, envs: dict[int, dict[str, str]]) -> None:
        std = impl.mp.Std
        dest = impl.mp.DefaultLogsSpecs(os.devnull, std.ALL, std.ALL, {0}).reify(envs)
        everywhere, console = dict.fromkeys(range(3), os.devnull), dict.fromkeys(range(3), "")
        assert (dest.stdouts, dest.stderrs, dest.error_files) == (console, console, everywhere)
        assert (dest.tee_stdouts, dest.tee_stderrs) == (everywhere, everywhere)
        assert {env["TORCHELASTIC_ERROR_FILE"] for env in envs.values()} == {""}
        filtered = impl.expect("null-device-filters", torch="/dev/null/filtered_stdout.log", ours=os.devnull)
        assert dest.filtered_stdout == filtered

    @pytest.mark.parametrize("log_dir", [None, ""])
    def test_a_temporary_folder(
        self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_dir: str | None
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        root = Path(impl.mp.DefaultLogsSpecs(log_dir).root_log_dir)
        assert root.parent == tmp_path
        assert root.name.startswith("torchelastic_")
        assert root.is_dir()

    def test_the_folder_is_made(self, impl: Implementation, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b"
        impl.mp.DefaultLogsSpecs(str(folder))
        assert folder.is_dir()
        impl.mp.DefaultLogsSpecs(str(folder))

    def test_a_file_in_the_way(self, impl: Implementation, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match=f"log_dir: {tmp_path}/file is a file"):
            impl.mp.DefaultLogsSpecs(str(tmp_path / "file"))

    def test_a_folder_that_cannot_be_made(self, impl: Implementation) -> None:
        with pytest.raises(OSError, match="/proc/none"):
            impl.mp.DefaultLogsSpecs("/proc/none")

    def test_equal_by_value(self, impl: Implementation, tmp_path: Path) -> None:
        def make(*arguments: Any) -> Any:
            return impl.mp.DefaultLogsSpecs(str(tmp_path), *arguments)

        std = impl.mp.Std
        assert make() == make()
        assert make(std.OUT) != make()
        assert make(std.OUT, std.OUT) != make(std.OUT)
        assert make(std.OUT, std.OUT, {0}) != make(std.OUT, std.OUT)
        assert make() != "something else"
        with pytest.raises(TypeError, match="unhashable"):
            hash(make())

    def test_representation(self, impl: Implementation, tmp_path: Path) -> None:
        specs = impl.mp.DefaultLogsSpecs(str(tmp_path), impl.mp.Std.OUT, local_ranks_filter={1})
        assert repr(specs) == f"DefaultLogsSpecs(root_log_dir={tmp_path}, redirects=1, tee=0, local_ranks_filter={{1}})"
