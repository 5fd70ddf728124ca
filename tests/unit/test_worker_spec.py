"""What an agent runs: the specification of workers, the workers, and how a run ended."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import Any

import pytest
from tests.support.fake_agent import Agent, Handler, S, spec

from ferroelastic.agent import server
from ferroelastic.agent.server import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from ferroelastic.agent.server.api import _RoleInstanceInfo


class TestSpec:
    def test_defaults_are_torchs(self) -> None:
        made = spec()
        assert (made.max_restarts, made.monitor_interval, made.event_log_handler) == (3, 0.1, "null")
        assert (made.args, made.master_addr, made.master_port, made.virtual_local_rank) == ((), None, None, False)

    def test_the_fields_are_torchs(self) -> None:
        theirs = pytest.importorskip("torch.distributed.elastic.agent.server")
        for name, added in (
            ("WorkerSpec", ["warm_workers", "warm_imports", "preload", "restart_settings", "restart_policy"]),
            ("RunResult", []),
        ):
            expected = [field.name for field in fields(getattr(theirs, name))] + added
            assert [field.name for field in fields(getattr(server, name))] == expected
        assert isinstance(spec(), theirs.WorkerSpec)
        assert isinstance(WorkerGroup(spec()), theirs.WorkerGroup)
        assert isinstance(Agent(spec()), theirs.SimpleElasticAgent)
        assert isinstance(Handler(), sys.modules["torch.distributed.elastic.rendezvous"].RendezvousHandler)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"local_world_size": 0}, "local_world_size of role 'trainer' must be positive, got 0"),
            ({"local_world_size": -1}, "local_world_size .* got -1"),
            ({"monitor_interval": 0}, r"monitor_interval .* must be positive \(seconds\), got 0"),
            ({"monitor_interval": float("nan")}, "monitor_interval .* got nan"),
            ({"max_restarts": -1}, "max_restarts .* must not be negative, got -1: use 0 for no restarts"),
            ({"entrypoint": None}, "role 'trainer' has no entrypoint: pass a function or the path of a program"),
        ],
    )
    def test_bad_values_are_named(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(AssertionError, match=message):
            spec(**values)

    def test_fn_is_deprecated(self) -> None:
        with pytest.warns(DeprecationWarning, match="please use WorkerSpec.entrypoint") as caught:
            made = WorkerSpec(role="trainer", local_world_size=1, rdzv_handler=Handler(), fn=len)
        assert made.entrypoint is len
        assert caught[0].filename == __file__

    def test_an_entrypoint_has_a_name(self) -> None:
        assert spec(entrypoint="/some/where/train.sh").get_entrypoint_name() == "train.sh"
        assert spec(entrypoint=TestSpec.test_fn_is_deprecated).get_entrypoint_name() == "TestSpec.test_fn_is_deprecated"


class TestData:
    def test_states(self) -> None:
        assert {state for state in WorkerState if WorkerState.is_running(state)} == {S.HEALTHY, S.UNHEALTHY}
        assert WorkerState.HEALTHY == "HEALTHY"

    def test_a_new_group(self) -> None:
        group = WorkerGroup(spec(local_world_size=4))
        assert group.state == S.INIT
        assert [worker.local_rank for worker in group.workers] == [0, 1, 2, 3]
        assert {(worker.id, worker.global_rank, worker.world_size) for worker in group.workers} == {(None, -1, -1)}
        assert (group.store, group.group_rank, group.group_world_size) == (None, None, None)
        assert (group.master_addr, group.master_port) == (None, None)

    def test_the_text_of_a_worker_has_its_ranks(self) -> None:
        text = "local_rank=1,global_rank=2,role_rank=3,world_size=4,role_world_size=5"
        assert str(Worker(1, 2, 3, 4, 5)) == repr(Worker(1, 2, 3, 4, 5)) == text

    @pytest.mark.parametrize("state", list(WorkerState))
    def test_failed_and_stuck_are_failures(self, state: WorkerState) -> None:
        assert RunResult(state).is_failed() == (state in (S.FAILED, S.UNHEALTHY))

    def test_any_state_can_be_asked(self) -> None:
        assert not RunResult({}, {}).is_failed()  # type: ignore[arg-type]

    def test_role_infos(self) -> None:
        info = _RoleInstanceInfo("role", 1, 10)
        again = _RoleInstanceInfo.deserialize(info.serialize())
        assert (again.role, again.rank, again.local_world_size) == ("role", 1, 10)
        assert json.loads(info.serialize()) == {"role": "role", "rank": 1, "local_world_size": 10}
        assert _RoleInstanceInfo.compare(_RoleInstanceInfo("role", 2, 10), info) == 1
        assert _RoleInstanceInfo.compare(info, _RoleInstanceInfo("role1", 0, 10)) == -1
        assert _RoleInstanceInfo.compare(_RoleInstanceInfo("role1", 0, 10), info) == 1
        infos = [_RoleInstanceInfo(role, rank, 1) for rank, role in enumerate(("a", "b", "b", "b", "c"))]
        assert _RoleInstanceInfo.find_role_boundaries(infos, "b") == (1, 3)
        assert _RoleInstanceInfo.find_role_boundaries(infos, "d") == (-1, -1)
