"""A value of a wrong type is named where it is passed."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.fake_agent import Agent, spec

from ferroelastic import _checks
from ferroelastic.agent.server import LocalElasticAgent
from ferroelastic.launcher.api import LaunchConfig, launch_agent
from ferroelastic.multiprocessing import DefaultLogsSpecs, start_processes
from ferroelastic.rendezvous import RendezvousParameters

if TYPE_CHECKING:
    from pathlib import Path


class Whole:
    """A number as those of numpy are."""

    def __index__(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, "2") for name in ("min_nodes", "max_nodes", "nproc_per_node", "max_restarts", "monitor_interval")],
        *[
            (name, "2")
            for name in ("rdzv_timeout", "shutdown_timeout", "exit_barrier_timeout", "logs_specs", "numa_options")
        ],
        ("nproc_per_node", 1.5),
        ("monitor_interval", None),
        *[(name, 5) for name in ("run_id", "role", "rdzv_backend", "local_addr", "log_line_prefix_template")],
        ("event_log_handler", None),
        ("signals_to_handle", ["SIGTERM"]),
        ("signals_to_forward", None),
        ("rdzv_configs", "timeout=5"),
        ("duplicate_stdout_filters", "loss"),
        ("duplicate_stderr_filters", [1]),
    ],
)
def test_of_a_configuration(tmp_path: Path, name: str, value: Any) -> None:
    fields: dict[str, Any] = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 1, "rdzv_backend": "c10d"}
    fields["logs_specs"] = DefaultLogsSpecs(str(tmp_path))
    shown = value[0] if name == "duplicate_stderr_filters" else value
    with pytest.raises(TypeError, match=rf"{name} must be .*, got ") as raised:
        LaunchConfig(**{**fields, name: value})
    assert str(raised.value).endswith(f"got {shown!r} ({type(shown).__name__})")
    changed = LaunchConfig(**fields)
    setattr(changed, name, value)
    with pytest.raises(TypeError, match=rf"{name} must be "):
        launch_agent(changed, "/bin/true", [])


def test_arguments_and_entrypoint_are_checked(tmp_path: Path) -> None:
    config = LaunchConfig(1, 1, 1, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="x")
    config.logs_specs = DefaultLogsSpecs(str(tmp_path))
    arguments: Any = "abc"
    with pytest.raises(TypeError, match=r"args must be a list of arguments, got 'abc' \(str\)"):
        launch_agent(config, "/bin/true", arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("role", None),
        ("local_world_size", "2"),
        ("local_world_size", 2.0),
        ("max_restarts", "1"),
        ("monitor_interval", "1"),
        ("args", 5),
        ("args", "abc"),
        ("entrypoint", 5),
        ("entrypoint", ["python", "train.py"]),
    ],
)
def test_of_a_specification(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}( of role 'trainer')? must be .*, got "):
        spec(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shutdown_timeout", "3"),
        ("exit_barrier_timeout", "3"),
        ("logs_specs", "logs"),
        ("log_line_prefix_template", 5),
    ],
)
def test_of_an_agent(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be .*, got "):
        LocalElasticAgent(spec(), **{"logs_specs": DefaultLogsSpecs(str(tmp_path)), name: value})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"entrypoint": 5}, "entrypoint"),
        ({"args": {0: 5}}, r"args\[0\]"),
        ({"envs": {0: None}}, r"envs\[0\]"),
        ({"envs": {0: {"LEVEL": 5}}}, r"envs\[0\]\['LEVEL'\]"),
        ({"logs_specs": "logs"}, "logs_specs"),
        ({"shutdown_timeout": "3"}, "shutdown_timeout"),
    ],
)
def test_of_workers(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    chosen = {
        "name": "n",
        "entrypoint": "/bin/true",
        "args": {0: ()},
        "envs": {0: {}},
        "logs_specs": DefaultLogsSpecs(str(tmp_path)),
        **fields,
    }
    with pytest.raises(TypeError, match=rf"^{named} must be .*, got "):
        start_processes(**chosen)


@pytest.mark.parametrize(
    ("name", "value"), [("log_dir", 5), ("redirects", "3"), ("tee", None), ("local_ranks_filter", "0")]
)
def test_of_logs(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got "):
        DefaultLogsSpecs(**{name: value})


def test_of_a_rendezvous() -> None:
    nodes: Any = "1"
    for numbers in ((nodes, 1), (1, nodes)):
        with pytest.raises(TypeError, match="_nodes of the rendezvous must be a number of nodes, got '1'"):
            RendezvousParameters("c10d", "localhost", "run", *numbers)


def test_numbers_of_any_type_will_do(tmp_path: Path) -> None:
    for number in (1, 1.5, True, Decimal(2), Fraction(1, 3), float("inf")):
        _checks.check_number("it", number)
    _checks.check_whole_number("it", Whole())
    assert Agent(spec(max_restarts=2.0, monitor_interval=Decimal(1)))
    assert DefaultLogsSpecs(tmp_path).root_log_dir == str(tmp_path)  # type: ignore[arg-type]  # torch takes it
