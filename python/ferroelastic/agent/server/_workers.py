"""Data classes of an agent: specification of the workers, workers, and result of a run."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from ferroelastic._checks import (
    check_entrypoint,
    check_iterable,
    check_number,
    check_type,
    check_warm_workers,
    check_whole_number,
)
from ferroelastic._compat import TorchCompatible
from ferroelastic._text import entrypoint_name
from ferroelastic.agent.server._policy import RestartPolicy, RestartSettings, check_restart_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ferroelastic.multiprocessing.errors import ProcessFailure
    from ferroelastic.numa.binding import NumaOptions
    from ferroelastic.rendezvous import RendezvousHandler
    from ferroelastic.utils._store_types import Store


@dataclass
class WorkerSpec(TorchCompatible):
    """Specification of the workers of a role. Mirrors ``torch.distributed.elastic.agent.server.WorkerSpec``.

    Nodes may run different numbers of workers of a role.

    Args:
        role: name of the role.
        local_world_size: number of workers on this node.
        rdzv_handler: rendezvous handler.
        fn: deprecated, use ``entrypoint``.
        entrypoint: function, or path of a program, that a worker runs.
        args: arguments of the entrypoint.
        max_restarts: maximum number of restarts after failures.
        monitor_interval: maximum time between two checks of the workers, in seconds.
        master_port: port of the workers' store. ``None`` uses the port from the rendezvous.
        master_addr: host of the workers' store. ``None`` uses the host from the rendezvous.
        local_addr: address of this node.
        event_log_handler: destination of events, see :mod:`ferroelastic.events`.
        numa_options: binding of the workers to CPUs. ``None`` means no binding.
        duplicate_stdout_filters: lines of standard output that contain one of these strings are also written to a separate file.
        duplicate_stderr_filters: same for standard error.
        virtual_local_rank: whether every worker has ``LOCAL_RANK`` 0 and sees only its own GPU.
        warm_workers: number of workers that wait in parked processes with imported modules, for the next restart. 0 for none. Not in torch.
        warm_imports: modules that parked workers have imported, and functions that they have called as ``package.module:function``. Not in
            torch.
        preload: whether the first start also waits for the imports and uses parked workers. Not in torch.
        restart_settings: settings of the restart policy, equal on all nodes; ``None`` for the defaults. Not in torch.
        restart_policy: the program's own restart policy. Not in torch.

    Raises:
        AssertionError: a number is out of range, or the entrypoint is missing.
        TypeError: a value has the wrong type.
    """

    role: str
    local_world_size: int
    rdzv_handler: RendezvousHandler
    fn: Callable[..., Any] | None = None
    entrypoint: Callable[..., Any] | str | None = None
    args: tuple[Any, ...] = ()
    max_restarts: int = 3
    monitor_interval: float = 0.1
    master_port: int | None = None
    master_addr: str | None = None
    local_addr: str | None = None
    event_log_handler: str = "null"
    numa_options: NumaOptions | None = None
    duplicate_stdout_filters: list[str] | None = None
    duplicate_stderr_filters: list[str] | None = None
    virtual_local_rank: bool = False
    # Not in the repr, which is that of torch.
    warm_workers: int = field(default=0, repr=False)
    warm_imports: Sequence[str] = field(default=("torch",), repr=False)
    preload: bool = field(default=False, repr=False)
    restart_settings: RestartSettings | None = field(default=None, repr=False)
    restart_policy: RestartPolicy | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the values."""
        check_type("role", self.role, str, "a string")
        check_whole_number(f"local_world_size of role {self.role!r}", self.local_world_size)
        check_number(f"monitor_interval of role {self.role!r}", self.monitor_interval)
        check_number(f"max_restarts of role {self.role!r}", self.max_restarts, "a number of restarts")
        check_iterable(f"args of role {self.role!r}", self.args, "a tuple of arguments")
        if not self.local_world_size > 0:
            raise AssertionError(
                f"local_world_size of role {self.role!r} must be positive, got {self.local_world_size}"
            )
        if not self.monitor_interval > 0:
            raise AssertionError(
                f"monitor_interval of role {self.role!r} must be positive (seconds), got {self.monitor_interval}"
            )
        if not self.max_restarts >= 0:
            raise AssertionError(
                f"max_restarts of role {self.role!r} must not be negative, got {self.max_restarts}: use 0 for no restarts"
            )
        check_warm_workers(self.warm_workers, self.warm_imports)
        check_restart_policy(self.restart_settings, self.restart_policy)
        if self.fn is not None:
            warnings.warn(
                "WorkerSpec.fn will be deprecated, please use WorkerSpec.entrypoint instead",
                category=DeprecationWarning,
                stacklevel=3,
            )
            self.entrypoint = self.fn
        if self.entrypoint is None or (isinstance(self.entrypoint, str) and not self.entrypoint):
            raise AssertionError(f"role {self.role!r} has no entrypoint: pass a function or the path of a program")
        check_entrypoint(f"entrypoint of role {self.role!r}", self.entrypoint)

    def get_entrypoint_name(self) -> str:
        """Return the name of the function, or the file name of the program.

        For a ``functools.partial`` this is the name of its function, for an instance with ``__call__`` the name of its class.

        Raises:
            AssertionError: there is no entrypoint.
        """
        if self.entrypoint is None:
            raise AssertionError(f"role {self.role!r} has no entrypoint")
        return entrypoint_name(self.entrypoint)


