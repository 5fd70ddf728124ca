from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.support.memory_store import MemoryStore
from tests.support.rendezvous_handlers import QuietHandler

from ferroelastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousHandlerRegistry,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    _torch_handlers,
    _worker_store,
    rendezvous_handler_registry,
)
from ferroelastic.rendezvous._worker_store import RenewedRendezvousInfo
from ferroelastic.rendezvous.registry import get_rendezvous_handler
from ferroelastic.rendezvous.utils import (
    _is_local_address,
    _matches_machine_hostname,
    _parse_rendezvous_config,
    _try_parse_port,
    parse_rendezvous_endpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def parameters(backend: str = "memory", **config: Any) -> RendezvousParameters:
    return RendezvousParameters(backend, "host:1", "run", 1, 2, **config)


class Handler(QuietHandler):
    """Gives one store at one address to all nodes, round after round, as a careless plug-in would."""

    def __init__(self, store: MemoryStore, rank: int = 0, world_size: int = 1, *, address: str = "localhost") -> None:
        self.info = RendezvousInfo(store, rank, world_size, RendezvousStoreInfo(address, 29500))
        self.uses_agent_store = True

    @property
    def use_agent_store(self) -> bool:
        return self.uses_agent_store

    def get_backend(self) -> str:
        return "memory"

    def next_rendezvous(self) -> RendezvousInfo:
        return self.info


class TestParameters:
    def test_values_are_kept(self) -> None:
        params = parameters(local_addr="here", rank=3)
        assert (params.backend, params.endpoint, params.run_id) == ("memory", "host:1", "run")
        assert (params.min_nodes, params.max_nodes, params.local_addr) == (1, 2, "here")
        assert params.get("rank") == 3
        assert params.get("nothing") is None
        assert params.get("nothing", 5) == 5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("", "", "run", 1, 1), "backend name must be a non-empty string"),
            (("c10d", "", "run", 0, 1), r"minimum number of rendezvous nodes \(0\) must be greater than zero"),
            (("c10d", "", "run", 3, 2), r"maximum number .* \(2\) must be greater than or equal to .* \(3\)"),
        ],
    )
    def test_senseless_values_are_errors(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RendezvousParameters(*arguments)

    @pytest.mark.parametrize("value", ["1", "True", "tRue", "T", "t", "yEs", "Y", 1, True])
    def test_true(self, value: object) -> None:
        assert parameters(flag=value).get_as_bool("flag") is True

    @pytest.mark.parametrize("value", ["0", "False", "faLse", "F", "f", "nO", "N", 0, False])
    def test_false(self, value: object) -> None:
        assert parameters(flag=value).get_as_bool("flag") is False

    @pytest.mark.parametrize("value", ["01", "Flse", "Ture", "g", "4", "_", "", 2, -1, 1.5])
    def test_neither_true_nor_false(self, value: object) -> None:
        with pytest.raises(ValueError, match="'flag' does not represent a valid boolean value"):
            parameters(flag=value).get_as_bool("flag")

    def test_defaults_of_typed_access(self) -> None:
        assert parameters().get_as_bool("flag") is None
        assert parameters().get_as_bool("flag", default=True) is True
        assert parameters().get_as_int("number") is None
        assert parameters().get_as_int("number", 3) == 3

    @pytest.mark.parametrize(("value", "expected"), [(0, 0), ("0", 0), (3, 3), ("-3", -3), (" 3 ", 3)])
    def test_numbers(self, value: object, expected: int) -> None:
        assert parameters(number=value).get_as_int("number") == expected

    @pytest.mark.parametrize("value", ["a", "0a", "3b", "abc"])
    def test_no_numbers(self, value: str) -> None:
        with pytest.raises(ValueError, match="'number' does not represent a valid integer value"):
            parameters(number=value).get_as_int("number")


class TestRegistry:
    def test_makes_the_handler(self) -> None:
        registry = RendezvousHandlerRegistry()
        handler = Handler(MemoryStore())
        creator = mock.Mock(return_value=handler)
        registry.register("memory", creator)
        registry.register("memory", creator)
        params = parameters()
        assert registry.create_handler(params) is handler
        creator.assert_called_once_with(params)

    def test_a_name_is_taken_once(self) -> None:
        registry = RendezvousHandlerRegistry()
        registry.register("memory", lambda _: Handler(MemoryStore()))
        with pytest.raises(ValueError, match=r"'memory' cannot be registered with .* already registered with"):
            registry.register("memory", lambda _: Handler(MemoryStore()))
        with pytest.raises(ValueError, match="non-empty string"):
            registry.register("", lambda _: Handler(MemoryStore()))

    def test_an_unknown_backend_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"'memory' is not registered. Did you forget to call `register`?"):
            RendezvousHandlerRegistry().create_handler(parameters())

    def test_a_handler_has_the_name_it_was_asked_for_by(self) -> None:
        registry = RendezvousHandlerRegistry()
        registry.register("other", lambda _: Handler(MemoryStore()))
        with pytest.raises(RuntimeError, match="'memory' does not match the requested backend 'other'"):
            registry.create_handler(parameters("other"))

    def test_a_backend_registered_here_gets_our_parameters(self) -> None:
        creator = mock.Mock(return_value=Handler(MemoryStore()))
        with mock.patch.dict(rendezvous_handler_registry._registry, memory=creator):
            params = parameters()
            assert isinstance(get_rendezvous_handler(params), Handler)
        creator.assert_called_once_with(params)

    @pytest.mark.parametrize("backend", ["etcd", "etcd-v2", "somebody's plug-in"])
    def test_other_backends_are_torchs(self, backend: str) -> None:
        handler = mock.Mock(get_backend=lambda: backend)
        with mock.patch("ferroelastic.rendezvous._torch_handlers.create_handler", return_value=handler) as create:
            params = parameters(backend)
            assert get_rendezvous_handler(params) is handler
        create.assert_called_once_with(params)

    def test_the_missing_torch_is_reported(self) -> None:
        with (
            mock.patch.dict(sys.modules, {"torch": None, "torch.distributed.elastic.rendezvous": None}),
            mock.patch("importlib.import_module", side_effect=ModuleNotFoundError("no torch", name="torch")),
            pytest.raises(ModuleNotFoundError, match="rendezvous backend 'etcd' needs torch, which is not installed"),
        ):
            get_rendezvous_handler(parameters("etcd"))


