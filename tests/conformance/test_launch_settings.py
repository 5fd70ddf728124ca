"""``launcher``: ``LaunchConfig``, and the names and addresses that follow from its values."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs, workers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.implementations import Implementation


class TestLaunchConfig:
    @pytest.mark.needs("shutdown-timeout")
    def test_defaults(self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        made = impl.launcher.api.LaunchConfig(1, 2, 3)
        values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        assert isinstance(values.pop("logs_specs"), impl.mp.DefaultLogsSpecs)
        assert values.pop("signals_to_forward", "") == ""  # not in torch
        assert values.pop("interactive_rank", None) is None  # not in torch
        assert not values.pop("warm_workers", 0)  # not in torch, nor the next three
        assert values.pop("warm_imports", ("torch",)) == ("torch",)
        assert not values.pop("preload", False)
        assert values.pop("log_options", None) is None
        assert values.pop("exit_barrier_timeout", 300) == 300  # not in torch yet
        assert values.pop("grace_signal_target", "group") == "group"  # not in torch
        assert (values.pop("restart_settings", None), values.pop("restart_policy", None)) == (None, None)
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
        assert stubs.launch_config(impl, tmp_path, **fields).rdzv_configs == expected

    @pytest.mark.needs("shutdown-timeout")
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
        assert stubs.launch_config(impl, tmp_path, shutdown_timeout=explicit).shutdown_timeout == expected

    @pytest.mark.needs("filtered-files")
    def test_filters_that_are_no_list(self, impl: Implementation, tmp_path: Path) -> None:
        def is_refused() -> bool:
            try:
                stubs.launch_config(impl, tmp_path, duplicate_stdout_filters="loss")
            except TypeError:
                return True
            return False

        assert is_refused() == impl.expect("filters-are-lists", torch=False, ours=True)

    @pytest.mark.needs("shutdown-timeout")
    def test_negative_shutdown_timeout(self, impl: Implementation, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="shutdown_timeout must be non-negative, got -1"):
            stubs.launch_config(impl, tmp_path, shutdown_timeout=-1)

    @pytest.mark.needs("shutdown-timeout")
    def test_shutdown_timeout_that_is_no_number(
        self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "soon")
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is looked at below
            stubs.launch_config(impl, tmp_path)
        names_it = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in str(raised.value)
        assert names_it == impl.expect("named-values", torch=False, ours=True)

    @pytest.mark.needs("shutdown-timeout")
    def test_negative_shutdown_timeout_in_the_environment(
        self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "-1")

        def is_taken() -> bool:
            try:
                stubs.launch_config(impl, tmp_path)
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
