"""The launcher's Python API: configurations held against torch's, and what an agent's end turns into."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from ferroelastic import _torch
from ferroelastic.agent.server.api import RunResult, WorkerState
from ferroelastic.launcher import LaunchConfig, api, elastic_launch, launch_agent
from ferroelastic.multiprocessing import SignalException
from ferroelastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from ferroelastic.rendezvous import RendezvousParameters


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    # launch_agent sets it; this way it is put back.
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "unset")


def _config(**kwargs: Any) -> LaunchConfig:
    fields = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "logs_specs": Mock(), "run_id": "job"}
    return LaunchConfig(**{**fields, **kwargs})


def _fields(cls: Any) -> list[tuple[str, Any, Any]]:
    def made(factory: Any) -> Any:
        return factory() if callable(factory) else "none"

    missing = dataclasses.MISSING
    return [
        (
            f.name,
            "none" if f.default is missing else f.default,
            made(None if f.default_factory is missing else f.default_factory),
        )
        for f in dataclasses.fields(cls)
    ]


def test_the_fields_are_torchs() -> None:
    theirs = pytest.importorskip("torch.distributed.launcher.api")

    ours = _fields(LaunchConfig)
    added = ours[len(_fields(theirs.LaunchConfig)) :]
    assert ours == [*_fields(theirs.LaunchConfig), *added]
    assert [name for name, *_ in added] == [
        "signals_to_forward",
        "interactive_rank",
        "warm_workers",
        "warm_imports",
        "preload",
        "log_options",
        "exit_barrier_timeout",
        "grace_signal_target",
        "restart_settings",
        "restart_policy",
    ]


@pytest.mark.parametrize("rank", [-1, 2])
def test_the_interactive_rank_is_one_of_this_node(rank: int) -> None:
    assert _config(interactive_rank=1).interactive_rank == 1
    with pytest.raises(ValueError, match=rf"^interactive_rank={rank} is not a local rank; give 0 to 1$"):
        _config(interactive_rank=rank)


def test_the_rendezvous_timeout() -> None:
    assert _config().rdzv_configs == {"timeout": 900}
    assert _config(rdzv_configs={"timeout": 5}).rdzv_configs == {"timeout": 5}
    assert _config(rdzv_configs={"timeout": 5, "a": "b"}, rdzv_timeout=7).rdzv_configs == {"timeout": 7, "a": "b"}


def test_logs_specs_have_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    config = LaunchConfig(1, 1, 1)

    assert type(config.logs_specs).__name__ == "DefaultLogsSpecs"


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [(None, None, 30), (None, "12", 12), (None, "0", 0), (5, "12", 5), (0, "12", 0), (0, "x", 0)],
)
def test_the_shutdown_timeout(
    monkeypatch: pytest.MonkeyPatch, given: int | None, variable: str | None, expected: int
) -> None:
    if variable is not None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", variable)

    assert _config(shutdown_timeout=given).shutdown_timeout == expected


@pytest.mark.parametrize("variable", ["x", "-1", "1.5", ""])
def test_a_bad_shutdown_timeout_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", variable)

    with pytest.raises(
        ValueError, match=f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT='{variable}' is not a timeout; give whole seconds"
    ):
        _config()


def test_a_negative_shutdown_timeout_is_refused() -> None:
    with pytest.raises(ValueError, match="shutdown_timeout must be non-negative, got -3"):
        _config(shutdown_timeout=-3)


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [(None, None, 300), (None, "900", 900), (None, "0.5", 0.5), (120, "900", 120), (0, "900", 0), (0, "x", 0)],
)
def test_the_timeout_of_the_exit_barrier(
    monkeypatch: pytest.MonkeyPatch, given: float | None, variable: str | None, expected: float
) -> None:
    if variable is not None:
        monkeypatch.setenv("TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT", variable)

    resolved = _config(exit_barrier_timeout=given).exit_barrier_timeout
    assert (resolved, type(resolved)) == (expected, float)


@pytest.mark.parametrize("variable", ["x", "-1", "nan", "inf", ""])
def test_a_bad_timeout_of_the_exit_barrier_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT", variable)

    with pytest.raises(
        ValueError, match=f"TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT='{variable}' is not a timeout; give seconds"
    ):
        _config()


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_bad_timeout_of_the_exit_barrier_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"exit_barrier_timeout must be non-negative, got {value}"):
        _config(exit_barrier_timeout=value)


def _train() -> None:
    """Stand for a trainer."""


class _Callable:
    def __call__(self) -> None:
        """Do nothing."""


ENTRYPOINTS: list[tuple[Any, list[Any]]] = [
    (_train, []),
    ("train.sh", ["-u", "x"]),
    (sys.executable, ["-u", "train.py", "--lr"]),
    (sys.executable, ["-u", "-m", "pkg.train"]),
    (sys.executable, ["-u"]),
    (None, ["x"]),
]


@pytest.mark.parametrize(("entrypoint", "args"), ENTRYPOINTS)
def test_entrypoint_names_are_torchs(entrypoint: Any, args: list[Any]) -> None:
    theirs = pytest.importorskip("torch.distributed.launcher.api")

    assert api._get_entrypoint_name(entrypoint, args) == theirs._get_entrypoint_name(entrypoint, args)


def test_entrypoint_names_where_torch_fails() -> None:
    assert api._get_entrypoint_name(_Callable(), []) == "_Callable"
    assert api._get_entrypoint_name(sys.executable, ["", 3]) == "3"


def _parameters(backend: str, endpoint: str) -> RendezvousParameters:
    return RendezvousParameters(backend, endpoint, "job", 1, 1)


@pytest.mark.parametrize(
    ("backend", "endpoint", "expected"),
    [
        ("c10d", "node0:1", (None, None)),
        ("static", "node0:1", ("node0", 1)),
        ("static", " [::1]:29500 ", ("::1", 29500)),
    ],
)
def test_address_and_port(backend: str, endpoint: str, expected: tuple[str | None, int | None]) -> None:
    assert api._get_addr_and_port(_parameters(backend, endpoint)) == expected


@pytest.mark.parametrize(
    ("endpoint", "text"), [(" ", "give --master-addr and --master-port"), ("node0", "'node0' has no port")]
)
def test_a_static_rendezvous_needs_address_and_port(endpoint: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        api._get_addr_and_port(_parameters("static", endpoint))


class Launched:
    """What ``launch_agent`` made, with an agent that ends as the test says."""

    def __init__(self) -> None:
        self.end: Callable[[], Any] = lambda: RunResult(WorkerState.SUCCEEDED, return_values={0: "a", 1: "b"})
        self.handler = Mock()
        self.parameters: list[Any] = []
        self.spec: Any = None
        self.agent_kwargs: dict[str, Any] = {}
        self.events: list[Any] = []
        self.agent = Mock()
        self.agent.run = self.run
        self.agent.get_event_succeeded.return_value = "succeeded"
        self.agent.get_event_failed.return_value = "failed"

    def run(self) -> Any:
        return self.end()

    def get_handler(self, parameters: Any) -> Any:
        self.parameters.append(parameters)
        return self.handler

    def make_agent(self, spec: Any, **kwargs: Any) -> Any:
        self.spec, self.agent_kwargs = spec, kwargs
        return self.agent


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    fake = Launched()
    monkeypatch.setattr(api, "LocalElasticAgent", fake.make_agent)
    monkeypatch.setattr("ferroelastic.rendezvous.registry.get_rendezvous_handler", fake.get_handler)
    monkeypatch.setattr(
        "ferroelastic.events.record", lambda event, destination: fake.events.append((event, destination))
    )
    return fake


def test_success_returns_the_values_of_the_workers(launched: Launched) -> None:
    config = _config(
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": 3, "is_host": "1"},
        local_addr="10.0.0.2",
        event_log_handler="console",
        signals_to_handle="SIGTERM",
        virtual_local_rank=True,
        shutdown_timeout=4,
        exit_barrier_timeout=6,
        start_method="fork",
        log_line_prefix_template="[$rank]",
        duplicate_stdout_filters=["x"],
    )

    assert elastic_launch(config, _train)(1, "two") == {0: "a", 1: "b"}

    (parameters,) = launched.parameters
    assert (parameters.backend, parameters.endpoint, parameters.run_id) == ("c10d", "localhost:0", "job")
    assert (parameters.min_nodes, parameters.max_nodes, parameters.local_addr) == (1, 1, "10.0.0.2")
    assert parameters.config == {"timeout": 3, "is_host": "1"}
    spec = launched.spec
    assert (spec.role, spec.local_world_size, spec.entrypoint, spec.args) == ("default_role", 2, _train, (1, "two"))
    assert (spec.rdzv_handler, spec.max_restarts, spec.monitor_interval) == (launched.handler, 3, 0.1)
    assert (spec.master_addr, spec.master_port, spec.local_addr) == (None, None, "10.0.0.2")
    assert (spec.event_log_handler, spec.numa_options, spec.virtual_local_rank) == ("console", None, True)
    assert (spec.duplicate_stdout_filters, spec.duplicate_stderr_filters) == (["x"], None)
    assert launched.agent_kwargs == {
        "logs_specs": config.logs_specs,
        "start_method": "fork",
        "log_line_prefix_template": "[$rank]",
        "exit_barrier_timeout": 6,
        "shutdown_timeout": 4,
        "health_check_server": None,
    }
    assert launched.events == [("succeeded", "console")]
    assert os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] == "SIGTERM"
    launched.handler.shutdown.assert_called_once_with()


def test_a_static_rendezvous_tells_the_master(launched: Launched) -> None:
    launch_agent(_config(rdzv_backend="static", rdzv_endpoint="node0:1234", rdzv_configs={"rank": 0}), "true", [])

    assert (launched.spec.master_addr, launched.spec.master_port) == ("node0", 1234)


def test_a_missing_run_id_is_made_up(launched: Launched) -> None:
    config = _config(run_id="")

    launch_agent(config, "true", [])

    assert config.run_id.isdecimal()
    assert launched.parameters[0].run_id == config.run_id


def test_failed_workers_raise_their_failures(launched: Launched) -> None:
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=3, error_file="")
    launched.end = lambda: RunResult(WorkerState.FAILED, failures={5: failure})

    with pytest.raises(ChildFailedError) as raised:
        launch_agent(_config(), sys.executable, ["-u", "train.py"])

    assert (raised.value.name, raised.value.failures) == ("train.py", {5: failure})
    # The agent itself did what it should.
    assert launched.events == [("succeeded", "null")]
    launched.handler.shutdown.assert_called_once_with()


@pytest.mark.parametrize("state", [WorkerState.UNHEALTHY, WorkerState.FAILED])
def test_an_agent_that_gave_up_on_stuck_workers_raises(launched: Launched, state: WorkerState) -> None:
    launched.end = lambda: RunResult(state)

    with pytest.raises(
        RuntimeError, match=f"the workers of 'train.sh' ended in state {state.value} and none failed by itself"
    ):
        launch_agent(_config(), "train.sh", [])

    assert launched.events == [("succeeded", "null"), ("failed", "null")]
    launched.handler.shutdown.assert_called_once_with()


def _raise(error: BaseException) -> Callable[[], Any]:
    def end() -> Any:
        raise error

    return end


def test_a_signal_leaves_the_rendezvous_open_for_others(launched: Launched) -> None:
    launched.end = _raise(SignalException("told to end", signal.SIGTERM))

    with pytest.raises(SignalException):
        launch_agent(_config(), "true", [])

    assert launched.events == [("failed", "null")]
    launched.handler.shutdown.assert_not_called()


def test_torchs_own_signal_exception_counts_too(launched: Launched) -> None:
    theirs = pytest.importorskip("torch.distributed.elastic.multiprocessing.api")
    launched.end = _raise(theirs.SignalException("told to end", signal.SIGTERM))

    with pytest.raises(theirs.SignalException):
        launch_agent(_config(), "true", [])

    launched.handler.shutdown.assert_not_called()


def test_an_error_of_the_agent_closes_the_rendezvous(launched: Launched) -> None:
    launched.end = _raise(OSError("no more processes"))

    with pytest.raises(OSError, match="no more processes"):
        launch_agent(_config(), "true", [])

    assert launched.events == [("failed", "null")]
    launched.handler.shutdown.assert_called_once_with()


def test_a_health_server_learns_about_the_agent(launched: Launched) -> None:
    proxy = Mock()
    server = SimpleNamespace(alive_callback=proxy)

    elastic_launch(_config(), "true", server)()  # type: ignore[arg-type]

    proxy.set_delegate.assert_called_once_with(launched.agent._get_alive_time)
    assert launched.agent_kwargs["health_check_server"] is server
    plain: Any = SimpleNamespace(alive_callback=lambda: 0)
    elastic_launch(_config(), "true", plain)()


def test_a_configuration_of_an_older_torch_will_do(launched: Launched) -> None:
    newer = {
        "exit_barrier_timeout",
        "numa_options",
        "signals_to_handle",
        "duplicate_stdout_filters",
        "duplicate_stderr_filters",
        "virtual_local_rank",
        "shutdown_timeout",
    }
    config = _config()
    old: Any = SimpleNamespace(**{name: value for name, value in vars(config).items() if name not in newer})

    assert launch_agent(old, "true", []) == {0: "a", 1: "b"}

    assert launched.agent_kwargs["shutdown_timeout"] == 30
    assert launched.agent_kwargs["exit_barrier_timeout"] == 300
    assert os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


@pytest.mark.usefixtures("launched")
def test_torchs_configuration_will_do() -> None:
    theirs = pytest.importorskip("torch.distributed.launcher.api")

    assert launch_agent(theirs.LaunchConfig(1, 1, 2, logs_specs=Mock(), run_id="job"), "true", []) == {0: "a", 1: "b"}


@pytest.mark.parametrize(
    ("version", "level", "reports"),
    [((2, 15), "INFO", 0), ((2, 16), "INFO", 1), ((3, 0), "INFO", 1), (None, "INFO", 0), ((2, 16), "WARNING", 0)],
)
def test_a_torch_newer_than_any_known_version_is_reported_at_info(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: tuple[int, int] | None,
    level: str,
    reports: int,
) -> None:
    monkeypatch.setattr(_torch, "installed_version", lambda: version)
    with caplog.at_level(level, api.logger.name):
        api._log_config(_config(), "train.py")
    found = [record for record in caplog.records if "is newer than 2.15" in record.getMessage()]
    assert [record.levelname for record in found] == ["INFO"] * reports


def test_the_target_of_the_stop_signal(launched: Launched) -> None:
    target: Any = "children"
    with pytest.raises(ValueError, match="grace_signal_target='children' is unknown; give 'group' or 'leader'"):
        _config(grace_signal_target=target)
    launch_agent(_config(), "true", [])
    assert "grace_signal_target" not in launched.agent_kwargs  # the class may be torch's
    launch_agent(_config(grace_signal_target="leader"), "true", [])
    assert launched.agent_kwargs["grace_signal_target"] == "leader"