class TestStoreInfo:
    def test_rank_0_publishes_for_all(self) -> None:
        store = MemoryStore()
        infos = in_threads(3, lambda rank: RendezvousStoreInfo.build(rank, store.clone(), "host", 1234))
        assert infos == [RendezvousStoreInfo("host", 1234)] * 3

    def test_defaults_are_the_host_name_and_a_free_port(self) -> None:
        with mock.patch("ferroelastic.rendezvous.api.fq_hostname", return_value="host.domain"):
            info = RendezvousStoreInfo.build(0, MemoryStore(), None)
        assert info.master_addr == "host.domain"
        assert info.master_port > 0


def test_errors_have_a_common_base() -> None:
    assert issubclass(RendezvousClosedError, RendezvousError)
    assert issubclass(RendezvousTimeoutError, RendezvousError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("   ", {}),
        (
            " b= dummy2  ,c=dummy3=dummy4,  a =dummy1,d=dummy5/dummy6",
            {"a": "dummy1", "b": "dummy2", "c": "dummy3=dummy4", "d": "dummy5/dummy6"},
        ),
    ],
)
def test_a_configuration_is_parsed(text: str, expected: dict[str, str]) -> None:
    assert _parse_rendezvous_config(text) == expected


@pytest.mark.parametrize("text", ["a=1,", "a=1,,c=2", "a=1,   ,c=2", "a=1,=  ,c=2", "a=1,  =,c=2", " ,  "])
def test_an_option_has_a_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be in format <key1>=<value1>,...,<keyN>=<valueN>"):
        _parse_rendezvous_config(text)


@pytest.mark.parametrize("text", ["b=1,a,c=2", "b=1,c=2,a", "b=1,a=,c=2", "  a "])
def test_an_option_has_a_value(text: str) -> None:
    with pytest.raises(ValueError, match="option 'a' must have a value specified"):
        _parse_rendezvous_config(text)


@pytest.mark.parametrize(("text", "port"), [("123", 123), ("", None), (" 1", None), ("1\n", None), ("abc", None)])
def test_a_port_is_digits(text: str, port: int | None) -> None:
    assert _try_parse_port(text) == port


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (None, ("localhost", 7)),
        ("  ", ("localhost", 7)),
        ("dummy.com", ("dummy.com", 7)),
        ("dummy-1.com:0", ("dummy-1.com", 0)),
        ("123.123.123.123:65535", ("123.123.123.123", 65535)),
        ("[2001:db8::1]", ("2001:db8::1", 7)),
        ("[2001:db8::1]:123", ("2001:db8::1", 123)),
        (" host_1:80 ", ("host_1", 80)),
    ],
)
def test_an_endpoint_is_parsed(endpoint: str | None, expected: tuple[str, int]) -> None:
    assert parse_rendezvous_endpoint(endpoint, default_port=7) == expected


