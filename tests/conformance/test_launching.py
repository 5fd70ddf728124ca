"""``launcher``: the results and errors of an agent, and whole launches."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.conformance import stubs, workers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.implementations import Implementation


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


@pytest.mark.needs("event-log-handler")
class TestLaunchAgent:
    @pytest.mark.needs("shared-health-server")
    def test_arguments_of_the_agent(self, launched: Launched, tmp_path: Path) -> None:
        impl = launched.impl
        chosen = stubs.launch_config(
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
        values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        assert not values.pop("warm_workers", 0)  # not in torch, nor the next two
        assert values.pop("warm_imports", ("torch",)) == ("torch",)
        assert not values.pop("preload", False)
        assert (values.pop("restart_settings", None), values.pop("restart_policy", None)) == (None, None)
        assert values == {
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
        assert options.pop("exit_barrier_timeout", 300) == 300  # not in torch yet
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
        chosen = stubs.launch_config(launched.impl, tmp_path, run_id="")
        launched.api.launch_agent(chosen, "/bin/true", [])
        assert chosen.run_id == launched.parameters.run_id
        assert chosen.run_id.isdecimal()

    def test_failed_workers(self, launched: Launched, tmp_path: Path) -> None:
        impl = launched.impl
        failures = {1: impl.errors.ProcessFailure(1, 2, 3, "")}
        launched.agent.run.return_value = impl.agent.RunResult(impl.agent.WorkerState.FAILED, failures=failures)
        with pytest.raises(impl.errors.ChildFailedError, match="/bin/false FAILED") as raised:
            launched.api.launch_agent(stubs.launch_config(impl, tmp_path), "/bin/false", [])
        assert (raised.value.name, raised.value.failures) == ("/bin/false", failures)
        assert launched.recorded == [(launched.agent.get_event_succeeded(), "null")]
        assert launched.handler.is_shut_down

    def test_stuck_workers(self, launched: Launched, tmp_path: Path) -> None:
        launched.agent.run.return_value = stubs.in_state(launched.impl, "UNHEALTHY")

        def is_a_success() -> bool:
            try:
                return bool(
                    launched.api.launch_agent(stubs.launch_config(launched.impl, tmp_path), "/bin/true", []) == {}
                )
            except RuntimeError:
                return False

        assert is_a_success() == launched.impl.expect("stuck-is-failed", torch=True, ours=False)

    def test_a_signal_leaves_the_rendezvous_open(self, launched: Launched, tmp_path: Path) -> None:
        impl = launched.impl
        launched.agent.run.side_effect = impl.mp.SignalException("told to end", signal.SIGTERM)
        with pytest.raises(impl.mp.SignalException):
            launched.api.launch_agent(stubs.launch_config(impl, tmp_path), "/bin/true", [])
        assert launched.recorded == [(launched.agent.get_event_failed(), "null")]
        assert not launched.handler.is_shut_down

    def test_an_error_of_the_agent(self, launched: Launched, tmp_path: Path) -> None:
        launched.agent.run.side_effect = KeyError("broken")
        with pytest.raises(KeyError, match="broken"):
            launched.api.launch_agent(stubs.launch_config(launched.impl, tmp_path), "/bin/true", [])
        assert launched.recorded == [(launched.agent.get_event_failed(), "null")]
        assert launched.handler.is_shut_down

    @pytest.mark.parametrize("error", [None, KeyError("the cause")])
    def test_an_error_of_the_final_shutdown(
        self,
        launched: Launched,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        error: Exception | None,
    ) -> None:
        """It replaces neither the result nor the error of the job."""
        monkeypatch.setattr(launched.handler, "shutdown", mock.Mock(side_effect=ZeroDivisionError("of the shutdown")))
        if error is not None:
            launched.agent.run.side_effect = error

        def outcome() -> str:
            try:
                launched.api.launch_agent(stubs.launch_config(launched.impl, tmp_path), "/bin/true", [])
            except (KeyError, ZeroDivisionError) as raised:
                return type(raised).__name__
            return "success"

        expected = "success" if error is None else "KeyError"
        assert outcome() == launched.impl.expect("quiet-shutdown", torch="ZeroDivisionError", ours=expected)
        is_logged = "Error shutting down rendezvous handler" in caplog.text
        assert is_logged == launched.impl.expect("quiet-shutdown", torch=False, ours=True)

    @pytest.mark.needs("shared-health-server")
    def test_a_given_health_server(self, launched: Launched, tmp_path: Path) -> None:
        proxy = launched.impl("agent.server.local_elastic_agent")._AliveCallbackProxy()
        server = launched.impl("agent.server.health_check_server").HealthCheckServer(proxy, 1, 60)
        launch = launched.api.elastic_launch(stubs.launch_config(launched.impl, tmp_path), "/bin/true", server)
        assert launch() == {0: "zero", 1: "one"}
        assert launched.agent_class.call_args.kwargs["health_check_server"] is server
        assert proxy() is launched.agent._get_alive_time.return_value

    def test_arguments(self, launched: Launched, tmp_path: Path) -> None:
        launched.api.elastic_launch(config=stubs.launch_config(launched.impl, tmp_path), entrypoint=workers.give)(
            "a", 2
        )
        spec = launched.agent_class.call_args.kwargs["spec"]
        assert (spec.entrypoint, spec.args, spec.master_addr) == (workers.give, ("a", 2), None)


# ---- whole launches


class TestElasticLaunch:
    def test_a_function(self, impl: Implementation, tmp_path: Path) -> None:
        outputs = impl.launcher.api.elastic_launch(stubs.launch_config(impl, tmp_path), workers.give_rank)(10)
        assert outputs == {0: 0, 1: 10}

    def test_a_program(self, impl: Implementation, tmp_path: Path) -> None:
        variables = "RANK LOCAL_RANK WORLD_SIZE ROLE_NAME GROUP_RANK TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE"
        script = "echo " + " ".join(f"${name}" for name in variables.split()) + "; test $MASTER_PORT -gt 0"
        outputs = impl.launcher.api.elastic_launch(stubs.launch_config(impl, tmp_path, redirects="OUT"), "/bin/sh")(
            "-c", script
        )
        assert outputs == {0: None, 1: None}
        written = [path.read_text() for path in sorted(tmp_path.glob("logs/my_run_*/attempt_0/*/stdout.log"))]
        assert written == [f"{rank} {rank} 2 default_role 0 my_run True\n" for rank in range(2)]

    def test_a_failure(self, impl: Implementation, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "ready")
        launch = impl.launcher.api.elastic_launch(stubs.launch_config(impl, tmp_path), workers.by_rank)
        with pytest.raises(impl.errors.ChildFailedError, match="by_rank FAILED") as raised:
            launch(
                (workers.wait_and_raise_error, str(tmp_path / "ready"), "boom"),
                (workers.announce_and_wait, str(tmp_path / "ready")),
            )
        rank, failure = raised.value.get_first_failure()
        assert (rank, failure.exitcode, failure.message["message"]) == (0, 1, "ValueError: boom")
        assert "ValueError: boom" in str(raised.value)

    def test_a_restart(self, impl: Implementation, tmp_path: Path) -> None:
        launch = impl.launcher.api.elastic_launch(
            stubs.launch_config(impl, tmp_path, max_restarts=1), workers.fail_unless_restarted
        )
        assert launch(0, 3) == {rank: f"attempt 1 of rank {rank}" for rank in range(2)}

    def test_the_store_of_a_restart(self, impl: Implementation, tmp_path: Path) -> None:
        """Whether the workers find what those of the former attempt left in their store."""
        launch = impl.launcher.api.elastic_launch(
            stubs.launch_config(impl, tmp_path, nproc_per_node=1, max_restarts=1), workers.leave_a_key_and_fail
        )
        finds_it = launch()[0]
        assert finds_it == impl.expect("empty-store", torch=True, ours=False)
