"""How the agents of a job share out the ranks of their workers, and meet again at the end, over one store."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs

if TYPE_CHECKING:
    from tests.conformance.implementations import Implementation


def assign(impl: Implementation, store: Any, agents: list[tuple[str, int]]) -> list[list[str]]:
    """Let agents with (role, number of workers) assign ranks at the same time; return the workers of each."""

    def one(rank: int, role: str, size: int) -> list[str]:
        spec = stubs.spec(impl, role=role, local_world_size=size)
        agent = stubs.agent_class(impl)(spec)
        return [str(worker) for worker in agent._assign_worker_ranks(store, rank, len(agents), spec)]

    return stubs.call_in_threads(partial(one, rank, *agent) for rank, agent in enumerate(agents))


def workers(first: int, world: int, first_in_role: int, role_size: int, count: int) -> list[str]:
    return [
        f"local_rank={local},global_rank={first + local},role_rank={first_in_role + local},"
        f"world_size={world},role_world_size={role_size}"
        for local in range(count)
    ]


def test_one_agent(impl: Implementation, store: Any) -> None:
    assert assign(impl, store, [("trainer", 3)]) == [workers(0, 3, 0, 3, 3)]


def test_agents_that_are_alike(impl: Implementation, store: Any) -> None:
    assert assign(impl, store, [("trainer", 2)] * 3) == [workers(first, 6, first, 6, 2) for first in (0, 2, 4)]


def test_agents_of_different_sizes(impl: Implementation, store: Any) -> None:
    assert assign(impl, store, [("trainer", 1), ("trainer", 4), ("trainer", 2)]) == [
        workers(0, 7, 0, 7, 1),
        workers(1, 7, 1, 7, 4),
        workers(5, 7, 5, 7, 2),
    ]


def test_agents_of_different_roles(impl: Implementation, store: Any) -> None:
    assert assign(impl, store, [("ps", 1), ("trainer", 2), ("ps", 3), ("reader", 2), ("trainer", 1)]) == [
        workers(0, 9, 0, 4, 1),
        workers(1, 9, 0, 3, 2),
        workers(3, 9, 1, 4, 3),
        workers(6, 9, 0, 2, 2),
        workers(8, 9, 2, 3, 1),
    ]


def test_keys_in_the_store(impl: Implementation, store: Any) -> None:
    """Agents of both kinds can take part in one job."""
    assign(impl, store, [("ps", 1), ("trainer", 2)])
    assert json.loads(store.get("torchelastic/role_info/1")) == {"role": "trainer", "rank": 1, "local_world_size": 2}
    assert json.loads(store.get("torchelastic/assigned_ranks/0")) == [0, 3, 0, 1]
    assert json.loads(store.get("torchelastic/assigned_ranks/1")) == [1, 3, 0, 2]


def test_identical_agents_need_no_store(impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_WORKER_IDENTICAL", "1")
    assert assign(impl, None, [("trainer", 2), ("ps", 2)]) == [workers(0, 4, 0, 4, 2), workers(2, 4, 2, 4, 2)]


@pytest.mark.parametrize("value", ["0", "true", ""])
def test_only_1_means_identical(impl: Implementation, store: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_WORKER_IDENTICAL", value)
    assert assign(impl, store, [("ps", 2), ("trainer", 2)])[1] == workers(2, 4, 0, 2, 2)


def test_agents_of_a_job_run_to_the_end(impl: Implementation, store: Any) -> None:
    """Rendezvous, ranks and exit barrier of three agents at the same time."""

    def one(rank: int) -> Any:
        handler = stubs.rendezvous(impl, store, rank, 3)
        result = impl.agent.RunResult(impl.agent.WorkerState.SUCCEEDED, {rank: None})
        agent = stubs.agent_class(impl)(stubs.spec(impl, handler), [result], exit_barrier_timeout=60)
        assert agent.run() is result
        group = agent.get_worker_group()
        return group.group_rank, group.group_world_size, [worker.global_rank for worker in group.workers]

    assert stubs.call_in_threads(partial(one, rank) for rank in range(3)) == [(rank, 3, [rank]) for rank in range(3)]
    assert store.add("torchelastic/agent/terminal_state/num_members", 0) == 3
