"""The options of the restart policy on the command line."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import pytest

from ferroelastic._usage import _RESTART_DEFAULTS, UsageError, parse_restart_settings
from ferroelastic.agent.server import RestartSettings
from ferroelastic.run import get_args_parser

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

POLICY = """
class Policy:
    def decide(self, failure): ...

policy = Policy()
number = 3
"""


def parsed(*options: str) -> Namespace:
    return get_args_parser().parse_args([*options, "train.py"])


def test_the_defaults_are_those_of_the_settings() -> None:
    args = parsed()
    assert RestartSettings() == RestartSettings(
        **{one.name: getattr(args, one.name) for one in fields(RestartSettings)}
    )
    assert parse_restart_settings(args) == {}


def test_each_option_is_a_setting() -> None:
    line = (
        *("--restart-backoff=1", "--restart-backoff-max=60", "--healthy-window=3600", "--restart-rate=5/3600"),
        *("--fatal-exit-codes=2,10-12,SIGSEGV", "--fatal-causes=watchdog", "--min-uptime=30", "--progress-file=*.pt"),
        *("--restarts-without-progress=3", "--on-node-failure=wait", "--early-exit-timeout=300"),
    )
    settings = RestartSettings(1, 60, 3600, "5/3600", "2,10-12,SIGSEGV", "watchdog", 30, 3, "*.pt", "wait", 300)
    assert parse_restart_settings(parsed(*line)) == {"restart_settings": settings}


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--restart-rate=5", "give RESTARTS/SECONDS, e.g. 5/3600"),
        ("--fatal-exit-codes=SIGFOO", '"SIGFOO" is not an exit code from 1 to 255, a range such as 3-5, or a signal'),
        ("--min-uptime=-1", "give seconds from 0 to one year"),
        ("--restart-policy=module", "is not of the form MODULE:NAME"),
        (
            "--restart-policy=no_such_module:Policy",
            "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("--restart-policy=my_policy:number", "has no method decide()"),
        ("--restart-policy=my_policy:other", "cannot be loaded: AttributeError"),
    ],
)
def test_a_bad_value_is_a_usage_error(option: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policy.py").write_text(POLICY)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError) as raised:
        parse_restart_settings(parsed(option))
    assert option.partition("=")[0] in str(raised.value)
    assert text in str(raised.value)


@pytest.mark.parametrize("name", ["Policy", "policy"])
def test_a_policy_of_a_program(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policy.py").write_text(POLICY)
    monkeypatch.syspath_prepend(tmp_path)
    policy = parse_restart_settings(parsed(f"--restart-policy=my_policy:{name}"))["restart_policy"]
    assert type(policy).__name__ == "Policy"


def test_the_command_line_has_the_defaults_of_the_settings() -> None:
    """The settings are not imported for them: ``--help`` loads no native module."""
    settings = asdict(RestartSettings())
    options = vars(parsed())
    assert settings == _RESTART_DEFAULTS
    assert {name: options[name] for name in settings} == settings
