"""``ferrorun`` up to the launch; what it parses is held against torch's where torch is installed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support import torch_versions
from tests.support.fake_launch import Launch

from ferroelastic import _usage, run
from ferroelastic._usage import UsageError
from ferroelastic.multiprocessing import DefaultLogsSpecs, Std

pytestmark = pytest.mark.usefixtures("launcher_environment")


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1:4", (1, 4)), ("3:1", (3, 1)), ("-1:0", (-1, 0))])
def test_nnodes(text: str, expected: tuple[int, int]) -> None:
    assert run.parse_min_max_nnodes(text) == expected


@pytest.mark.parametrize("text", ["", "x", "1:", ":2", "1:2:3", "1.5"])
def test_bad_nnodes(text: str) -> None:
    with pytest.raises(
        RuntimeError, match=f"--nnodes='{text}' is neither a number nor in \"MIN:MAX\" format; give e.g. 2 or 1:4"
    ):
        run.parse_min_max_nnodes(text)


def test_local_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from ferroelastic import _devices

    assert run.determine_local_world_size("3") == 3
    assert run.determine_local_world_size("cpu") == len(os.sched_getaffinity(0))
    monkeypatch.setattr(_devices, "gpu_count", lambda *_: 5)
    assert run.determine_local_world_size("gpu") == 5
    assert run.determine_local_world_size("auto") == 5
    monkeypatch.setattr(_devices, "gpu_count", lambda *_: 0)
    with pytest.raises(ValueError, match="--nproc-per-node='gpu': no gpu is available; check the driver"):
        run.determine_local_world_size("gpu")


def test_unknown_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ferroelastic import _devices

    monkeypatch.setattr(_devices, "_has_private_backend", lambda: False)

    with pytest.raises(
        ValueError, match="--nproc-per-node='x' is not a number of workers; give a number, or auto, gpu, xpu or cpu"
    ):
        run.determine_local_world_size("x")


LINES = [
    ["train.py", "--lr", "0.1"],
    ["--nproc-per-node=2", "--nnodes=1:3", "--max-restarts=4", "--monitor-interval=2", "t.py"],
    [
        "--nproc-per-node=cpu",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=h:1",
        "--rdzv-id=9",
        "--rdzv-conf",
        "a=b, c=d=e",
        "t.py",
    ],
    ["-m", "--role=r", "--event-log-handler=console", "--start-method=fork", "pkg.train", "x"],
    ["--no-python", "--local-addr=10.0.0.1", "./train.sh", "-m"],
    ["--run-path", "--no-python", "/abs/t.py", "x"],
    ["--run-path", "-m", "/abs/t.py"],
    ["--nnodes=2", "--node-rank=1", "--master-addr=node0", "--master-port=1234", "t.py"],
    ["-r", "3", "-t", "0:1,1:2", "--local-ranks-filter=0,1", "--duplicate-stdout-filters=a,b", "t.py"],
    ["--signals-to-handle=SIGTERM,SIGUSR1", "--shutdown-timeout=0", "--virtual-local-rank", "t.py"],
    ["--numa-binding=exclusive", "t.py"],
]


def _comparable(config: Any, logs: Any) -> dict[str, Any]:
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del fields["logs_specs"]
    assert fields.pop("signals_to_forward", "") == ""  # not in torch
    assert fields.pop("interactive_rank", None) is None  # not in torch
    assert not fields.pop("warm_workers", 0)  # not in torch, nor the next three
    assert tuple(fields.pop("warm_imports", ("torch",))) == ("torch",)
    assert not fields.pop("preload", False)
    assert fields.pop("log_options", None) is None
    assert fields.pop("exit_barrier_timeout", 300) == 300  # not in torch yet
    assert fields.pop("grace_signal_target", "group") == "group"  # not in torch
    assert (fields.pop("restart_settings", None), fields.pop("restart_policy", None)) == (None, None)
    numa = fields.pop("numa_options", None)
    fields["numa"] = numa and (numa.affinity_mode.value, numa.should_fall_back_if_binding_fails)
    fields["logs"] = (logs._root_log_dir, logs._redirects, logs._tee, logs._local_ranks_filter)
    return fields


@pytest.mark.parametrize("line", [line for line in LINES if torch_versions.knows(line)], ids=" ".join)
def test_a_configuration_is_torchs(line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torch.distributed.run")
    monkeypatch.setenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[${rank}]: ")
    line = ["--log-dir", str(tmp_path / "logs"), *line]

    config, entrypoint, arguments = run.config_from_args(run.parse_args(line))
    expected, its_entrypoint, its_arguments = theirs.config_from_args(theirs.parse_args(line))

    found, wanted = _comparable(config, config.logs_specs), _comparable(expected, expected.logs_specs)
    # Older versions of torch have fewer fields.
    assert {name: found[name] for name in wanted} == wanted
    assert arguments == its_arguments
    if "--run-path" in line:
        assert entrypoint is run.run_script_path
    else:
        assert entrypoint == its_entrypoint


def test_python_exec_replaces_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_EXEC", "/opt/python")

    _, entrypoint, arguments = run.config_from_args(run.parse_args(["--log-dir", str(tmp_path), "t.py"]))

    assert (entrypoint, arguments) == ("/opt/python", ["-u", "t.py"])


def test_the_legacy_launcher_passes_the_local_rank(tmp_path: Path) -> None:
    args = run.parse_args(["--log-dir", str(tmp_path), "t.py", "x"])
    args.use_env = False

    assert run.config_from_args(args)[2] == ["-u", "t.py", "--local-rank=${local_rank}", "x"]


BAD = [
    ("--nnodes=3:1", "--nnodes='3:1' must have 0 < MIN <= MAX"),
    ("--nnodes=0", "--nnodes='0' must have 0 < MIN <= MAX"),
    ("--nproc-per-node=0", "--nproc-per-node='0' must be > 0"),
    ("--nproc-per-node=-3", "--nproc-per-node='-3' must be > 0"),
    ("--max-restarts=-1", "--max-restarts=-1 must be >= 0; give 0"),
    ("--monitor-interval=0", "--monitor-interval=0.0 must be > 0; give seconds"),
    ("--monitor-interval=-1", "--monitor-interval=-1.0 must be > 0"),
    ("--monitor-interval=nan", "--monitor-interval=nan must be > 0"),
    ("--shutdown-timeout=-1", "--shutdown-timeout=-1 must be non-negative; give whole seconds"),
    ("--exit-barrier-timeout=-1", "--exit-barrier-timeout=-1.0 must be non-negative; give seconds"),
    ("--exit-barrier-timeout=nan", "--exit-barrier-timeout=nan must be non-negative"),
    ("--exit-barrier-timeout=inf", "--exit-barrier-timeout=inf must be non-negative"),
    ("--tee=4", "--tee='4' is neither one of 0 (none), 1 (stdout), 2 (stderr), 3 (both) nor a list"),
    ("--redirects=0:3,x", "--redirects='0:3,x' is neither"),
    ("--local-ranks-filter=0,x", "--local-ranks-filter='0,x' must be a comma-separated list of integers"),
    (
        "--master-port=99999",
        "--master-port=99999: The port number of the rendezvous endpoint '127.0.0.1:99999' must be",
    ),
    ("--rdzv-endpoint=h:x", "--rdzv-endpoint='h:x': The port number"),
    ("--rdzv-endpoint=h", "--rdzv-endpoint='h' has no port, which a static rendezvous needs; give HOST:PORT"),
    ("--rdzv-conf=timeout", "--rdzv-conf='timeout': "),
    ("--rdzv-conf=timeout=soon", "--rdzv-conf='timeout=soon': timeout='soon' is not a timeout; give whole seconds"),
    ("--rdzv-conf=min_nodes=2", "--rdzv-conf='min_nodes=2': 'min_nodes' has its own option; use --nnodes"),
    ("--rdzv-backend=carrier-pigeon", "--rdzv-backend='carrier-pigeon' is not a rendezvous backend; use one of c10d, "),
    ("--event-log-handler=x", "--event-log-handler='x' is not a registered event handler; use one of console, "),
    ("--signals-to-handle=SIGTREM", "'SIGTREM' is not a signal of this system; give names such as"),
    ("--signals-to-handle=SIGTERM,term", "'term' is not a signal of this system; write SIGTERM"),
    ("--signals-to-handle=SIGKILL", "SIGKILL cannot be handled by a process; remove it"),
    ("--node-rank=1", "--node-rank=1 is not a rank of a job with --nnodes='1:1'; give 0 to 0"),
    (
        "--logs-specs=x",
        "--logs-specs='x': could not find entrypoint under 'torchrun.logs_specs[x]' key; ",
    ),
]


@pytest.mark.parametrize(("option", "text"), BAD)
def test_a_bad_value_is_named_with_the_remedy(option: str, text: str, tmp_path: Path) -> None:
    logs = tmp_path / "logs"

    with pytest.raises(UsageError) as raised:
        run.config_from_args(run.parse_args([option, "--log-dir", str(logs), "t.py"]))

    assert text in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not logs.exists()


def test_a_usage_error_has_the_type_that_torch_raises() -> None:
    for theirs in (ValueError, AssertionError, RuntimeError):
        assert issubclass(UsageError, theirs)


def test_a_bad_value_of_a_variable_is_named_by_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NPROC_PER_NODE", "0")

    with pytest.raises(UsageError, match=r"^PET_NPROC_PER_NODE='0' must be > 0"):
        run.config_from_args(run.parse_args(["--log-dir", str(tmp_path), "t.py"]))


def test_blank_signals_are_none() -> None:
    _usage.check_signals("", " ")
    _usage.check_signals(" SIGTERM , ,SIGUSR1,", "SIGUSR2,")


def test_a_signal_cannot_both_end_the_job_and_be_passed_on() -> None:
    with pytest.raises(UsageError, match=r"^--signals-to-forward='SIGUSR1,SIGTERM': SIGTERM also ends the job"):
        _usage.check_signals("SIGTERM", "SIGUSR1,SIGTERM")
    with pytest.raises(UsageError, match=r"^--signals-to-forward='SIGNO': 'SIGNO' is not a signal"):
        _usage.check_signals("SIGTERM", "SIGNO")


def test_an_event_handler_of_a_program_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    from ferroelastic.events import handlers

    monkeypatch.setitem(handlers._log_handlers, "mine", logging.NullHandler())

    run.config_from_args(run.parse_args(["--event-log-handler=mine", "--log-dir", str(tmp_path), "t.py"]))


def test_a_backend_registered_with_torch_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torch.distributed.elastic.rendezvous.api")
    monkeypatch.setitem(theirs.rendezvous_handler_registry._registry, "mine", lambda _: None)

    run.config_from_args(run.parse_args(["--rdzv-backend=mine", "--log-dir", str(tmp_path), "t.py"]))


def _plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (tmp_path / "plugin_of_test.py").write_text(code)
    info = tmp_path / "plugin_of_test-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-test\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torchrun.logs_specs]\nmine = plugin_of_test:Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_logs_specs_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plugin(
        tmp_path,
        monkeypatch,
        "from ferroelastic.multiprocessing import DefaultLogsSpecs\nclass Mine(DefaultLogsSpecs): pass\n",
    )

    config, _, _ = run.config_from_args(
        run.parse_args(["--logs-specs=mine", "--log-dir", str(tmp_path), "--tee=3", "t.py"])
    )

    assert type(config.logs_specs).__name__ == "Mine"
    with pytest.raises(UsageError, match=r"installed are .*mine"):
        run._get_logs_specs_class("yours")
    sys.modules.pop("plugin_of_test")


def test_torchs_default_logs_specs_are_ours() -> None:
    pytest.importorskip("torch")

    assert run._get_logs_specs_class(None) is DefaultLogsSpecs
    assert run._get_logs_specs_class("default") is DefaultLogsSpecs


def test_torchs_logs_specs_get_torchs_streams() -> None:
    theirs = pytest.importorskip("torch.distributed.elastic.multiprocessing.api")

    assert run._std_class(theirs.DefaultLogsSpecs) is theirs.Std
    assert run._std_class(DefaultLogsSpecs) is Std


def test_omp_num_threads_is_one_for_several_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    line = ["--log-dir", str(tmp_path), "t.py"]
    run.config_from_args(run.parse_args(["--nproc-per-node=2", *line]))
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    run.config_from_args(run.parse_args(line))
    assert "OMP_NUM_THREADS" not in os.environ
    assert not caplog.records

    monkeypatch.setenv("OMP_NUM_THREADS", "put back after the test")
    del os.environ["OMP_NUM_THREADS"]
    run.config_from_args(run.parse_args(["--nproc-per-node=2", *line]))

    assert os.environ["OMP_NUM_THREADS"] == "1"
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "OMP_NUM_THREADS is not set; each of the 2 workers gets OMP_NUM_THREADS=1, set it"
    )


RENDEZVOUS = [
    [],
    ["--standalone"],
    ["--standalone", "--nnodes=1:2", "--rdzv-backend=static", "--rdzv-endpoint=h:1"],
    ["--master-port=1234"],
    ["--rdzv-endpoint=h:1"],
    ["--nnodes=2"],
    ["--nnodes=1:1", "--rdzv-id=7"],
    ["--rdzv-backend=c10d", "--rdzv-endpoint=h:1", "--rdzv-id=7"],
]


@pytest.mark.parametrize("line", RENDEZVOUS, ids=" ".join)
def test_the_rendezvous_is_torchs(
    line: list[str], launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = pytest.importorskip("torch.distributed.run")
    its = Launch()
    monkeypatch.setattr(theirs, "elastic_launch", its)
    monkeypatch.setattr("uuid.uuid4", lambda: "made-up")
    monkeypatch.setattr("ferroelastic.utils._ids.random_uuid", lambda: "made-up")
    monkeypatch.setattr(run, "_name_thread", lambda _: None)
    monkeypatch.setattr("torch.multiprocessing._set_thread_name", lambda _: None)
    line = [*line, "--log-dir", str(tmp_path), "t.py", "x"]

    run.run(run.parse_args(line))
    theirs.run(theirs.parse_args(line))

    (config, entrypoint, args), (its_config, its_entrypoint, its_args) = launch.calls[0], its.calls[0]
    assert _comparable(config, config.logs_specs) == _comparable(its_config, its_config.logs_specs)
    assert (entrypoint, args) == (its_entrypoint, its_args)


def test_the_thread_has_torchs_name() -> None:
    script = (
        "from ferroelastic import run; run._name_thread('pt_elastic'); print(open('/proc/thread-self/comm').read())"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], env=_child_environment(), capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "pt_elastic"


def _child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(run.__file__).parents[1])}


def test_a_script_runs_in_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["before"])
    script = tmp_path / "t.py"
    script.write_text(
        "import sys, pathlib\nassert __name__ == '__main__'\npathlib.Path(sys.argv[1]).write_text(repr(sys.argv))\n"
    )
    out = tmp_path / "out"

    run.run_script_path(str(script), str(out))

    assert out.read_text() == repr([str(script), str(out)])


# What is checked before anything is started.


def test_a_missing_target_starts_nothing(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.sh").write_text("")
    missing = [
        (["gone.py"], f"script 'gone.py' does not exist in '{tmp_path}'; check the path"),
        (["sh"], "check the path or use --no-python"),
        (["--run-path", "/gone.py"], "script '/gone.py' does not exist"),
        (["-m", "gone_module.sub"], f"module 'gone_module.sub' is neither in '{tmp_path}' nor installed"),
        (["-m", ".relative"], "module '.relative' is neither in"),
        (["--no-python", "gone-command"], "command 'gone-command' is not in PATH; check its name or write its path"),
        (["--no-python", "local.sh"], "command 'local.sh' is not in PATH; write './local.sh'"),
        (["--no-python", "./gone.sh"], f"command './gone.sh' does not exist in '{tmp_path}'; check the path"),
    ]
    for line, text in missing:
        with pytest.raises(UsageError) as raised:
            _usage.check_target(run.parse_args(line))
        assert text in str(raised.value)
        assert run.cli(line) == 2
    assert not launch.calls


def test_existing_files_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A worker has the working directory in its path, the launcher need not.
    (tmp_path / "module_of_test.py").write_text("raise SystemExit('imported')")
    (tmp_path / "local.sh").write_text("")
    there = [
        ["module_of_test.py"],
        [str(tmp_path)],
        ["-"],
        ["-m", "module_of_test"],
        ["-m", "module_of_test.sub"],
        ["-m", "json.tool"],
        ["-m", "__main__"],
        ["--no-python", "sh"],
        ["--no-python", "./local.sh"],
        ["--no-python", "-m", "reported later"],
    ]
    for line in there:
        _usage.check_target(run.parse_args(line))
    assert "module_of_test" not in sys.modules


def test_modules_of_another_interpreter_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_EXEC", "/opt/python")

    _usage.check_target(run.parse_args(["-m", "gone_module"]))


def test_an_unreadable_script_is_named(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)

    with pytest.raises(UsageError, match="cannot be read; allow it with chmod \\+r"):
        _usage.check_target(run.parse_args([script]))


def test_late_names_are_there() -> None:
    from ferroelastic import launcher

    from_run: Any = run
    assert from_run.LaunchConfig is launcher.LaunchConfig
    assert from_run.logger.name == "ferroelastic.run"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        from_run.nonsense  # noqa: B018 - the access is the test


def test_options_that_a_program_adds() -> None:
    """As the launchers of other packages do with torch's parser."""
    parser = run.get_args_parser()
    parser.add_argument("--network-check", action="store_true")
    parser.add_argument("--pair", nargs=2)
    parser.add_argument("--few", nargs="*")
    parser.add_argument("--maybe", nargs="?")
    parsed = parser.parse_args(
        ["--network-check", "--pair", "a", "b", "--maybe", "--few", "c", "-t", "0", "t.py", "--mo", "1"]
    )
    assert (parsed.training_script, parsed.training_script_args) == ("t.py", ["--mo", "1"])
    assert (parsed.network_check, parsed.pair, parsed.few, parsed.maybe) == (True, ["a", "b"], ["c"], None)
    parsed = parser.parse_args(["--maybe", "d", "--network", "-", "--few"])
    assert (parsed.training_script, parsed.training_script_args, parsed.maybe) == ("-", ["--few"], "d")