class Worker(TorchCompatible):
    """One worker. Mirrors ``torch.distributed.elastic.agent.server.Worker``.

    Args:
        local_rank: rank on this node.
        global_rank: rank among all workers of the job. This and the following values may change with each round.
        role_rank: rank among all workers of its role.
        world_size: number of workers of the job.
        role_world_size: number of workers of its role.

    Attributes:
        id: identifier of the worker, with a local agent its process id. ``None`` before the start.
    """

    def __init__(
        self,
        local_rank: int,
        global_rank: int = -1,
        role_rank: int = -1,
        world_size: int = -1,
        role_world_size: int = -1,
    ) -> None:
        self.id: Any = None
        self.local_rank = local_rank
        self.global_rank = global_rank
        self.role_rank = role_rank
        self.world_size = world_size
        self.role_world_size = role_world_size

    def __str__(self) -> str:
        return (
            f"local_rank={self.local_rank},global_rank={self.global_rank},role_rank={self.role_rank},"
            f"world_size={self.world_size},role_world_size={self.role_world_size}"
        )

    def __repr__(self) -> str:
        return str(self)


class WorkerState(str, Enum):
    """State of a group of workers. Mirrors ``torch.distributed.elastic.agent.server.WorkerState``."""

    UNKNOWN = "UNKNOWN"
    """The agent has lost track of the workers."""
    INIT = "INIT"
    """Not started yet."""
    HEALTHY = "HEALTHY"
    """Running."""
    UNHEALTHY = "UNHEALTHY"
    """Running, but a worker is stuck."""
    STOPPED = "STOPPED"
    """Stopped by the agent for a restart."""
    SUCCEEDED = "SUCCEEDED"
    """All workers ended with exit code 0."""
    FAILED = "FAILED"
    """A worker failed."""

    @staticmethod
    def is_running(state: WorkerState) -> bool:
        """Return whether workers in this state have processes."""
        return state in (WorkerState.HEALTHY, WorkerState.UNHEALTHY)


class WorkerGroup(TorchCompatible):
    """The workers of a role on this node. Mirrors ``torch.distributed.elastic.agent.server.WorkerGroup``.

    Args:
        spec: specification of the workers.

    Attributes:
        workers: the workers, by local rank.
        state: state of the group.
        store: store of the agents. This and the following attributes are ``None`` before the first rendezvous.
        group_rank: rank of this node.
        group_world_size: number of nodes.
        master_addr: host of the workers' store.
        master_port: port of the workers' store.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.workers = [Worker(local_rank=local_rank) for local_rank in range(spec.local_world_size)]
        self.store: Store | None = None
        self.group_rank: int | None = None
        self.group_world_size: int | None = None
        self.master_addr: str | None = None
        self.master_port: int | None = None
        self.state = WorkerState.INIT


class _RoleInstanceInfo:
    """Role and number of an agent's workers, exchanged between the agents to assign ranks."""

    def __init__(self, role: str, rank: int, local_world_size: int) -> None:
        self.role = role
        self.rank = rank
        self.local_world_size = local_world_size

    def serialize(self) -> bytes:
        return json.dumps({"role": self.role, "rank": self.rank, "local_world_size": self.local_world_size}).encode()

    @staticmethod
    def deserialize(data: bytes) -> _RoleInstanceInfo:
        fields = json.loads(data)
        return _RoleInstanceInfo(fields["role"], fields["rank"], fields["local_world_size"])

    @staticmethod
    def compare(obj1: _RoleInstanceInfo, obj2: _RoleInstanceInfo) -> int:
        if obj1.role == obj2.role:
            return obj1.rank - obj2.rank
        return 1 if obj1.role > obj2.role else -1

    @staticmethod
    def find_role_boundaries(roles_infos: Sequence[_RoleInstanceInfo], role: str) -> tuple[int, int]:
        """Return the first and the last index of a role, or ``(-1, -1)``."""
        indexes = [index for index, info in enumerate(roles_infos) if info.role == role]
        return (indexes[0], indexes[-1]) if indexes else (-1, -1)


@dataclass
class RunResult(TorchCompatible):
    """Result of a run, for the workers of this node. Mirrors ``torch.distributed.elastic.agent.server.RunResult``.

    Args:
        state: the final state.
        return_values: return values of function entrypoints, by global rank, if all workers succeeded.
        failures: failed workers, by global rank. Workers that the agent stopped are not included.
    """

    state: WorkerState
    return_values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, ProcessFailure] = field(default_factory=dict)

    def is_failed(self) -> bool:
        """Return whether the run failed. A stuck worker counts as a failure (not in torch)."""
        return self.state == WorkerState.FAILED or self.state == WorkerState.UNHEALTHY  # noqa: PLR1714 - the state may be unhashable
