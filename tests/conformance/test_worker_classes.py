"""What an agent runs and what it returns: ``WorkerSpec``, ``Worker``, ``WorkerGroup``, ``RunResult``."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs, workers

if TYPE_CHECKING:
    from tests.conformance.implementations import Implementation


class TestWorkerSpec:
    @pytest.mark.needs("virtual-local-rank")
    def test_defaults(self, impl: Implementation) -> None:
        spec = impl.agent.WorkerSpec("trainer", 2, None, entrypoint="script.py")
        values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        assert not values.pop("warm_workers", 0)  # not in torch, nor the next two
        assert values.pop("warm_imports", ("torch",)) == ("torch",)
        assert not values.pop("preload", False)
        assert (values.pop("restart_settings", None), values.pop("restart_policy", None)) == (None, None)
        assert values == {
            "role": "trainer",
            "local_world_size": 2,
            "rdzv_handler": None,
            "fn": None,
            "entrypoint": "script.py",
            "args": (),
            "max_restarts": 3,
            "monitor_interval": 0.1,
            "master_port": None,
            "master_addr": None,
            "local_addr": None,
            "event_log_handler": "null",
            "numa_options": None,
            "duplicate_stdout_filters": None,
            "duplicate_stderr_filters": None,
            "virtual_local_rank": False,
        }

    @pytest.mark.parametrize(
        "wrong", [{"local_world_size": 0}, {"local_world_size": -1}, {"monitor_interval": 0}, {"entrypoint": None}]
    )
    def test_invalid_specifications_are_refused(self, impl: Implementation, wrong: dict[str, Any]) -> None:
        with pytest.raises(AssertionError) as raised:
            stubs.spec(impl, **wrong)
        assert bool(str(raised.value)) == impl.expect("named-values", torch=False, ours=True)

    def test_a_number_that_is_a_text_is_refused(self, impl: Implementation) -> None:
        with pytest.raises(TypeError) as raised:
            stubs.spec(impl, local_world_size="2")
        assert ("local_world_size" in str(raised.value)) == impl.expect("named-values", torch=False, ours=True)

    def test_negative_restarts(self, impl: Implementation) -> None:
        def is_refused() -> bool:
            try:
                stubs.spec(impl, max_restarts=-1)
            except AssertionError:
                return True
            return False

        assert is_refused() == impl.expect("negative-restarts", torch=False, ours=True)

    def test_the_former_name_of_the_entrypoint(self, impl: Implementation) -> None:
        with pytest.warns(DeprecationWarning, match="please use WorkerSpec.entrypoint instead"):
            spec = stubs.spec(impl, entrypoint=None, fn=len)
        assert spec.entrypoint is len

    @pytest.mark.parametrize(
        ("entrypoint", "name"),
        [
            ("/usr/bin/env", "env"),
            ("train.py", "train.py"),
            (stubs.entrypoint, "entrypoint"),
            (stubs.EventLog.emit, "EventLog.emit"),
        ],
    )
    def test_name_of_the_entrypoint(self, impl: Implementation, entrypoint: Any, name: str) -> None:
        assert stubs.spec(impl, entrypoint=entrypoint).get_entrypoint_name() == name

    def test_an_entrypoint_without_a_name(self, impl: Implementation) -> None:
        def name(entrypoint: Any) -> str | None:
            try:
                found: str = stubs.spec(impl, entrypoint=entrypoint).get_entrypoint_name()
            except (AssertionError, AttributeError):
                return None
            return found

        assert name(partial(partial(len))) == impl.expect("any-callable", torch=None, ours="len")
        assert name(workers.Give(1)) == impl.expect("any-callable", torch=None, ours="Give")

    def test_equal_by_value(self, impl: Implementation) -> None:
        assert stubs.spec(impl) == stubs.spec(impl)
        assert stubs.spec(impl) != stubs.spec(impl, role="other")
        assert dataclasses.replace(stubs.spec(impl), role="other").role == "other"


class TestWorker:
    def test_defaults(self, impl: Implementation) -> None:
        worker = impl.agent.Worker(3)
        assert worker.id is None
        assert str(worker) == "local_rank=3,global_rank=-1,role_rank=-1,world_size=-1,role_world_size=-1"
        assert repr(worker) == str(worker)

    def test_values(self, impl: Implementation) -> None:
        worker = impl.agent.Worker(local_rank=1, global_rank=2, role_rank=3, world_size=4, role_world_size=5)
        worker.id = "host:1"
        assert str(worker) == "local_rank=1,global_rank=2,role_rank=3,world_size=4,role_world_size=5"

    def test_unknown_attributes(self, impl: Implementation) -> None:
        def can_be_set() -> bool:
            try:
                impl.agent.Worker(0).something = 1
            except AttributeError:
                return False
            return True

        assert can_be_set() == impl.expect("no-slots", torch=False, ours=True)


class TestWorkerGroup:
    def test_before_a_rendezvous(self, impl: Implementation) -> None:
        spec = stubs.spec(impl, local_world_size=3)
        group = impl.agent.WorkerGroup(spec)
        assert group.spec is spec
        assert [worker.local_rank for worker in group.workers] == [0, 1, 2]
        assert group.state == impl.agent.WorkerState.INIT
        unknown = (group.store, group.group_rank, group.group_world_size, group.master_addr, group.master_port)
        assert unknown == (None,) * 5


class TestWorkerState:
    def test_only_workers_with_processes_run(self, impl: Implementation) -> None:
        state = impl.agent.WorkerState
        assert {one.name for one in state if state.is_running(one)} == {"HEALTHY", "UNHEALTHY"}

    def test_is_text(self, impl: Implementation) -> None:
        assert impl.agent.WorkerState.FAILED == "FAILED"
        assert impl.agent.WorkerState("INIT") is impl.agent.WorkerState.INIT

    def test_members_of_the_two_implementations(self, impl: Implementation) -> None:
        from torch.distributed.elastic.agent.server.api import WorkerState

        assert list(impl.agent.WorkerState) == list(WorkerState)
        assert {WorkerState.FAILED: 1}[impl.agent.WorkerState.FAILED] == 1
        is_torchs = isinstance(impl.agent.WorkerState.FAILED, WorkerState)
        assert is_torchs == impl.expect("own-enums", torch=True, ours=False)


class TestRunResult:
    def test_defaults(self, impl: Implementation) -> None:
        result = impl.agent.RunResult(impl.agent.WorkerState.HEALTHY)
        assert (result.return_values, result.failures) == ({}, {})
        assert result.return_values is not impl.agent.RunResult(impl.agent.WorkerState.HEALTHY).return_values

    @pytest.mark.parametrize("state", ["UNKNOWN", "INIT", "HEALTHY", "STOPPED", "SUCCEEDED", "FAILED"])
    def test_which_states_are_failures(self, impl: Implementation, state: str) -> None:
        assert stubs.in_state(impl, state).is_failed() == (state == "FAILED")

    def test_a_stuck_worker(self, impl: Implementation) -> None:
        result = stubs.in_state(impl, "UNHEALTHY")
        assert result.is_failed() == impl.expect("stuck-is-failed", torch=False, ours=True)


class TestRoleInstanceInfo:
    def test_round_trip(self, impl: Implementation) -> None:
        info = impl.agent._RoleInstanceInfo("trainer", 1, 8)
        assert info.serialize() == b'{"role": "trainer", "rank": 1, "local_world_size": 8}'
        again = impl.agent._RoleInstanceInfo.deserialize(info.serialize())
        assert (again.role, again.rank, again.local_world_size) == ("trainer", 1, 8)

    @pytest.mark.parametrize(
        ("one", "other", "expected"),
        [(("a", 1), ("a", 4), -3), (("a", 4), ("a", 4), 0), (("b", 1), ("a", 4), 1), (("a", 1), ("b", 0), -1)],
    )
    def test_order(self, impl: Implementation, one: Any, other: Any, expected: int) -> None:
        make = impl.agent._RoleInstanceInfo
        assert make.compare(make(*one, 2), make(*other, 5)) == expected

    @pytest.mark.parametrize(("role", "expected"), [("a", (0, 0)), ("b", (1, 3)), ("c", (-1, -1))])
    def test_boundaries(self, impl: Implementation, role: str, expected: tuple[int, int]) -> None:
        make = impl.agent._RoleInstanceInfo
        infos = [make("a", 0, 1), *(make("b", rank, 1) for rank in (1, 2, 3))]
        assert make.find_role_boundaries(infos, role) == expected
