"""``run`` and ``launch``: command lines, from their arguments to the exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.torch_versions import has, knows

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.implementations import Implementation


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A training script that writes its arguments and environment into a folder, and ends as it is told."""
    path = tmp_path / "train.py"
    path.write_text(
        "import json, os, sys\n"
        "folder, code, *rest = sys.argv[1:]\n"
        "with open(f'{folder}/{os.environ[\"RANK\"]}.json', 'w') as file:\n"
        "    json.dump([rest, dict(os.environ), __name__], file)\n"
        "sys.exit(int(code))\n"
    )
    return path


def written(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("?.json")}


class TestMain:
    def test_a_script(
        self, impl: Implementation, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        line = ["--standalone", "--nproc-per-node=2", f"--log-dir={tmp_path}/logs", "--max-restarts=7", "-r", "3"]
        assert impl.run.main([*line, str(script), str(tmp_path), "0", "--lr", "1"]) is None
        found = written(tmp_path)
        assert {rank: (rest, name) for rank, (rest, _, name) in found.items()} == {
            rank: (["--lr", "1"], "__main__") for rank in ("0", "1")
        }
        environment = found["1"][1]
        wanted = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "7", "OMP_NUM_THREADS": "1"}
        assert {name: environment.get(name) for name in wanted} == wanted
        assert len(list(tmp_path.glob("logs/*_*/attempt_0/?/stdout.log"))) == 2

    def test_variables(
        self, impl: Implementation, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PET_NPROC_PER_NODE", "1")
        monkeypatch.setenv("PET_STANDALONE", "1")
        monkeypatch.setenv("PET_ROLE", "my_role")
        monkeypatch.setenv("PET_MAX_RESTARTS", "5")
        impl.run.main(["--max-restarts=2", str(script), str(tmp_path), "0"])
        ((_, environment, _),) = written(tmp_path).values()
        wanted = {"ROLE_NAME": "my_role", "TORCHELASTIC_MAX_RESTARTS": "2", "WORLD_SIZE": "1"}
        assert {name: environment.get(name) for name in wanted} == wanted

    def test_a_failure(self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        error = '{"message": {"message": "boom", "extraInfo": {"py_callstack": "trace", "timestamp": "17"}}}'
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "launcher.json"))
        command = ["--no-python", "/bin/sh", "-c", f"echo '{error}' > $TORCHELASTIC_ERROR_FILE; exit 9"]
        with pytest.raises(impl.errors.ChildFailedError, match="/bin/sh FAILED") as raised:
            impl.run.main(["--nproc-per-node=1", *command])
        assert {rank: failure.exitcode for rank, failure in raised.value.failures.items()} == {0: 9}
        assert json.loads((tmp_path / "launcher.json").read_text()) == {
            "message": {
                "message": "boom",
                "extraInfo": {"py_callstack": "trace", "timestamp": "17"},
                "errorCode": 9,
            }
        }

    def test_usage(self, impl: Implementation, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as raised:
            impl.run.main(["--no-such-option", "train.py"])
        assert raised.value.code == 2
        assert "error" in capfd.readouterr().err

    def test_exit_codes(self, impl: Implementation, tmp_path: Path) -> None:
        """Of the launcher's own process."""
        import subprocess

        line = [sys.executable, "-m", impl.run.__name__, "--nproc-per-node=2", "--no-python", "/bin/sh", "-c"]
        command = "if [ $RANK = 1 ]; then exit 7; fi; exec sleep 1000"
        ended = subprocess.run([*line, command], cwd=tmp_path, capture_output=True, timeout=60, check=False)
        assert ended.returncode == impl.expect("exit-code", torch=1, ours=7)
        assert b"/bin/sh FAILED" in ended.stderr
        assert b"exitcode  : 7" in ended.stderr
        has_traceback = b"Traceback" in ended.stderr
        assert has_traceback == impl.expect("no-launcher-traceback", torch=True, ours=False)


class TestRunHelpers:
    @pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1:4", (1, 4)), ("0", (0, 0))])
    def test_nnodes(self, impl: Implementation, text: str, expected: tuple[int, int]) -> None:
        assert impl.run.parse_min_max_nnodes(text) == expected

    def test_nnodes_in_another_form(self, impl: Implementation) -> None:
        with pytest.raises(RuntimeError, match=r'is not in "MIN:MAX" format|nor in "MIN:MAX" format'):
            impl.run.parse_min_max_nnodes("1:2:3")
        with pytest.raises(ValueError, match="x"):
            impl.run.parse_min_max_nnodes("x")

    def test_workers_of_a_node(self, impl: Implementation) -> None:
        assert impl.run.determine_local_world_size("7") == 7
        assert impl.run.determine_local_world_size("cpu") >= 1
        assert impl.run.determine_local_world_size("auto") >= 1
        with pytest.raises(ValueError, match="nonsense"):
            impl.run.determine_local_world_size("nonsense")

    def test_endpoint(self, impl: Implementation) -> None:
        parse = impl.run.parse_args
        assert impl.run.get_rdzv_endpoint(parse(["--master-addr=h", "--master-port=5", "x.py"])) == "h:5"
        assert impl.run.get_rdzv_endpoint(parse(["--rdzv-endpoint=e:1", "x.py"])) == "e:1"
        assert impl.run.get_rdzv_endpoint(parse(["--rdzv-backend=c10d", "x.py"])) == ""

    def test_legacy_use_env(self, impl: Implementation) -> None:
        args = impl.run.parse_args(["x.py"])
        assert impl.run.get_use_env(args) is True
        args.use_env = False
        assert impl.run.get_use_env(args) is False

    def test_a_script_in_this_interpreter(
        self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["before"])
        (tmp_path / "run.py").write_text(
            "import pathlib, sys\n"
            "assert __name__ == '__main__'\n"
            f"pathlib.Path('{tmp_path}/args').write_text(' '.join(sys.argv[1:]))\n"
        )
        impl.run.run_script_path(str(tmp_path / "run.py"), "a", "b")
        assert (tmp_path / "args").read_text() == "a b"

    def test_logs_specs(self, impl: Implementation) -> None:
        assert impl.run._get_logs_specs_class(None) is impl.mp.DefaultLogsSpecs
        with pytest.raises(ValueError, match=r"(?i)could not find entrypoint under 'torchrun.logs_specs"):
            impl.run._get_logs_specs_class("no such plug-in")


SCRIPT = __file__  # any that exists

LINES: dict[str, list[str]] = {
    "defaults": [SCRIPT],
    "nodes": ["--nnodes=1:4", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=h:1", SCRIPT, "--lr", "1"],
    "static": ["--nnodes=2", "--node-rank=1", "--master-addr=h", "--master-port=5", "--nproc-per-node=2", SCRIPT],
    "rendezvous": [
        "--rdzv-id=job",
        "--rdzv-conf=timeout=5,is_host=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=h",
        SCRIPT,
    ],
    "times": ["--max-restarts=4", "--monitor-interval=2.5", "--shutdown-timeout=9", SCRIPT],
    "logs": ["--redirects=3", "--tee=0:1,1:2", "--local-ranks-filter=0,1", "--role=r", SCRIPT],
    "filters": ["--duplicate-stdout-filters=a,b,,c", "--duplicate-stderr-filters=x", SCRIPT],
    "module": ["--module", "json.tool", "a", "b"],
    "program": ["--no-python", "/bin/true", "a"],
    "run path": ["--run-path", SCRIPT, "a"],
    "others": ["--start-method=fork", "--signals-to-handle=SIGTERM", "--virtual-local-rank", "--local-addr=me", SCRIPT],
    "numa": ["--numa-binding=exclusive", SCRIPT],
    "prefix": ["--log-line-prefix-template=${hostname}", SCRIPT],
    "underscores": ["--nproc_per_node=3", "--max_restarts=1", "--event_log_handler=console", SCRIPT, "--", "-x"],
}


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="argparse itself has been mended")
def test_an_argument_of_the_script_that_looks_like_options(impl: Implementation) -> None:
    def arguments() -> list[str] | None:
        try:
            return list(impl.run.parse_args([SCRIPT, "--mo", "0.9"]).training_script_args)
        except SystemExit:
            return None

    assert arguments() == impl.expect("arguments-of-the-script", torch=None, ours=["--mo", "0.9"])


def test_a_job_on_this_node_alone_that_waits_for_others(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(impl.run, "elastic_launch", lambda **_: lambda *_: launched.append(1), raising=False)
    monkeypatch.setattr("torch.multiprocessing._set_thread_name", lambda _: None)

    def is_refused() -> bool:
        try:
            impl.run.main(["--standalone", "--nnodes=2", f"--log-dir={tmp_path}", SCRIPT])
        except ValueError:
            return True
        return False

    assert is_refused() == impl.expect("standalone-alone", torch=False, ours=True)
    assert bool(launched) == impl.is_torch


def test_a_step_of_slurm(impl: Implementation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched: list[tuple[int, int, str, str]] = []

    def launch(config: Any, **_: Any) -> Any:
        launched.append((config.max_nodes, config.nproc_per_node, config.rdzv_endpoint, config.run_id))
        return lambda *_: None

    monkeypatch.setattr(impl.run, "elastic_launch", launch, raising=False)
    monkeypatch.setattr("torch.multiprocessing._set_thread_name", lambda _: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    step = {
        "JOB_ID": "7",
        "STEP_ID": "0",
        "STEP_NUM_NODES": "2",
        "STEP_NODELIST": "n[1-2]",
        "NODEID": "1",
        "GPUS_ON_NODE": "4",
    }
    for name, value in {**step, "CPUS_ON_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    impl.run.main([f"--log-dir={tmp_path}", SCRIPT])
    nodes = launched[0] if launched[0][0] > 1 else launched[0][:2]
    assert nodes == impl.expect("scheduler", torch=(1, 1), ours=(2, 4, "n1:20007", "7.0"))
    if not impl.is_torch:
        impl.run.main([f"--log-dir={tmp_path}", "--no-scheduler", SCRIPT])
        assert launched[-1][:2] == (1, 1)
    impl.run.main([f"--log-dir={tmp_path}", "--standalone", "--nproc-per-node=cpu", SCRIPT])
    cpus = len(os.sched_getaffinity(0))
    assert launched[-1][1] == impl.expect("cpu-limit", torch=cpus, ours=1)


@pytest.mark.parametrize("line", [["--use-env"], []], ids=["with --use-env", "without"])
def test_the_former_launcher(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: list[str]
) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(
        impl.run, "elastic_launch", lambda **_: lambda *arguments: launched.append(arguments), raising=False
    )
    monkeypatch.setattr("torch.multiprocessing._set_thread_name", lambda _: None)
    with pytest.warns(FutureWarning, match="is deprecated"):
        impl("launch").main([*line, f"--log-dir={tmp_path}", SCRIPT, "-x"])
    local_rank = [] if line else ["--local-rank=${local_rank}"]
    assert launched == [("-u", SCRIPT, *local_rank, "-x")]
    with pytest.raises(ValueError, match="When using the '--no-python' flag, you must also set the '--use-env' flag"):
        impl("launch").launch(impl("launch").parse_args(["--no-python", SCRIPT]))


@pytest.mark.parametrize("name", [name for name, line in LINES.items() if knows(line)])
def test_command_lines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch makes of them is what is expected."""
    from torch.distributed import run as torchs

    import ferroelastic.run as ours

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "<${rank}>")
    (fields, *expected), (found, *others) = (
        as_data(module, [f"--log-dir={tmp_path}", *LINES[name]]) for module in (torchs, ours)
    )
    if not has("free-static-port"):
        del fields["rdzv_endpoint"]
    # Older versions of torch have fewer fields.
    assert {field: found[field] for field in fields} == fields
    assert others == expected


def as_data(module: Any, line: list[str]) -> Any:
    config, entrypoint, arguments = module.config_from_args(module.parse_args(line))
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["logs_specs"] = {
        name: value for name, value in vars(fields["logs_specs"]).items() if name.startswith(("_r", "_tee", "_local"))
    }
    assert fields.pop("signals_to_forward", "") == ""  # not in torch
    assert fields.pop("interactive_rank", None) is None  # not in torch
    assert not fields.pop("warm_workers", 0)  # not in torch, nor the next three
    assert tuple(fields.pop("warm_imports", ("torch",))) == ("torch",)
    assert not fields.pop("preload", False)
    assert fields.pop("log_options", None) is None
    assert fields.pop("exit_barrier_timeout", 300) == 300  # not in torch yet
    assert fields.pop("grace_signal_target", "group") == "group"  # not in torch
    assert (fields.pop("restart_settings", None), fields.pop("restart_policy", None)) == (None, None)
    options = fields.get("numa_options")
    fields["numa_options"] = options and (options.affinity_mode.value, options.should_fall_back_if_binding_fails)
    return fields, getattr(entrypoint, "__name__", entrypoint), arguments


WRONG = {
    "no nodes": ["--nnodes=0", SCRIPT],
    "more at least than at most": ["--nnodes=3:2", SCRIPT],
    "negative restarts": ["--max-restarts=-1", SCRIPT],
    "ranks": ["--local-ranks-filter=a", SCRIPT],
    "streams": ["--tee=9", SCRIPT],
    "module and program": ["--no-python", "--module", "json.tool"],
    "rendezvous": ["--rdzv-conf=x", SCRIPT],
    "logs specs": ["--logs-specs=none", SCRIPT],
}


@pytest.mark.parametrize("name", WRONG)
def test_command_lines_that_cannot_work(impl: Implementation, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises((ValueError, AssertionError)):
        impl.run.config_from_args(impl.run.parse_args(["--log-dir=/dev/null", *WRONG[name]]))