@pytest.mark.parametrize("endpoint", ["~", "dummy.com :123", "~:123", ":123", "[]", "host\n"])
def test_an_endpoint_has_a_host(endpoint: str) -> None:
    if endpoint == "host\n":
        assert parse_rendezvous_endpoint(endpoint, 1) == ("host", 1)
        return
    with pytest.raises(ValueError, match="must be a dot-separated list of labels, an IPv4 address, or an IPv6"):
        parse_rendezvous_endpoint(endpoint, 1)


@pytest.mark.parametrize("port", ["", "abc", "-123", "-", "65536", "70000", "999999"])
def test_an_endpoints_port_is_in_range(port: str) -> None:
    with pytest.raises(ValueError, match="must be an integer between 0 and 65536"):
        parse_rendezvous_endpoint(f"dummy.com:{port}", 1)


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.0.0.5", "::1", "0000:0000:0000:0000:0000:0000:0000:0001"]
)
def test_loopback_is_this_machine(host: str) -> None:
    assert _matches_machine_hostname(host)


def test_its_names_and_addresses_are_this_machine() -> None:
    assert _matches_machine_hostname(socket.gethostname())
    for *_, address in socket.getaddrinfo(socket.gethostname(), None, proto=socket.IPPROTO_TCP):
        assert _matches_machine_hostname(str(address[0]))


@pytest.mark.parametrize("host", ["0.0.0.0", "::2", "192.0.2.1", "no.such.host.invalid"])
def test_others_are_not_this_machine(host: str) -> None:
    assert not _matches_machine_hostname(host)


def test_an_own_name_that_does_not_resolve_is_no_error() -> None:
    with mock.patch("socket.gethostname", return_value="no.such.host.invalid"):
        assert not _matches_machine_hostname("192.0.2.1")
        assert _matches_machine_hostname("no.such.host.invalid")


def test_an_address_of_a_secondary_interface_is_this_machine() -> None:
    records = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("198.51.100.7", 0))]
    probe = mock.MagicMock()
    probe.return_value.__enter__.return_value.getsockname.return_value = ("198.51.100.7", 1)
    with (
        mock.patch("socket.getaddrinfo", side_effect=[[], records]),
        mock.patch("socket.socket", probe),
    ):
        assert _matches_machine_hostname("second.interface")
    assert not _is_local_address("198.51.100.7")


def in_threads(number: int, function: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(function, range(number)))


