"""Workers of a restart find an empty store, with torch's own rendezvous handlers and stores."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.support.rendezvous_handlers import QuietHandler

from ferroelastic.agent.server import RunResult, SimpleElasticAgent, WorkerGroup, WorkerSpec, WorkerState
from ferroelastic.agent.server._exit_barrier import _own_connection
from ferroelastic.rendezvous import (
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    _torch_handlers,
    _worker_store,
)
from ferroelastic.rendezvous._torch_handlers import create_handler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

torchs = pytest.importorskip("torch.distributed.elastic.rendezvous")
dist = pytest.importorskip("torch.distributed")

RUN_ID = "run"


def _multi_tenant_store(port: int) -> Any:
    return dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False, multi_tenant=True)


@contextmanager
def server() -> Iterator[Any]:
    """A store that handlers in this process share when they are given its port."""
    while True:
        store = _multi_tenant_store(0)
        try:
            _multi_tenant_store(store.port)
            break
        except dist.DistNetworkError:
            # torch keeps servers by port, and where an earlier one of this process had the same it does not find the new one.
            continue
    try:
        yield store
    finally:
        del store
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _process_wide_things_of_torch() -> None:
    """Let libuv, under torch's stores, open what it opens once per process."""
    with server():
        pass


@contextmanager
def shutting_down(*handlers: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handler in handlers:
            handler.shutdown()


def in_threads(number: int, function: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(function, range(number)))


def address(info: RendezvousInfo) -> tuple[str, int]:
    return info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port


def workers_store(info: RendezvousInfo) -> Any:
    """Connect as a worker does with ``TORCHELASTIC_USE_AGENT_STORE=True``."""
    return dist.TCPStore("localhost", address(info)[1], world_size=2, is_master=False)


def leave_keys(info: RendezvousInfo) -> None:
    store = workers_store(info)
    dist.PrefixStore("default_pg", dist.PrefixStore("0", store)).set("address", "of a dead worker")
    store.add("counter", 1)


class Nodes:
    """Agents' ends of the rendezvous, a thread each."""

    def __init__(self, handlers: list[Any]) -> None:
        self.handlers = handlers
        self.infos: list[Any] = [None] * len(handlers)

    def join(self) -> list[RendezvousInfo]:
        self.infos = in_threads(
            len(self.handlers), lambda index: _worker_store.next_rendezvous(self.handlers[index], self.infos[index])
        )
        return sorted(self.infos, key=lambda info: info.rank)


def c10d(port: int, *, min_nodes: int = 2, max_nodes: int = 2, last_call_s: int = 1) -> Any:
    return create_handler(
        RendezvousParameters(
            "c10d",
            f"localhost:{port}",
            RUN_ID,
            min_nodes,
            max_nodes,
            local_addr="localhost",
            is_host=False,
            last_call_timeout=last_call_s,
            read_timeout=20,
        )
    )


def static(port: int, rank: int, world_size: int = 2, timeout_s: int = 30) -> Any:
    params = RendezvousParameters(
        "static", f"localhost:{port}", RUN_ID, world_size, world_size, rank=rank, timeout=timeout_s
    )
    handler = create_handler(params)
    assert type(handler).__name__ == "StaticTCPRendezvous"
    return handler


class TestC10d:
    def test_every_round_has_an_empty_store(self) -> None:
        with server() as store:
            nodes = Nodes([c10d(store.port), c10d(store.port)])
            ports = set()
            with shutting_down(*nodes.handlers):
                for _ in range(3):
                    first, second = nodes.join()
                    assert address(first) == address(second)
                    assert first.world_size == second.world_size == 2
                    assert workers_store(second).list_keys() == []
                    leave_keys(first)
                    ports.add(address(first)[1])
            assert store.port not in ports
            assert len(ports) == 3
            del nodes, first, second

    def test_a_node_that_joins_later_finds_it_as_well(self) -> None:
        with server() as store:
            # Whoever waits looks once a second, and should not come too late.
            early, late = (c10d(store.port, min_nodes=1, last_call_s=5) for _ in range(2))
            with shutting_down(early, late):
                alone = _worker_store.next_rendezvous(early, None)
                assert (alone.rank, alone.world_size) == (0, 1)
                leave_keys(alone)
                nodes = Nodes([early, late])
                nodes.infos[0] = alone
                infos = nodes.join()
                assert {info.world_size for info in infos} == {2}
                assert address(infos[0]) == address(infos[1]) != address(alone)
                assert workers_store(infos[1]).list_keys() == []
            del alone, nodes, infos, early, late

    def test_the_former_store_lives_until_the_round_is_complete(self) -> None:
        # Workers of other nodes are still busy with it: to see it gone would count as a failure of theirs.
        with server() as store:
            handler = c10d(store.port, min_nodes=1, max_nodes=1)
            with shutting_down(handler):
                first = _worker_store.next_rendezvous(handler, None)
                client = workers_store(first)
                real = handler.next_rendezvous

                def join() -> RendezvousInfo:
                    client.set("still", "there")
                    assert client.get("still") == b"there"
                    info: RendezvousInfo = real()
                    return info

                with mock.patch.object(handler, "next_rendezvous", join):
                    second = _worker_store.next_rendezvous(handler, first)
                assert address(second) != address(first)
                with pytest.raises(dist.DistError):
                    client.get("still")
            del handler

    def test_a_store_of_the_workers_own_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        with server() as store:
            handler = c10d(store.port, min_nodes=1, max_nodes=1)
            handler._shared_tcp_store_server = marker = object()
            with shutting_down(handler):
                for _ in range(2):
                    _worker_store.next_rendezvous(handler, None)
            assert handler._shared_tcp_store_server is marker
            del handler


class TestStatic:
    def test_the_port_stays_and_the_workers_keys_go(self) -> None:
        with server() as store:
            nodes = Nodes([static(store.port, 0), static(store.port, 1)])
            for number in range(4):
                first, second = nodes.join()
                assert address(first) == address(second) == ("localhost", store.port)
                found = set(workers_store(first).list_keys())
                assert {key for key in found if not key.startswith(f"{RUN_ID}/ferroelastic/")} == (
                    {f"{RUN_ID}/agents/own"} if number else set()
                )
                assert len(found) < 10
                first.store.set("agents/own", "stays")
                first.store.add("torchelastic/agent/terminal_state/num_members", 1)
                second.store.set("torchelastic/role_info/1", "of the former round")
                leave_keys(first)
            del nodes, first, second

    def test_a_replaced_agent_takes_part(self) -> None:
        with server() as store:
            handlers = [static(store.port, 0), static(store.port, 1)]
            Nodes(handlers).join()
            leave_keys(
                Nodes([handlers[0]]).infos[0] or RendezvousInfo(store, 0, 2, RendezvousStoreInfo("", store.port))
            )
            handlers[1] = static(store.port, 1)
            infos = Nodes(handlers).join()
            assert [key for key in store.list_keys() if not key.startswith(f"{RUN_ID}/")] == []
            del handlers, infos

    def test_a_node_that_does_not_come_is_named(self) -> None:
        with server() as store:
            handlers = [static(store.port, rank, timeout_s=2) for rank in range(2)]
            Nodes(handlers).join()
            with pytest.raises(RendezvousTimeoutError, match=r"nodes \[1\] of 2 did not join .* within 2 s") as caught:
                _worker_store.next_rendezvous(handlers[0], None)
            assert isinstance(caught.value, torchs.RendezvousTimeoutError)
            del handlers

    def test_in_two_processes(self) -> None:
        """A process for rank 1 that sees both rounds, and keys of workers that are gone in the second."""
        program = """if True:
            import sys
            import torch.distributed
            from ferroelastic.rendezvous import RendezvousParameters, _worker_store
            from ferroelastic.rendezvous._torch_handlers import create_handler
            handler = create_handler(RendezvousParameters(
                "static", f"localhost:{sys.argv[1]}", "run", 2, 2, rank=1, timeout=60))
            info = _worker_store.next_rendezvous(handler, None)
            info.store.underlying_store.set("from rank 1", "x")
            info.store.set("first", "done")
            info.store.wait(["second"])  # as agents do when they assign ranks
            info = _worker_store.next_rendezvous(handler, info)
            print(info.rank, info.store.underlying_store.check(["from rank 1"]))
        """
        with server() as store:
            handler = static(store.port, 0, timeout_s=60)
            with subprocess.Popen(
                [sys.executable, "-c", program, str(store.port)], stdout=subprocess.PIPE, text=True
            ) as other:
                info = _worker_store.next_rendezvous(handler, None)
                info.store.wait(["first"])
                assert store.check(["from rank 1"])
                info.store.set("second", "done")
                info = _worker_store.next_rendezvous(handler, info)
                output, _ = other.communicate(timeout=60)
            assert (output, other.returncode) == ("1 False\n", 0)
            del handler, info

    def test_a_torch_that_cannot_list_keys_gets_another_store(self) -> None:
        with server() as store, mock.patch.object(_torch_handlers, "listing_store", return_value=None):
            nodes = Nodes([static(store.port, 0), static(store.port, 1)])
            first, second = nodes.join()
            assert address(first) == address(second) == ("localhost", store.port)
            leave_keys(first)
            first, second = nodes.join()
            assert address(first) == address(second) != ("localhost", store.port)
            assert workers_store(second).list_keys() == []
            del nodes, first, second


class PlugIn(QuietHandler):
    """An out-of-tree handler that shares the store it has for itself, round after round."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "plug-in"

    def next_rendezvous(self) -> RendezvousInfo:
        info = RendezvousStoreInfo("localhost", self.store.port)
        return RendezvousInfo(dist.PrefixStore(RUN_ID, self.store), self.rank, self.world_size, info)


def test_nodes_of_a_plug_in_move_to_another_store() -> None:
    with server() as store:
        clients = [dist.TCPStore("localhost", store.port, is_master=False) for _ in range(3)]
        nodes = Nodes([PlugIn(client, rank, 3) for rank, client in enumerate(clients)])
        ports = []
        for _ in range(3):
            infos = nodes.join()
            assert len({address(info) for info in infos}) == 1
            assert not workers_store(infos[2]).check(["counter"])
            leave_keys(infos[0])
            ports.append(address(infos[0])[1])
        assert ports[0] == store.port
        assert len(set(ports)) == 3
        del clients, nodes, infos


class Agent(SimpleElasticAgent):
    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        return {}

    def _stop_workers(self, worker_group: WorkerGroup) -> None: ...

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        return RunResult(WorkerState.SUCCEEDED)

    def _shutdown(self, death_sig: Any = None, timeout: int = 30) -> None: ...


def test_agents_tell_workers_where_their_store_is_and_forget_former_ranks() -> None:
    with server() as store:
        agents = []
        for rank in range(2):
            handler = static(store.port, rank)
            spec = WorkerSpec(
                "trainer", rank + 1, handler, entrypoint="true", master_addr="localhost", master_port=store.port
            )
            agents.append(Agent(spec, exit_barrier_timeout=20))

        def restart(index: int) -> tuple[Any, ...]:
            group = agents[index].get_worker_group()
            agents[index]._restart_workers(group)
            return group.master_port, [worker.global_rank for worker in group.workers], group.workers[0].world_size

        assert in_threads(2, restart) == [(store.port, [0], 3), (store.port, [1, 2], 3)]
        # One of them had come to its end when the other restarted, and fewer workers are there in the next round.
        agents[0]._store.add(  # type: ignore[union-attr]
            "torchelastic/agent/terminal_state/num_members", 1
        )
        agents[1]._worker_group.spec.local_world_size = 1
        assert in_threads(2, restart) == [(store.port, [0], 2), (store.port, [1], 2)]
        in_threads(2, lambda index: agents[index]._exit_barrier())

        with mock.patch.object(_torch_handlers, "listing_store", return_value=None):
            agents = [Agent(agent._worker_group.spec) for agent in agents]
            in_threads(2, restart)
            (first, *_), (second, *_) = in_threads(2, restart)
            assert first == second
        assert first != store.port
        agents.clear()
        del handler, spec


def test_a_prefixed_store_keeps_its_prefix_on_another_connection() -> None:
    with server() as store:
        prefixed = dist.PrefixStore("run", store)
        other = _own_connection(prefixed)
        assert other is not prefixed
        other.set("key", "value")
        assert store.get("run/key") == b"value"
        other.set_timeout(store.timeout * 2)
        assert prefixed.timeout == store.timeout != other.timeout
        del prefixed, other


TRAINING = """
import os, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == dist.get_world_size() - 1:
    os._exit(7)
value = torch.ones(1)
dist.all_reduce(value)
assert value.item() == dist.get_world_size()
dist.destroy_process_group()
"""

LAUNCH = """
import sys
import torch.distributed
from ferroelastic.agent.server import LocalElasticAgent, WorkerSpec
from ferroelastic.multiprocessing import DefaultLogsSpecs
from ferroelastic.rendezvous import RendezvousParameters
from ferroelastic.rendezvous._torch_handlers import create_handler

backend, script, logs = sys.argv[1:]
config = {"c10d": {"is_host": True}, "static": {"rank": 0, "timeout": 60}}[backend]
if backend == "c10d":
    endpoint = "localhost:0"
else:
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    endpoint = f"localhost:{store.port}"
handler = create_handler(RendezvousParameters(backend, endpoint, "run", 1, 1, local_addr="localhost", **config))
spec = WorkerSpec(
    role="trainer", local_world_size=2, rdzv_handler=handler, entrypoint=sys.executable, args=(script,), max_restarts=1
)
agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=logs))
result = agent.run()
handler.shutdown()
print(result.state.value, agent._remaining_restarts, result.failures)
"""


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_a_restart_of_gloo_workers_comes_back(backend: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, backend, str(script), str(tmp_path / "logs")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.stdout == "SUCCEEDED 0 {}\n", done.stdout + done.stderr
