"""``launcher``: configurations, what becomes of an agent's result, and whole launches."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.conformance import stubs, workers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.implementations import Implementation


def config(impl: Implementation, tmp_path: Path, **fields: Any) -> Any:
    """A job on this node alone."""
    std = impl.mp.Std
    specs = impl.mp.DefaultLogsSpecs(
        str(tmp_path / "logs"), std[fields.pop("redirects", "NONE")], std[fields.pop("tee", "NONE")]
    )
    chosen = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": 2,
        "run_id": "my_run",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "max_restarts": 0,
        "monitor_interval": 0.02,
        "start_method": "fork",
        "logs_specs": specs,
        **fields,
    }
    return impl.launcher.api.LaunchConfig(**chosen)


class TestLaunchConfig:
    def test_defaults(self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        made = impl.launcher.api.LaunchConfig(1, 2, 3)
        values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        assert isinstance(values.pop("logs_specs"), impl.mp.DefaultLogsSpecs)
        assert values.pop("signals_to_forward", "") == ""  # not in torch
        assert values.pop("interactive_rank", None) is None  # not in torch
        assert values == {
            "min_nodes": 1,
            "max_nodes": 2,
            "nproc_per_node": 3,
            "run_id": "",
            "role": "default_role",
            "rdzv_endpoint": "",
            "rdzv_backend": "etcd",
            "rdzv_configs": {"timeout": 900},
            "rdzv_timeout": -1,
            "max_restarts": 3,
            "monitor_interval": 0.1,
            "start_method": "spawn",
            "log_line_prefix_template": None,
            "metrics_cfg": {},
            "local_addr": None,
            "event_log_handler": "null",
            "numa_options": None,
            "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
            "duplicate_stdout_filters": None,
            "duplicate_stderr_filters": None,
            "virtual_local_rank": False,
            "shutdown_timeout": 30,
        }

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"rdzv_configs": {"timeout": 5}}, {"timeout": 5}),
            ({"rdzv_configs": {"rank": 1}}, {"rank": 1, "timeout": 900}),
            ({"rdzv_timeout": 7}, {"timeout": 7}),
            ({"rdzv_configs": {"timeout": 5}, "rdzv_timeout": 7}, {"timeout": 7}),
        ],
    )
    def test_timeout_of_the_rendezvous(
        self, impl: Implementation, tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]
    ) -> None:
        assert config(impl, tmp_path, **fields).rdzv_configs == expected

    @pytest.mark.parametrize(
        ("explicit", "variable", "expected"),
        [(None, None, 30), (None, "7", 7), (5, "7", 5), (0, "7", 0), (None, "0", 0)],
    )
    def test_shutdown_timeout(
        self,
        impl: Implementation,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        explicit: int | None,
        variable: str | None,
        expected: int,
    ) -> None:
        if variable is not None:
            monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", variable)
        assert config(impl, tmp_path, shutdown_timeout=explicit).shutdown_timeout == expected

    def test_filters_that_are_no_list(self, impl: Implementation, tmp_path: Path) -> None:
        def is_refused() -> bool:
            try:
                config(impl, tmp_path, duplicate_stdout_filters="loss")
            except TypeError:
                return True
            return False

        assert is_refused() == impl.expect("filters-are-lists", torch=False, ours=True)

    def test_negative_shutdown_timeout(self, impl: Implementation, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="shutdown_timeout must be non-negative, got -1"):
            config(impl, tmp_path, shutdown_timeout=-1)

    def test_shutdown_timeout_that_is_no_number(
        self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "soon")
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is looked at below
            config(impl, tmp_path)
        names_it = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in str(raised.value)
        assert names_it == impl.expect("named-values", torch=False, ours=True)

    def test_negative_shutdown_timeout_in_the_environment(
        self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "-1")

        def is_taken() -> bool:
            try:
                config(impl, tmp_path)
            except ValueError:
                return False
            return True

        assert is_taken() == impl.expect("checked-environment", torch=True, ours=False)


class TestHelpers:
    @pytest.mark.parametrize(
        ("entrypoint", "args", "expected"),
        [
            (workers.give, [], "give"),
            (sys.executable, ["-u", "train.py", "--lr=1"], "train.py"),
            (sys.executable, ["-u"], ""),
            ("/usr/bin/env", ["x"], "/usr/bin/env"),
            (None, [], ""),
        ],
    )
    def test_name_of_the_entrypoint(self, impl: Implementation, entrypoint: Any, args: Any, expected: str) -> None:
        assert impl.launcher.api._get_entrypoint_name(entrypoint, args) == expected

    def test_an_entrypoint_without_a_name(self, impl: Implementation) -> None:
        def name() -> Any:
            try:
                return impl.launcher.api._get_entrypoint_name(partial(workers.give), [])
            except AttributeError:
                return None

        assert name() == impl.expect("any-callable", torch=None, ours="give")

    @pytest.mark.parametrize(
        ("backend", "endpoint", "expected"),
        [("c10d", "host:1", (None, None)), ("static", " host:1 ", ("host", 1)), ("static", "[::1]:1", ("::1", 1))],
    )
    def test_address_of_the_master(self, impl: Implementation, backend: str, endpoint: str, expected: Any) -> None:
        params = impl.rendezvous.RendezvousParameters(backend, endpoint, "run", 1, 1)
        assert impl.launcher.api._get_addr_and_port(params) == expected

    @pytest.mark.parametrize(("endpoint", "message"), [("", "--master-addr and --master-port"), ("h", "--master-port")])
    def test_address_that_is_not_complete(self, impl: Implementation, endpoint: str, message: str) -> None:
        params = impl.rendezvous.RendezvousParameters("static", endpoint, "run", 1, 1)
        with pytest.raises(ValueError, match=message):
            impl.launcher.api._get_addr_and_port(params)


# ---- launch_agent, with an agent that does nothing


class Launched:
    """A launch whose agent and rendezvous are put in their place."""

    def __init__(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch, store: Any) -> None:
        self.impl = impl
        self.api = impl.launcher.api
        self.handler = stubs.rendezvous(impl, store)
        self.agent = mock.Mock()
        self.agent.run.return_value = stubs.succeeded(impl, "zero", "one")
        self.agent_class = mock.Mock(return_value=self.agent)
        self.recorded: list[Any] = []
        monkeypatch.setattr(self.api, "LocalElasticAgent", self.agent_class)
        monkeypatch.setattr(self.api.rdzv_registry, "get_rendezvous_handler", self.get_handler)
        monkeypatch.setattr(self.api.events, "record", lambda event, to: self.recorded.append((event, to)))

    def get_handler(self, parameters: Any) -> Any:
        self.parameters = parameters
        return self.handler


@pytest.fixture
def launched(impl: Implementation, monkeypatch: pytest.MonkeyPatch, store: Any) -> Launched:
    return Launched(impl, monkeypatch, store)


class TestLaunchAgent:
    def test_what_the_agent_is_made_of(self, launched: Launched, tmp_path: Path) -> None:
        impl = launched.impl
        chosen = config(
            impl,
            tmp_path,
            min_nodes=1,
            max_nodes=3,
            nproc_per_node=4,
            role="trainer",
            rdzv_backend="static",
            rdzv_endpoint="master:29501",
            rdzv_configs={"rank": 2},
            rdzv_timeout=44,
            max_restarts=5,
            monitor_interval=0.5,
            start_method="forkserver",
            log_line_prefix_template="<${rank}>",
            local_addr="here",
            event_log_handler="console",
            signals_to_handle="SIGTERM",
            duplicate_stdout_filters=["a"],
            duplicate_stderr_filters=["b"],
            virtual_local_rank=True,
            shutdown_timeout=9,
        )
        assert launched.api.launch_agent(chosen, "/bin/true", ["x", 1]) == {0: "zero", 1: "one"}
        (options,) = [dict(call.kwargs) for call in launched.agent_class.call_args_list]
        spec = options.pop("spec")
        assert isinstance(spec, impl.agent.WorkerSpec)
        assert {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)} == {
            "role": "trainer",
            "local_world_size": 4,
            "rdzv_handler": launched.handler,
            "fn": None,
            "entrypoint": "/bin/true",
            "args": ("x", 1),
            "max_restarts": 5,
            "monitor_interval": 0.5,
            "master_port": 29501,
            "master_addr": "master",
            "local_addr": "here",
            "event_log_handler": "console",
            "numa_options": None,
            "duplicate_stdout_filters": ["a"],
            "duplicate_stderr_filters": ["b"],
            "virtual_local_rank": True,
        }
        assert options == {
            "logs_specs": chosen.logs_specs,
            "start_method": "forkserver",
            "log_line_prefix_template": "<${rank}>",
            "shutdown_timeout": 9,
            "health_check_server": None,
        }
        parameters = launched.parameters
        assert (parameters.backend, parameters.endpoint, parameters.run_id) == ("static", "master:29501", "my_run")
        assert (parameters.min_nodes, parameters.max_nodes, parameters.local_addr) == (1, 3, "here")
        assert parameters.config == {"rank": 2, "timeout": 44}
        assert os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] == "SIGTERM"
        launched.agent.run.assert_called_once_with()
        assert launched.recorded == [(launched.agent.get_event_succeeded(), "console")]
        assert launched.handler.is_shut_down

    def test_a_run_id_is_made_up(self, launched: Launched, tmp_path: Path) -> None:
        chosen = config(launched.impl, tmp_path, run_id="")
        launched.api.launch_agent(chosen, "/bin/true", [])
        assert chosen.run_id == launched.parameters.run_id
        assert chosen.run_id.isdecimal()

    def test_failed_workers(self, launched: Launched, tmp_path: Path) -> None:
        impl = launched.impl
        failures = {1: impl.errors.ProcessFailure(1, 2, 3, "")}
        launched.agent.run.return_value = impl.agent.RunResult(impl.agent.WorkerState.FAILED, failures=failures)
        with pytest.raises(impl.errors.ChildFailedError, match="/bin/false FAILED") as raised:
            launched.api.launch_agent(config(impl, tmp_path), "/bin/false", [])
        assert (raised.value.name, raised.value.failures) == ("/bin/false", failures)
        assert launched.recorded == [(launched.agent.get_event_succeeded(), "null")]
        assert launched.handler.is_shut_down

    def test_stuck_workers(self, launched: Launched, tmp_path: Path) -> None:
        launched.agent.run.return_value = stubs.in_state(launched.impl, "UNHEALTHY")

        def is_a_success() -> bool:
            try:
                return bool(launched.api.launch_agent(config(launched.impl, tmp_path), "/bin/true", []) == {})
            except RuntimeError:
                return False

        assert is_a_success() == launched.impl.expect("stuck-is-failed", torch=True, ours=False)

    def test_a_signal_leaves_the_rendezvous_open(self, launched: Launched, tmp_path: Path) -> None:
        impl = launched.impl
        launched.agent.run.side_effect = impl.mp.SignalException("told to end", signal.SIGTERM)
        with pytest.raises(impl.mp.SignalException):
            launched.api.launch_agent(config(impl, tmp_path), "/bin/true", [])
        assert launched.recorded == [(launched.agent.get_event_failed(), "null")]
        assert not launched.handler.is_shut_down

    def test_an_error_of_the_agent(self, launched: Launched, tmp_path: Path) -> None:
        launched.agent.run.side_effect = KeyError("broken")
        with pytest.raises(KeyError, match="broken"):
            launched.api.launch_agent(config(launched.impl, tmp_path), "/bin/true", [])
        assert launched.recorded == [(launched.agent.get_event_failed(), "null")]
        assert launched.handler.is_shut_down

    def test_a_given_health_server(self, launched: Launched, tmp_path: Path) -> None:
        proxy = launched.impl("agent.server.local_elastic_agent")._AliveCallbackProxy()
        server = launched.impl("agent.server.health_check_server").HealthCheckServer(proxy, 1, 60)
        launch = launched.api.elastic_launch(config(launched.impl, tmp_path), "/bin/true", server)
        assert launch() == {0: "zero", 1: "one"}
        assert launched.agent_class.call_args.kwargs["health_check_server"] is server
        assert proxy() is launched.agent._get_alive_time.return_value

    def test_arguments(self, launched: Launched, tmp_path: Path) -> None:
        launched.api.elastic_launch(config=config(launched.impl, tmp_path), entrypoint=workers.give)("a", 2)
        spec = launched.agent_class.call_args.kwargs["spec"]
        assert (spec.entrypoint, spec.args, spec.master_addr) == (workers.give, ("a", 2), None)


# ---- whole launches


class TestElasticLaunch:
    def test_a_function(self, impl: Implementation, tmp_path: Path) -> None:
        outputs = impl.launcher.api.elastic_launch(config(impl, tmp_path), workers.give_rank)(10)
        assert outputs == {0: 0, 1: 10}

    def test_a_program(self, impl: Implementation, tmp_path: Path) -> None:
        variables = "RANK LOCAL_RANK WORLD_SIZE ROLE_NAME GROUP_RANK TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE"
        script = "echo " + " ".join(f"${name}" for name in variables.split()) + "; test $MASTER_PORT -gt 0"
        outputs = impl.launcher.api.elastic_launch(config(impl, tmp_path, redirects="OUT"), "/bin/sh")("-c", script)
        assert outputs == {0: None, 1: None}
        written = [path.read_text() for path in sorted(tmp_path.glob("logs/my_run_*/attempt_0/*/stdout.log"))]
        assert written == [f"{rank} {rank} 2 default_role 0 my_run True\n" for rank in range(2)]

    def test_a_failure(self, impl: Implementation, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "ready")
        launch = impl.launcher.api.elastic_launch(config(impl, tmp_path), workers.by_rank)
        with pytest.raises(impl.errors.ChildFailedError, match="by_rank FAILED") as raised:
            launch(
                (workers.wait_and_raise_error, str(tmp_path / "ready"), "boom"),
                (workers.announce_and_wait, str(tmp_path / "ready")),
            )
        rank, failure = raised.value.get_first_failure()
        assert (rank, failure.exitcode, failure.message["message"]) == (0, 1, "ValueError: boom")
        assert "ValueError: boom" in str(raised.value)

    def test_a_restart(self, impl: Implementation, tmp_path: Path) -> None:
        launch = impl.launcher.api.elastic_launch(config(impl, tmp_path, max_restarts=1), workers.fail_unless_restarted)
        assert launch(0, 3) == {rank: f"attempt 1 of rank {rank}" for rank in range(2)}

    def test_the_store_of_a_restart(self, impl: Implementation, tmp_path: Path) -> None:
        """Whether the workers find what those of the former attempt left in their store."""
        launch = impl.launcher.api.elastic_launch(
            config(impl, tmp_path, nproc_per_node=1, max_restarts=1), workers.leave_a_key_and_fail
        )
        finds_it = launch()[0]
        assert finds_it == impl.expect("empty-store", torch=True, ours=False)


# ---- the command line


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
        assert len(list(tmp_path.glob("logs/*/attempt_0/?/stdout.log"))) == 2

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


@pytest.mark.parametrize("name", LINES)
def test_command_lines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch makes of them is what is expected."""
    from torch.distributed import run as torchs

    import ferroelastic.run as ours

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "<${rank}>")
    expected, found = (as_data(module, [f"--log-dir={tmp_path}", *LINES[name]]) for module in (torchs, ours))
    assert found == expected


def as_data(module: Any, line: list[str]) -> Any:
    config, entrypoint, arguments = module.config_from_args(module.parse_args(line))
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["logs_specs"] = {
        name: value for name, value in vars(fields["logs_specs"]).items() if name.startswith(("_r", "_tee", "_local"))
    }
    assert fields.pop("signals_to_forward", "") == ""  # not in torch
    assert fields.pop("interactive_rank", None) is None  # not in torch
    options = fields["numa_options"]
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
