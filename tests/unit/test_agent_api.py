"""The loop of an agent: ranks, rendezvous, runs and restarts, the exit barrier."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.support.fake_agent import Agent, S, spec
from tests.support.memory_store import MemoryStore

from ferroelastic import agent as agent_package
from ferroelastic._signals import Handling
from ferroelastic.agent import server
from ferroelastic.agent.server import (
    HealthCheckServer,
    RunResult,
    SimpleElasticAgent,
    WorkerSpec,
    WorkerState,
    create_healthcheck_server,
)
from ferroelastic.agent.server.local_elastic_agent import LocalElasticAgent
from ferroelastic.multiprocessing import DefaultLogsSpecs, SignalException
from ferroelastic.rendezvous import RendezvousGracefulExitError
from ferroelastic.utils.store import DistStoreError

if TYPE_CHECKING:
    from pathlib import Path


class TestRanks:
    ROLES = (("server", 4), ("trainer", 1), ("trainer", 2), ("trainer", 3), ("server", 5))

    def test_ranks_follow_from_the_workers_of_all_agents(self) -> None:
        store = MemoryStore()

        def assign(group_rank: int) -> list[tuple[int, ...]]:
            role, size = self.ROLES[group_rank]
            made = spec(role=role, local_world_size=size)
            workers = Agent(made)._assign_worker_ranks(store.clone(), group_rank, len(self.ROLES), made)
            return [(w.local_rank, w.role_rank, w.global_rank, w.world_size, w.role_world_size) for w in workers]

        with ThreadPoolExecutor(len(self.ROLES)) as pool:
            assigned = list(pool.map(assign, range(len(self.ROLES))))
        assert assigned == [
            [(0, 0, 0, 15, 9), (1, 1, 1, 15, 9), (2, 2, 2, 15, 9), (3, 3, 3, 15, 9)],
            [(0, 0, 4, 15, 6)],
            [(0, 1, 5, 15, 6), (1, 2, 6, 15, 6)],
            [(0, 3, 7, 15, 6), (1, 4, 8, 15, 6), (2, 5, 9, 15, 6)],
            [(0, 4, 10, 15, 9), (1, 5, 11, 15, 9), (2, 6, 12, 15, 9), (3, 7, 13, 15, 9), (4, 8, 14, 15, 9)],
        ]

    def test_identical_agents_need_no_store(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_ELASTIC_WORKER_IDENTICAL", "1")
        made = spec(local_world_size=2)
        workers = Agent(made)._assign_worker_ranks(None, 3, 5, made)
        assert [(w.global_rank, w.role_rank, w.world_size, w.role_world_size) for w in workers] == [
            (6, 6, 10, 10),
            (7, 7, 10, 10),
        ]

    def test_a_signal_is_seen_while_others_are_awaited(self) -> None:
        waiting = threading.Event()
        store = MemoryStore()

        class Store(MemoryStore):
            def get(self, key: str) -> bytes:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
                waiting.set()
                return super().get(key)

        made = spec()
        with Handling("SIGUSR1"), interrupting(waiting), pytest.raises(SignalException):
            Agent(made)._assign_worker_ranks(Store(shared=store), 1, 2, made)
        store.set("torchelastic/assigned_ranks/1", "[0, 0, 0, 0]")  # lets the helper thread go


class interrupting:  # noqa: N801 - used as a statement
    """Sends the main thread SIGUSR1 as soon as an event is set."""

    def __init__(self, ready: threading.Event) -> None:
        def interrupt() -> None:
            ready.wait()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        self.thread = threading.Thread(target=interrupt)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join()


class TestRendezvous:
    def test_the_group_gets_the_result_of_the_rendezvous(self) -> None:
        agent = Agent(spec())
        group = agent.get_worker_group()
        agent._rendezvous(group)
        assert (group.group_rank, group.group_world_size) == (0, 1)
        assert (group.master_addr, group.master_port) == ("host", 29001)
        assert group.store is agent._store is not None
        assert [worker.global_rank for worker in group.workers] == [0, 1]

    def test_an_address_in_the_spec_wins(self) -> None:
        agent = Agent(spec(master_addr="other", master_port=1234))
        agent._rendezvous(agent.get_worker_group())
        assert (agent.get_worker_group().master_addr, agent.get_worker_group().master_port) == ("other", 1234)

    def test_the_store_is_renewed_only_where_torch_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        agent = Agent(spec(local_addr="this.node"))
        handler = agent._worker_group.spec.rdzv_handler
        with mock.patch(
            "ferroelastic.agent.server.api.next_rendezvous", side_effect=lambda h, *_, **__: h.next_rendezvous()
        ) as join:
            monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
            agent._rendezvous(agent.get_worker_group())
            join.assert_not_called()
            first = agent._rdzv_info
            monkeypatch.setitem(sys.modules, "torch.distributed", mock.Mock())
            agent._rendezvous(agent.get_worker_group())
        join.assert_called_once_with(handler, first, local_addr="this.node")
        assert agent._rdzv_info is not first

    def test_workers_start_after_it(self) -> None:
        agent = Agent(spec())
        agent._initialize_workers(agent.get_worker_group())
        group = agent.get_worker_group()
        assert group.state == S.HEALTHY
        assert [worker.id for worker in group.workers] == [1000, 1001]

    def test_a_restart_stops_meets_and_starts(self) -> None:
        agent = Agent(spec())
        for number in range(1, 4):
            agent._restart_workers(agent.get_worker_group())
            assert (agent.stopped, agent.started) == (number, number)
            assert agent.get_worker_group().master_port == 29000 + number


class TestRun:
    def test_workers_that_succeed(self) -> None:
        agent = Agent(spec(monitor_interval=7), S.HEALTHY, S.HEALTHY, S.SUCCEEDED, shutdown_timeout=5)
        with mock.patch.object(agent, "_record_worker_events") as record_events:
            result = agent.run()
        assert result == RunResult(S.SUCCEEDED, {0: None, 1: None})
        record_events.assert_called_once_with(result)
        assert agent.waits == [7, 7, 7]
        assert (agent.started, agent.stopped, agent._remaining_restarts) == (1, 0, 3)
        assert agent.shutdowns == [(signal.SIGTERM, 5)]

    def test_the_default_wait_sleeps(self) -> None:
        with mock.patch("time.sleep") as sleep:
            SimpleElasticAgent._wait_for_event(Agent(spec()), 1.5)
        sleep.assert_called_once_with(1.5)

    @pytest.mark.parametrize("state", [S.FAILED, S.UNHEALTHY])
    def test_workers_that_keep_failing(self, state: WorkerState) -> None:
        agent = Agent(spec(max_restarts=2), *[state] * 3)
        result = agent.run()
        assert result.state == state
        assert result.is_failed()
        assert agent.get_worker_group().state == S.FAILED
        assert (agent.started, agent.stopped, agent._remaining_restarts) == (3, 3, 0)
        assert len(agent.shutdowns) == 1

    def test_a_new_node_restarts_without_using_up_a_restart(self) -> None:
        agent = Agent(spec(max_restarts=1), S.HEALTHY, S.HEALTHY, S.SUCCEEDED)
        agent._worker_group.spec.rdzv_handler.waiting.extend((1, 0))  # type: ignore[attr-defined]
        with mock.patch.object(agent, "_begin_stop") as begin_stop:
            assert agent.run().state == S.SUCCEEDED
        assert (agent.started, agent._remaining_restarts) == (2, 1)
        begin_stop.assert_called_once_with(signal.SIGTERM, "membership")

    def test_an_unknown_state_ends_the_run(self) -> None:
        agent = Agent(spec(), S.UNKNOWN)
        with pytest.raises(RuntimeError, match=r"\[trainer\] Worker group in UNKNOWN state"):
            agent.run()
        assert agent.get_worker_group().state == S.UNKNOWN
        assert len(agent.shutdowns) == 1

    @pytest.mark.parametrize(
        "error", [RuntimeError("reason"), KeyboardInterrupt(), SystemExit(3), SignalException("signal", signal.SIGINT)]
    )
    def test_every_error_ends_in_one_shutdown(self, error: BaseException) -> None:
        agent = Agent(spec(), shutdown_timeout=4)
        with (
            mock.patch.object(agent, "_initialize_workers", side_effect=error),
            pytest.raises(type(error)) as caught,
        ):
            agent.run()
        assert caught.value is error
        expected = signal.SIGINT if isinstance(error, SignalException) else signal.SIGTERM
        assert agent.shutdowns == [(expected, 4)]
        assert agent.get_worker_group().state == S.INIT

    def test_a_workers_event_handler_that_fails_leaks_nothing(self) -> None:
        agent = Agent(spec(), S.SUCCEEDED)
        with (
            mock.patch.object(agent, "_record_worker_events", side_effect=ValueError("reason")),
            pytest.raises(ValueError, match="reason"),
        ):
            agent.run()
        assert len(agent.shutdowns) == 1

    def test_a_node_that_is_not_needed_succeeds(self) -> None:
        agent = Agent(spec())
        with (
            mock.patch.object(agent, "_invoke_run", side_effect=RendezvousGracefulExitError("not needed")),
            mock.patch.object(agent, "_record_worker_events") as record_events,
        ):
            assert agent.run() == RunResult(S.SUCCEEDED)
        record_events.assert_not_called()
        assert len(agent.shutdowns) == 1

    def test_errors_of_torchs_classes_are_known(self) -> None:
        torchs_multiprocessing = pytest.importorskip("torch.distributed.elastic.multiprocessing")
        torchs_rendezvous = pytest.importorskip("torch.distributed.elastic.rendezvous")
        agent = Agent(spec())
        with mock.patch.object(
            agent, "_invoke_run", side_effect=torchs_rendezvous.RendezvousGracefulExitError("not needed")
        ):
            assert agent.run().state == S.SUCCEEDED
        error = torchs_multiprocessing.SignalException("signal", signal.SIGQUIT)
        with (
            mock.patch.object(agent, "_invoke_run", side_effect=error),
            pytest.raises(torchs_multiprocessing.SignalException),
        ):
            agent.run()
        assert agent.shutdowns[-1] == (signal.SIGQUIT, 30)

    @pytest.mark.parametrize("first", [SignalException("first", signal.SIGTERM), None])
    def test_signals_during_the_shutdown_do_not_skip_it(self, first: SignalException | None) -> None:
        agent = Agent(spec(), S.SUCCEEDED, shutdown_timeout=9)
        calls: list[tuple[Any, Any]] = []
        more = deque([SignalException("second", signal.SIGINT), SignalException("third", signal.SIGINT)])

        def shutdown(death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
            calls.append((death_sig, timeout))
            if more:
                raise more.popleft()

        with (
            mock.patch.object(agent, "_shutdown", shutdown),
            mock.patch.object(agent, "_invoke_run", side_effect=first, return_value=RunResult(S.SUCCEEDED, {-1: 0})),
            pytest.raises(SignalException) as caught,
        ):
            agent.run()
        assert calls == [(signal.SIGTERM, 9)] * 3
        # Nobody else may have seen the signal, so it is not swallowed.
        assert str(caught.value) == ("first" if first else "third")

    def test_a_failing_shutdown_is_reported(self) -> None:
        agent = Agent(spec(), S.SUCCEEDED)
        with (
            mock.patch.object(agent, "_shutdown", side_effect=OSError("reason")),
            pytest.raises(OSError, match="reason"),
        ):
            agent.run()

    @pytest.mark.parametrize("with_signal", [False, True])
    def test_older_shutdowns_get_the_arguments_that_they_take(self, with_signal: bool) -> None:
        seen: list[Any] = []
        error = SignalException("signal", signal.SIGINT) if with_signal else RuntimeError()

        class WithoutArguments(Agent):
            def _shutdown(self) -> None:  # type: ignore[override]
                seen.append(())

        class WithoutTimeout(Agent):
            def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, is_restart: bool = False) -> None:  # type: ignore[override]
                seen.append(death_sig)

        for kind in (WithoutArguments, WithoutTimeout):
            agent = kind(spec())
            with mock.patch.object(agent, "_invoke_run", side_effect=error), pytest.raises(type(error)):
                agent.run()
        assert seen == [(), signal.SIGINT if with_signal else signal.SIGTERM]

    def test_workers_left_in_init_are_an_error(self) -> None:
        agent = Agent(spec())
        with mock.patch.object(agent, "_initialize_workers"), pytest.raises(AssertionError, match="not started"):
            agent.run()


class TestExitBarrier:
    def test_failing_to_meet_does_not_fail_the_job(self, caplog: pytest.LogCaptureFixture) -> None:
        agent = Agent(spec(), S.SUCCEEDED)
        with mock.patch("ferroelastic.utils.store.barrier", side_effect=RuntimeError("reason")) as barrier:
            assert agent.run().state == S.SUCCEEDED
        barrier.assert_called_once_with(
            store=agent._store, world_size=1, key_prefix="torchelastic/agent/terminal_state", barrier_timeout=300
        )
        assert "Error waiting on exit barrier" in caplog.text
        assert not agent._in_exit_barrier

    def test_a_signal_ends_it(self) -> None:
        agent = Agent(spec(), S.SUCCEEDED)
        error = SignalException("signal", signal.SIGTERM)
        with mock.patch("ferroelastic.utils.store.barrier", side_effect=error), pytest.raises(SignalException):
            agent.run()
        assert len(agent.shutdowns) == 1
        assert not agent._in_exit_barrier

    def test_a_signal_is_seen_while_others_are_awaited(self) -> None:
        waiting, release = threading.Event(), threading.Event()

        def barrier(**_: Any) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            waiting.set()
            release.wait()

        agent = Agent(spec())
        agent._worker_group.group_world_size = 2
        agent._store = MemoryStore()
        try:
            with (
                mock.patch("ferroelastic.utils.store.barrier", barrier),
                Handling("SIGUSR1"),
                interrupting(waiting),
                pytest.raises(SignalException),
            ):
                agent._exit_barrier()
        finally:
            release.set()

    def test_it_waits_for_all_nodes_on_a_connection_of_its_own(self) -> None:
        store = MemoryStore()
        timeout = store.timeout
        agents = [Agent(spec(), exit_barrier_timeout=50) for _ in range(2)]
        for agent in agents:
            agent._store, agent._worker_group.group_world_size = store, 2
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(SimpleElasticAgent._exit_barrier, agents))
        assert int(store.get("torchelastic/agent/terminal_state/num_members")) == 2
        assert store.timeout == timeout

    def test_a_store_that_cannot_be_cloned_will_do(self) -> None:
        store: Any = mock.Mock(clone=mock.Mock(side_effect=RuntimeError("not implemented")))
        store.add.side_effect = DistStoreError("gone")
        agent = Agent(spec())
        agent._store, agent._worker_group.group_world_size = store, 2
        agent._exit_barrier()
        store.add.assert_called_once()


def test_a_spec_may_be_a_mock_of_torchs_kind() -> None:
    made: Any = mock.Mock(spec=WorkerSpec, max_restarts=3, local_world_size=1)
    agent = Agent(made, exit_barrier_timeout=450, shutdown_timeout=180)
    assert (agent._exit_barrier_timeout, agent._shutdown_timeout, agent._remaining_restarts) == (450, 180, 3)
    assert (Agent(made)._exit_barrier_timeout, Agent(made)._shutdown_timeout) == (300, 30)


@pytest.mark.parametrize("kind", [Agent, LocalElasticAgent])
def test_the_timeout_of_the_exit_barrier(kind: type[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logs = {"logs_specs": DefaultLogsSpecs(str(tmp_path))} if kind is LocalElasticAgent else {}
    monkeypatch.setenv("TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT", "750")
    agents = kind(spec(), **logs), kind(spec(), exit_barrier_timeout=200, **logs)
    assert [agent._exit_barrier_timeout for agent in agents] == [750.0, 200.0]
    assert all(isinstance(agent._exit_barrier_timeout, float) for agent in agents)
    with pytest.raises(ValueError, match="exit_barrier_timeout must be non-negative, got -1"):
        kind(spec(), exit_barrier_timeout=-1, **logs)


def test_a_health_check_server_is_made_without_being_started() -> None:
    made = create_healthcheck_server(alive_callback=lambda: 7, port=4711, timeout=60)
    assert isinstance(made, HealthCheckServer)
    assert made.board is None
    made.stop()
    assert made.alive_callback() == 7


def test_importing_the_package_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert os.path.basename(server.__file__ or "") == "__init__.py"


def test_the_package_has_all_names() -> None:
    assert {*server.__all__} >= {"LocalElasticAgent", "WorkerSpec", "TORCHELASTIC_ENABLE_FILE_TIMER"}
    assert all(hasattr(server, name) for name in server.__all__)
    assert agent_package.server is server
