from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from contextlib import closing
from unittest import mock

import pytest

import ferroelastic
from ferroelastic import _torch
from ferroelastic.utils import get_env_variable_or_raise, get_socket_with_port, macros
from ferroelastic.utils.distributed import get_free_port
from ferroelastic.utils.logging import _derive_module_name, get_logger
from ferroelastic.utils.process_state import is_uninterruptible_state, read_proc_state


def test_an_environment_variable_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRO_TEST", "value")
    assert get_env_variable_or_raise("FERRO_TEST") == "value"
    monkeypatch.delenv("FERRO_TEST")
    with pytest.raises(ValueError, match="FERRO_TEST expected"):
        get_env_variable_or_raise("FERRO_TEST")


def test_a_socket_has_its_port() -> None:
    with closing(get_socket_with_port()) as listener:
        assert listener.getsockname()[1] > 0
    assert get_free_port() > 0


@pytest.mark.parametrize(("is_older", "host"), [(True, "localhost"), (False, "0.0.0.0")])
def test_an_address_family_that_the_kernel_has_not_is_passed_over(is_older: bool, host: str) -> None:
    addresses = [
        (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0)),
    ]
    usable = mock.Mock()
    with (
        mock.patch.object(_torch, "is_older_than", return_value=is_older),
        mock.patch("socket.getaddrinfo", return_value=addresses),
        mock.patch("socket.socket", side_effect=[OSError("unsupported"), usable]),
    ):
        assert get_socket_with_port() is usable
    usable.bind.assert_called_once_with((host, 0))
    assert usable.listen.called == is_older


def test_an_address_that_cannot_be_bound_leaves_no_socket() -> None:
    refused, usable = mock.Mock(), mock.Mock()
    refused.bind.side_effect = OSError("no IPv6 addresses")
    with (
        mock.patch.object(_torch, "is_older_than", return_value=False),
        mock.patch("socket.socket", side_effect=[refused, usable]),
    ):
        assert get_socket_with_port() is usable
    refused.close.assert_called_once_with()


@pytest.mark.parametrize("is_older", [True, False])
def test_without_any_address_there_is_no_socket(is_older: bool) -> None:
    with (
        mock.patch.object(_torch, "is_older_than", return_value=is_older),
        mock.patch("socket.getaddrinfo", return_value=[]),
        mock.patch("socket.socket", side_effect=OSError("unsupported")),
        pytest.raises(RuntimeError, match="Failed to create"),
    ):
        get_socket_with_port()


def test_macros_are_substituted_in_strings() -> None:
    assert macros.substitute(["--rank=${local_rank}", "$other", 3], "7") == ["--rank=7", "$other", 3]
    assert macros.local_rank == "${local_rank}"


def test_a_logger_is_named_after_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGLEVEL", raising=False)
    assert get_logger().name == __name__
    assert _derive_module_name(depth=1) == __name__
    assert _derive_module_name(depth=1000) is None
    assert get_logger("ferro.test").level == logging.WARNING
    monkeypatch.setenv("LOGLEVEL", "DEBUG")
    assert get_logger("ferro.test").level == logging.DEBUG


def test_the_state_of_a_process_is_read() -> None:
    assert read_proc_state(os.getpid()) == "R"
    assert read_proc_state(2**22 + 1) is None


@pytest.mark.parametrize(("stat", "state"), [(b"7 (a) b) D 1", "D"), (b"7 (a", None), (b"7 (a)", None), (b"", None)])
def test_the_state_follows_the_last_parenthesis(stat: bytes, state: str | None) -> None:
    with mock.patch("builtins.open", mock.mock_open(read_data=stat)):
        assert read_proc_state(7) == state


@pytest.mark.parametrize(("state", "expected"), [("D", True), ("D+", True), ("S", False), (None, False)])
def test_uninterruptible_is_d(state: str | None, expected: bool) -> None:
    assert is_uninterruptible_state(state) == expected


def test_other_systems_are_sent_to_torchrun() -> None:
    program = "import sys; sys.platform = 'darwin'; import ferroelastic"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: ferroelastic supports Linux only and cannot run on 'darwin': use torchrun" in done.stderr


def test_free_threaded_builds_are_refused() -> None:
    program = "import sys; sys.abiflags = 't'; import ferroelastic"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert done.returncode == 1
    assert f"ImportError: ferroelastic cannot run on the free-threaded build of CPython {version}, which" in done.stderr
    assert done.stderr.endswith("use the build with the GIL, or torchrun\n")


def test_the_version_is_that_of_the_distribution() -> None:
    with mock.patch("importlib.metadata.version", return_value="1.2.3") as version:
        assert ferroelastic.__version__ == "1.2.3"
    version.assert_called_once_with("ferroelastic")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ferroelastic.nothing  # type: ignore[attr-defined]
