"""Mirror of ``torch.distributed.elastic.agent.server``: the process on each node that starts and supervises workers.

Intended difference: this package exports all public names of its modules. torch's exports some of them.
"""

from ferroelastic.agent.server._policy import NO_RESTART_EXIT_CODE, FailedRound, RestartPolicy, RestartSettings
from ferroelastic.agent.server.api import (
    ElasticAgent,
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from ferroelastic.agent.server.health_check_server import HealthCheckServer, create_healthcheck_server
from ferroelastic.agent.server.local_elastic_agent import (
    TORCHELASTIC_ENABLE_FILE_TIMER,
    TORCHELASTIC_HEALTH_CHECK_PORT,
    TORCHELASTIC_TIMER_FILE,
    TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT,
    LocalElasticAgent,
)

__all__ = [
    "NO_RESTART_EXIT_CODE",
    "TORCHELASTIC_ENABLE_FILE_TIMER",
    "TORCHELASTIC_HEALTH_CHECK_PORT",
    "TORCHELASTIC_TIMER_FILE",
    "TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT",
    "ElasticAgent",
    "FailedRound",
    "HealthCheckServer",
    "LocalElasticAgent",
    "RestartPolicy",
    "RestartSettings",
    "RunResult",
    "SimpleElasticAgent",
    "Worker",
    "WorkerGroup",
    "WorkerSpec",
    "WorkerState",
    "create_healthcheck_server",
]