class TestWorkerStore:
    """How nodes agree on an empty store, without torch."""

    @staticmethod
    def join(handler: Any, previous: RendezvousInfo | None = None) -> RendezvousInfo:
        return _worker_store.next_rendezvous(handler, previous, local_addr="this.node")

    @staticmethod
    def address(info: RendezvousInfo) -> tuple[str, int]:
        return info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port

    @staticmethod
    def port(info: RendezvousInfo) -> int:
        """Of the store that this node hosts."""
        assert isinstance(info, RenewedRendezvousInfo)
        assert info.server is not None
        return info.server.port

    def test_a_store_of_the_workers_own_is_left_alone(self) -> None:
        handler = Handler(MemoryStore())
        handler.uses_agent_store = False
        first = self.join(handler)
        assert self.join(handler, first) is handler.info

    def test_a_handler_that_renews_its_store_is_left_alone(self) -> None:
        class Renewing(Handler):
            renews_store = True

        store = MemoryStore()
        handler = Renewing(store)
        assert self.join(handler, self.join(handler)) is handler.info
        assert store.values == {}

    def test_a_handler_forgets_its_store_and_keeps_it_until_the_round_is_complete(self) -> None:
        store = mock.Mock()
        seen = []

        class Dynamic(Handler):
            _bootstrap_store_info: Any = "former"
            _shared_tcp_store_server: Any = store

            def next_rendezvous(self) -> RendezvousInfo:
                seen.append((self._bootstrap_store_info, self._shared_tcp_store_server))
                return super().next_rendezvous()

        handler = Dynamic(MemoryStore())
        assert self.join(handler) is handler.info
        assert seen == [(None, None)]

    def test_one_node_moves_when_the_address_stays(self) -> None:
        store = MemoryStore()
        handler = Handler(store)
        store.set("torchelastic/agent/terminal_state/num_members", "1")
        first = self.join(handler)
        assert first is handler.info
        second = self.join(handler, first)
        assert isinstance(second, RenewedRendezvousInfo)
        assert self.address(second) == ("this.node", self.port(second))
        assert store.values == {}
        third = self.join(handler, second)
        assert isinstance(third, RenewedRendezvousInfo)
        assert third.server is not second.server

    def test_one_node_stays_where_the_handler_gives_a_new_address(self) -> None:
        first = self.join(Handler(MemoryStore(), address="a"))
        handler = Handler(MemoryStore(), address="b")
        assert self.join(handler, first) is handler.info

    def test_all_nodes_move_and_rank_0_hosts(self) -> None:
        store = MemoryStore()
        handlers = [Handler(store.clone(), rank, 3) for rank in range(3)]
        first = in_threads(3, lambda rank: self.join(handlers[rank]))
        assert first == [handler.info for handler in handlers]
        second = in_threads(3, lambda rank: self.join(handlers[rank], first[rank]))
        assert [self.address(info) for info in second] == [("this.node", self.port(second[0]))] * 3
        assert [info.server is not None for info in second] == [True, False, False]
        third = in_threads(3, lambda rank: self.join(handlers[rank], second[rank]))
        assert [self.address(info) for info in third] == [("this.node", self.port(third[0]))] * 3
        assert self.port(third[0]) != self.port(second[0])

    def test_all_nodes_move_also_where_one_is_new(self) -> None:
        # The newcomer, here rank 0, has no former address to compare with; the count of rounds is in the store.
        store = MemoryStore()
        first = in_threads(2, lambda rank: self.join(Handler(store.clone(), rank, 2)))
        previous = [None, first[0], first[1]]
        second = in_threads(3, lambda rank: self.join(Handler(store.clone(), rank, 3), previous[rank]))
        assert [self.address(info) for info in second] == [("this.node", self.port(second[0]))] * 3

    def test_a_node_that_does_not_come_is_named(self) -> None:
        store = MemoryStore(timeout_s=0.05)
        with pytest.raises(RendezvousTimeoutError, match=r"nodes \[1\] of 2 did not join .* within 0.05 s"):
            self.join(Handler(store, 0, 2))

    def static(self, store: MemoryStore, number: int, ranks: tuple[int, ...] = (0, 1)) -> None:
        handlers = [Handler(store.below("run"), rank, number) for rank in ranks]
        with mock.patch.object(_torch_handlers, "has_fixed_port", return_value=True):
            in_threads(len(ranks), lambda index: self.join(handlers[index]))

    def test_a_fixed_port_keeps_its_store_and_loses_the_workers_keys(self) -> None:
        store = MemoryStore()
        self.static(store, 2)
        agents = {"run/agents/own": b"1"}
        gone = {"default_pg/0": b"1", "run/torchelastic/role_info/0": b"1", "another": b"1"}
        for number in range(1, 4):
            with mock.patch.object(_worker_store, "RenewedRendezvousInfo", side_effect=AssertionError):
                store.values.update(agents | gone)
                self.static(store, 2)
            kept = {key for key in store.values if not key.startswith("run/ferroelastic/")}
            assert kept == {"run/agents/own"}
            rounds = {key.split("/")[3] for key in store.values if key.startswith("run/ferroelastic/")}
            assert rounds == {"round", str(number)}

    def test_a_replaced_agent_takes_part(self) -> None:
        # A new process of rank 1 has seen no round, and knows from the store that it is not in the first.
        store = MemoryStore()
        self.static(store, 2)
        store.set("default_pg/0", "stale")
        self.static(store, 2)
        assert "default_pg/0" not in store.values

    def test_a_rank_counts_once(self) -> None:
        store = MemoryStore(timeout_s=0.05)
        self.static(store, 2)
        for _ in range(2):
            with pytest.raises(RendezvousTimeoutError):
                self.static(store, 2, ranks=(1,))
        store.set("default_pg/0", "stale")
        with pytest.raises(RendezvousTimeoutError, match=r"nodes \[0\] of 2"):
            self.static(store, 2, ranks=(1,))
        self.static(store, 2, ranks=(0,))
        assert "default_pg/0" not in store.values

    def test_one_node_with_a_fixed_port_empties_its_store(self) -> None:
        store = MemoryStore()
        self.static(store, 1, ranks=(0,))
        store.set("default_pg/0", "stale")
        self.static(store, 1, ranks=(0,))
        assert "default_pg/0" not in store.values
