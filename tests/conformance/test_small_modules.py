"""``utils``, ``control_plane``, ``argparse_util``, ``numa`` and the health check server."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.implementations import Implementation


# ---- utils.store


class TestStore:
    def test_synchronize(self, impl: Implementation, store: Any) -> None:
        module = impl("utils.store")
        calls = [partial(module.synchronize, store, f"of {n}".encode(), n, 3, "key/", 60) for n in range(3)]
        assert [list(data) for data in stubs.call_in_threads(calls)] == [[b"of 0", b"of 1", b"of 2"]] * 3

    def test_get_all(self, impl: Implementation, store: Any) -> None:
        for rank in range(2):
            store.set(f"data{rank}", f"value {rank}")
        calls = [partial(impl("utils.store").get_all, store, rank, "data", 2) for rank in range(2)]
        assert [list(data) for data in stubs.call_in_threads(calls)] == [[b"value 0", b"value 1"]] * 2

    def test_barrier(self, impl: Implementation, store: Any) -> None:
        calls = [partial(impl("utils.store").barrier, store, 3, "key", 60)] * 3
        assert stubs.call_in_threads(calls) == [None] * 3
        assert store.add("key/num_members", 0) == 3

    def test_a_barrier_that_times_out(self, impl: Implementation, store: Any) -> None:
        module = impl("utils.store")
        with pytest.raises(module.DistStoreError):
            module.barrier(store, 2, "key", barrier_timeout=0.01)
        assert issubclass(module.DistStoreError, RuntimeError)

    def test_missing_ranks(self, impl: Implementation, store: Any) -> None:
        import torch.distributed

        message = (
            r"Timed out waiting on barrier on rank 0, for key prefix: key "
            r"\(world_size=3, missing_ranks=\[(<1>, <2>|<2>, <1>)\], timeout=0.01\)"
        )
        barrier = impl("utils.store").barrier
        with pytest.raises(torch.distributed.DistStoreError, match=message):
            barrier(store, 3, "key", 0.01, rank=0, rank_tracing_decoder="<{}>".format, trace_timeout=0.01)

    def test_missing_ranks_asked_by_another_rank(self, impl: Implementation, store: Any) -> None:
        import torch.distributed

        store.set("key/TRACING_GATE", "")
        message = r"missing_ranks=\[\[<check rank 0 \(0\) for missing rank info>\]\]"
        with pytest.raises(torch.distributed.DistStoreError, match=message):
            impl("utils.store").barrier(store, 3, "key", 0.01, rank=1, trace_timeout=0.01)

    def test_tracing_takes_a_rank(self, impl: Implementation, store: Any) -> None:
        with pytest.raises(AssertionError, match="Tracing requires rank information"):
            impl("utils.store").barrier(store, 1, "key", rank_tracing_decoder=str)

    def test_store_timeout(self, impl: Implementation, store: Any) -> None:
        store.set_timeout(timedelta(seconds=44))
        with impl("utils.store").store_timeout(store, 2.5):
            assert store.timeout == timedelta(seconds=2.5)
        assert store.timeout == timedelta(seconds=44)

    def test_store_timeout_and_an_exception(self, impl: Implementation, store: Any) -> None:
        store.set_timeout(timedelta(seconds=44))
        with pytest.raises(KeyError), impl("utils.store").store_timeout(store, 2):
            raise KeyError
        left = impl.expect("timeout-comes-back", torch=2, ours=44)
        assert store.timeout == timedelta(seconds=left)


# ---- the other utils


class TestUtils:
    def test_variables(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MY_VARIABLE", "")
        module = impl("utils")
        assert module.get_env_variable_or_raise("MY_VARIABLE") == ""
        with pytest.raises(ValueError, match="Environment variable NO_VARIABLE expected, but not set"):
            module.get_env_variable_or_raise("NO_VARIABLE")

    @pytest.mark.parametrize("path", ["utils", "utils.api", "utils.distributed"])
    def test_a_port(self, impl: Implementation, path: str) -> None:
        with closing(impl(path).get_socket_with_port()) as reserved:
            host, port = reserved.getsockname()[:2]
            assert port > 0
            is_for_all = host in {"::", "0.0.0.0"}
            listens = bool(reserved.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            assert (is_for_all, listens) == impl.by_version(
                "ports-on-all-addresses", before=(False, True), since=(True, False)
            )

    @pytest.mark.needs("ports-on-all-addresses")
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
    def test_a_reserved_port_is_taken_on_all_addresses(self, impl: Implementation, host: str) -> None:
        with closing(impl("utils").get_socket_with_port()) as reserved:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with closing(socket.socket(family)) as other, pytest.raises(OSError, match=r"Address|address"):
                other.bind((host, reserved.getsockname()[1]))

    def test_a_free_port(self, impl: Implementation) -> None:
        port = impl("utils.distributed").get_free_port()
        with closing(socket.socket()) as listener:
            listener.bind(("localhost", port))

    def test_macros(self, impl: Implementation) -> None:
        macros = impl("utils").macros
        assert macros.local_rank == "${local_rank}"
        args = ["${local_rank}", "--rank=$local_rank", "${other} $$", 5, None, macros]
        assert macros.substitute(args, "3") == ["3", "--rank=3", "${other} $", 5, None, macros]

    def test_loggers(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        get_logger = impl("utils.logging").get_logger
        logger = get_logger("my.logger")
        assert logger is logging.getLogger("my.logger")
        assert logger.level == logging.WARNING
        assert get_logger().name == __name__
        monkeypatch.setenv("LOGLEVEL", "DEBUG")
        assert get_logger("my.logger").level == logging.DEBUG
        monkeypatch.setenv("LOGLEVEL", "info")

        def level() -> int | None:
            try:
                return int(get_logger("my.logger").level)
            except ValueError:
                return None

        assert level() == impl.expect("log-level", torch=None, ours=logging.INFO)
        monkeypatch.setenv("LOGLEVEL", "loud")
        with pytest.raises(ValueError, match=r"(?i)loud"):
            get_logger("my.logger")
        assert impl("utils.log_level").get_log_level() == "WARNING"

    @pytest.mark.needs("uninterruptible-state")
    def test_state_of_a_process(self, impl: Implementation) -> None:
        module = impl("utils.process_state")
        assert module.read_proc_state(os.getpid()) in {"R", "S"}
        assert module.read_proc_state(2**22 + 1) is None

    @pytest.mark.needs("uninterruptible-state")
    @pytest.mark.parametrize(
        ("state", "expected"), [("D", True), ("D+", True), ("S", False), ("", False), (None, False)]
    )
    def test_uninterruptible(self, impl: Implementation, state: Any, expected: bool) -> None:
        assert impl("utils.process_state").is_uninterruptible_state(state) is expected


# ---- control_plane


class TestControlPlane:
    def test_as_decorator(self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = impl("control_plane")
        monkeypatch.setenv(module.TORCH_WORKER_SERVER_SOCKET, str(tmp_path / "socket"))

        @module.worker_main()  # type: ignore[untyped-decorator]  # whichever implementation it is
        def main() -> None:
            with closing(socket.socket(socket.AF_UNIX)) as client:
                client.connect(str(tmp_path / "socket"))
                client.sendall(b"POST /handler/ping HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
                answer = b""
                while chunk := client.recv(4096):
                    answer += chunk
            assert answer.startswith(b"HTTP/1.0 200") or b" 200 " in answer.splitlines()[0]

        main()

    def test_without_a_socket(self, impl: Implementation) -> None:
        with impl("control_plane").worker_main():
            pass

    def test_an_exception(self, impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        with pytest.raises(ValueError, match="boom"), impl("control_plane").worker_main():
            raise ValueError("boom")
        is_recorded = (tmp_path / "error.json").exists()
        assert is_recorded == impl.expect("worker-main-records", torch=False, ours=True)
        if is_recorded:
            assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "ValueError: boom"


# ---- argparse_util


class TestArguments:
    def parse(self, impl: Implementation, *args: str, **options: Any) -> Any:
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("-f", "--foo", action=impl("argparse_util").env, **options)
        return parser.parse_args(args).foo

    def parse_flag(self, impl: Implementation, *args: str, **options: Any) -> Any:
        parser = argparse.ArgumentParser()
        parser.add_argument("--verbose", action=impl("argparse_util").check_env, **options)
        return parser.parse_args(args).verbose

    def test_default(self, impl: Implementation) -> None:
        assert self.parse(impl) is None
        assert self.parse(impl, default="bar") == "bar"
        assert self.parse(impl, "--foo", "x", default="bar") == "x"
        assert self.parse(impl, "-f", "3", type=int) == 3

    def test_variable(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PET_FOO", "7")
        assert self.parse(impl, default="bar") == "7"
        assert self.parse(impl, type=int) == 7
        assert self.parse(impl, "--foo", "x") == "x"
        assert self.parse(impl, required=True) == "7"

    def test_required(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises((SystemExit, argparse.ArgumentError)):
            self.parse(impl, required=True)
        assert self.parse(impl, required=True, default="bar") == "bar"
        monkeypatch.setenv("PET_FOO", "")
        with pytest.raises((SystemExit, argparse.ArgumentError)):
            self.parse(impl, required=True)

    @pytest.mark.parametrize(("variable", "expected"), [(None, False), ("1", True), ("0", False), ("5", True)])
    def test_flag(
        self, impl: Implementation, monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: bool
    ) -> None:
        if variable is not None:
            monkeypatch.setenv("PET_VERBOSE", variable)
        assert self.parse_flag(impl) is expected
        assert self.parse_flag(impl, "--verbose") is True

    def test_flag_that_is_on(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.parse_flag(impl, default=True) is True
        monkeypatch.setenv("PET_VERBOSE", "0")
        assert self.parse_flag(impl, default=True) is False

    def test_flag_that_is_no_number(self, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PET_VERBOSE", "yes")
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is looked at below
            self.parse_flag(impl)
        assert ("PET_VERBOSE" in str(raised.value)) == impl.expect("named-values", torch=False, ours=True)


# ---- numa


@pytest.mark.needs("numa")
class TestNuma:
    def test_options(self, impl: Implementation) -> None:
        module = impl("numa.binding")
        options = module.NumaOptions(module.AffinityMode.NODE)
        assert options.should_fall_back_if_binding_fails is False
        assert options == module.NumaOptions(affinity_mode=module.AffinityMode("node"))
        with pytest.raises(AttributeError):
            options.affinity_mode = module.AffinityMode.SOCKET
        assert len({options, module.NumaOptions(module.AffinityMode.NODE)}) == 1

    def test_modes(self, impl: Implementation) -> None:
        modes = impl("numa.binding").AffinityMode
        assert [mode.value for mode in modes] == ["node", "socket", "exclusive", "core-complex"]
        assert modes.CORE_COMPLEX == "core-complex"


# ---- agent.server.health_check_server


class TestHealthCheckServer:
    @pytest.mark.needs("alive-callback")
    def test_what_it_is_told(self, impl: Implementation) -> None:
        module = impl("agent.server.health_check_server")
        server = module.create_healthcheck_server(alive_callback=int, port=1234, timeout=60)
        assert type(server) is module.HealthCheckServer
        assert (server._alive_callback, server._port, server._timeout) == (int, 1234, 60)
        assert server.alive_callback is int

    def test_what_it_serves(self, impl: Implementation, caplog: pytest.LogCaptureFixture) -> None:
        server = impl("agent.server.health_check_server").HealthCheckServer(int, 0, 60)
        server.start()
        warned = "No health check server started" in caplog.text
        listens = getattr(server, "board", None) is not None
        assert (warned, listens) == impl.expect("health-server-serves", torch=(True, False), ours=(False, True))
        server.stop()

    def test_a_deployments_own(self, impl: Implementation) -> None:
        calls: list[str] = []

        class Own(impl("agent.server.health_check_server").HealthCheckServer):  # type: ignore[misc]
            def start(self) -> None:
                calls.append(f"start {self._port} {self._timeout} {self._alive_callback()}")

            def stop(self) -> None:
                calls.append("stop")

        server = Own(lambda: 7, 1234, 60)
        server.start()
        server.stop()
        assert calls == ["start 1234 60 7", "stop"]