def test_arguments_that_a_program_adds_after_the_script() -> None:
    parser = run.get_args_parser()
    parser.add_argument("last", nargs="?")
    assert parser.parse_args(["t.py", "a"]).training_script_args == ["a"]


def test_an_unknown_option_among_those_of_the_launcher() -> None:
    parsed, unknown = run.get_args_parser().parse_known_args(["--bogus", "t.py", "--mo", "1"])
    assert (parsed.training_script, parsed.training_script_args, unknown) == ("t.py", ["--mo", "1"], ["--bogus"])


def test_the_common_line_is_parsed_from_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ferrorun", "t.py", "--mo", "1"])
    assert run.parse_args(None).training_script_args == ["--mo", "1"]


@pytest.mark.parametrize(
    ("line", "variables", "expected"),
    [
        ([], {}, None),
        ([], {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "a"}, "a"),
        ([], {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "a", "PET_LOG_LINE_PREFIX_TEMPLATE": "b"}, "b"),
        (["--log-line-prefix-template=c"], {"PET_LOG_LINE_PREFIX_TEMPLATE": "b"}, "c"),
        (["--log_line_prefix_template", ""], {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "a"}, "a"),
    ],
)
def test_the_prefix_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], variables: dict[str, str], expected: str | None
) -> None:
    for name in ("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "PET_LOG_LINE_PREFIX_TEMPLATE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    config, _, _ = run.config_from_args(run.parse_args(["--log-dir", str(tmp_path), *line, "t.py"]))

    assert config.log_line_prefix_template == expected
