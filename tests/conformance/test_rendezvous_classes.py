"""What handlers are made from and return, the registry, and the parsing of endpoints."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.conformance import stubs

if TYPE_CHECKING:
    from tests.conformance.implementations import Implementation


def parameters(impl: Implementation, *, backend: str = "stub", **config: Any) -> Any:
    return impl.rendezvous.RendezvousParameters(backend, "host:1", "run", 1, 2, **config)


class TestParameters:
    def test_values(self, impl: Implementation) -> None:
        params = parameters(impl, local_addr="here", timeout=3)
        assert (params.backend, params.endpoint, params.run_id, params.min_nodes, params.max_nodes) == (
            *("stub", "host:1", "run"),
            *(1, 2),
        )
        assert (params.local_addr, params.config) == ("here", {"timeout": 3})
        assert parameters(impl).local_addr is None

    @pytest.mark.parametrize(
        ("backend", "least", "most", "message"),
        [
            ("", 1, 1, "The rendezvous backend name must be a non-empty string."),
            (None, 1, 1, "The rendezvous backend name must be a non-empty string."),
            ("b", 0, 1, r"The minimum number of rendezvous nodes \(0\) must be greater than zero."),
            ("b", 3, 2, r"The maximum number of rendezvous nodes \(2\) must be greater than or equal to the minimum"),
        ],
    )
    def test_invalid_parameters(self, impl: Implementation, backend: Any, least: int, most: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            impl.rendezvous.RendezvousParameters(backend, "host:1", "run", least, most)

    def test_get(self, impl: Implementation) -> None:
        params = parameters(impl, a="x", none=None)
        assert (params.get("a"), params.get("b"), params.get("b", 5), params.get("none", 5)) == ("x", None, 5, None)

    @pytest.mark.parametrize("value", [True, 1, "1", "true", "T", "yes", "Y", "True"])
    def test_true(self, impl: Implementation, value: Any) -> None:
        assert parameters(impl, key=value).get_as_bool("key") is True

    @pytest.mark.parametrize("value", [False, 0, "0", "false", "F", "no", "N"])
    def test_false(self, impl: Implementation, value: Any) -> None:
        assert parameters(impl, key=value).get_as_bool("key", default=True) is False

    @pytest.mark.parametrize("default", [None, True, False, "yes"])
    def test_default_of_bool(self, impl: Implementation, default: Any) -> None:
        expected = True if default == "yes" else default
        assert parameters(impl).get_as_bool("key", default) is expected

    @pytest.mark.parametrize("value", ["on", "", 2, -1, 1.0, "01", [], "1 "])
    def test_no_bool(self, impl: Implementation, value: Any) -> None:
        with pytest.raises(ValueError, match="option 'key' does not represent a valid boolean value"):
            parameters(impl, key=value).get_as_bool("key")

    @pytest.mark.parametrize(("value", "expected"), [(3, 3), ("3", 3), (" -3 ", -3), (2.7, 2), (True, 1), (None, None)])
    def test_int(self, impl: Implementation, value: Any, expected: Any) -> None:
        assert parameters(impl, key=value).get_as_int("key") == expected

    def test_default_of_int(self, impl: Implementation) -> None:
        assert parameters(impl).get_as_int("key") is None
        assert parameters(impl).get_as_int("key", 5) == 5

    @pytest.mark.parametrize("value", ["x", "", "1.5"])
    def test_no_int(self, impl: Implementation, value: Any) -> None:
        with pytest.raises(ValueError, match="option 'key' does not represent a valid integer value"):
            parameters(impl, key=value).get_as_int("key")


class TestRegistry:
    def test_create(self, impl: Implementation, store: Any) -> None:
        registry = impl.rendezvous.RendezvousHandlerRegistry()
        create = mock.Mock(return_value=stubs.rendezvous(impl, store))
        registry.register("stub", create)
        params = parameters(impl)
        assert registry.create_handler(params) is create.return_value
        create.assert_called_once_with(params)

    def test_names(self, impl: Implementation) -> None:
        registry = impl.rendezvous.RendezvousHandlerRegistry()
        with pytest.raises(ValueError, match="The rendezvous backend name must be a non-empty string"):
            registry.register("", lambda _params: None)
        with pytest.raises(
            ValueError, match=r"The rendezvous backend 'stub' is not registered\. Did you forget to call"
        ):
            registry.create_handler(parameters(impl))

    def test_a_name_that_is_taken(self, impl: Implementation) -> None:
        registry = impl.rendezvous.RendezvousHandlerRegistry()
        registry.register("stub", len)
        registry.register("stub", len)
        with pytest.raises(ValueError, match=r"'stub' cannot be registered with .* as it is already registered with"):
            registry.register("stub", max)

    def test_a_handler_of_another_backend(self, impl: Implementation, store: Any) -> None:
        registry = impl.rendezvous.RendezvousHandlerRegistry()
        registry.register("other", lambda _params: stubs.rendezvous(impl, store))
        with pytest.raises(RuntimeError, match="backend 'stub' does not match the requested backend 'other'"):
            registry.create_handler(parameters(impl, backend="other"))

    def test_the_registry_of_launchers(self, impl: Implementation, store: Any) -> None:
        registry = impl.rendezvous.rendezvous_handler_registry
        assert {"c10d", "static", "etcd", "etcd-v2"} <= set(registry._registry)
        handler = stubs.rendezvous(impl, store)
        registry.register("stub", lambda _params: handler)
        try:
            assert impl("rendezvous.registry").get_rendezvous_handler(parameters(impl)) is handler
        finally:
            del registry._registry["stub"]

    def test_an_unknown_backend(self, impl: Implementation) -> None:
        with pytest.raises(ValueError, match="The rendezvous backend 'stub' is not registered"):
            impl("rendezvous.registry").get_rendezvous_handler(parameters(impl))

    def test_a_job_on_one_node(self, impl: Implementation) -> None:
        params = impl.rendezvous.RendezvousParameters("c10d", "localhost:0", "run", 1, 1)
        handler = impl("rendezvous.registry").get_rendezvous_handler(params)
        assert (handler.get_backend(), handler.get_run_id(), handler.use_agent_store) == ("c10d", "run", True)
        info = handler.next_rendezvous()
        assert (info.rank, info.world_size) == (0, 1)
        assert info.bootstrap_store_info.master_port > 0
        info.store.set("key", "value")
        assert info.store.get("key") == b"value"
        assert (handler.is_closed(), handler.num_nodes_waiting()) == (False, 0)
        assert handler.shutdown() is True
        assert handler.is_closed()
        with pytest.raises(impl.rendezvous.RendezvousClosedError):
            handler.next_rendezvous()


class TestHandler:
    def test_a_plug_in(self, impl: Implementation) -> None:
        with pytest.raises(TypeError, match="abstract"):
            impl.rendezvous.RendezvousHandler()
        assert impl.rendezvous.RendezvousHandler.use_agent_store.fget(None) is False

    def test_outcome_of_a_round(self, impl: Implementation, store: Any) -> None:
        where = impl.rendezvous.RendezvousStoreInfo("host", 1)
        info = impl.rendezvous.RendezvousInfo(store, 1, 2, where)
        assert (info.store, info.rank, info.world_size, info.bootstrap_store_info) == (store, 1, 2, where)
        with pytest.raises(AttributeError):
            info.rank = 3


class TestStoreInfo:
    def test_agreement(self, impl: Implementation, store: Any) -> None:
        build = impl.rendezvous.RendezvousStoreInfo.build
        addresses = [("zero", 1234), ("one", None), (None, None)]
        agreed = stubs.call_in_threads(
            partial(build, rank, store, *address) for rank, address in reversed(list(enumerate(addresses)))
        )
        assert [(info.master_addr, info.master_port) for info in agreed] == [("zero", 1234)] * 3
        assert (store.get("MASTER_ADDR"), store.get("MASTER_PORT")) == (b"zero", b"1234")

    def test_what_is_made_up(self, impl: Implementation, store: Any) -> None:
        info = impl.rendezvous.RendezvousStoreInfo.build(0, store, None)
        assert info.master_addr == socket.getfqdn()
        assert 0 < info.master_port < 65536

    def test_by_value(self, impl: Implementation) -> None:
        make = impl.rendezvous.RendezvousStoreInfo
        assert make("a", 1) == make(master_addr="a", master_port=1) != make("a", 2)
        assert (make.MASTER_ADDR_KEY, make.MASTER_PORT_KEY) == ("MASTER_ADDR", "MASTER_PORT")


class TestErrors:
    def test_family(self, impl: Implementation) -> None:
        api = impl.rendezvous
        names = ["Closed", "Connection", "GracefulExit", "State", "Timeout"]
        kinds = [getattr(api, f"Rendezvous{name}Error") for name in names]
        assert all(issubclass(kind, api.RendezvousError) for kind in kinds)
        error = api.RendezvousTimeoutError("too late", 5)
        assert (str(error), error.args) == ("('too late', 5)", ("too late", 5))
        assert isinstance(error, Exception)


class TestEndpoints:
    @pytest.mark.parametrize(
        ("endpoint", "expected"),
        [
            (None, ("localhost", 29400)),
            ("", ("localhost", 29400)),
            ("  ", ("localhost", 29400)),
            ("host", ("host", 29400)),
            ("host:1", ("host", 1)),
            (" host.example:65535 ", ("host.example", 65535)),
            ("10.0.0.1:0", ("10.0.0.1", 0)),
            ("[::1]", ("::1", 29400)),
            ("[::1]:80", ("::1", 80)),
            ("[fe80::1]:00080", ("fe80::1", 80)),
            ("a_b-c.d:1", ("a_b-c.d", 1)),
        ],
    )
    def test_parsing(self, impl: Implementation, endpoint: Any, expected: tuple[str, int]) -> None:
        assert impl("rendezvous.utils").parse_rendezvous_endpoint(endpoint, 29400) == expected

    @pytest.mark.parametrize("endpoint", ["host:", "host:x", "host:65536", "host:-1", "host:123456", "[::1]:", "::x"])
    def test_ports(self, impl: Implementation, endpoint: str) -> None:
        with pytest.raises(ValueError, match=r"The port number of the rendezvous endpoint '.*' must be an integer"):
            impl("rendezvous.utils").parse_rendezvous_endpoint(endpoint, 29400)

    @pytest.mark.parametrize("endpoint", [":1", "[]:1", "a b:1", "~", "[:1", "h/x:1"])
    def test_hosts(self, impl: Implementation, endpoint: str) -> None:
        with pytest.raises(ValueError, match=r"The hostname of the rendezvous endpoint '.*' must be a dot-separated"):
            impl("rendezvous.utils").parse_rendezvous_endpoint(endpoint, 29400)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", {}),
            ("  ", {}),
            ("a=1", {"a": "1"}),
            ("a=1,b=x y", {"a": "1", "b": "x y"}),
            (" a = 1 , b = 2 ", {"a": "1", "b": "2"}),
            ("a=1=2", {"a": "1=2"}),
            ("a=1,a=2", {"a": "2"}),
        ],
    )
    def test_options(self, impl: Implementation, text: str, expected: dict[str, str]) -> None:
        assert impl("rendezvous.utils")._parse_rendezvous_config(text) == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("=1", "must be in format"),
            ("a=1,,b=2", "must be in format"),
            (",", "must be in format"),
            ("a", "option 'a' must have a value specified"),
            ("a=", "option 'a' must have a value specified"),
            ("a=1,b= ", "option 'b' must have a value specified"),
        ],
    )
    def test_no_options(self, impl: Implementation, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            impl("rendezvous.utils")._parse_rendezvous_config(text)

    @pytest.mark.parametrize(
        ("host", "expected"),
        [
            ("localhost", True),
            ("127.0.0.1", True),
            ("::1", True),
            (socket.gethostname(), True),
            ("192.0.2.1", False),
            ("no-such-host.invalid", False),
        ],
    )
    def test_this_machine(self, impl: Implementation, host: str, expected: bool) -> None:
        assert impl("rendezvous.utils")._matches_machine_hostname(host) is expected

    @pytest.mark.parametrize(
        ("text", "expected"), [("1", 1), ("99999", 99999), ("", None), ("a", None), ("123456", None)]
    )
    def test_port_numbers(self, impl: Implementation, text: str, expected: Any) -> None:
        assert impl("rendezvous.utils")._try_parse_port(text) == expected
