"""A job on two nodes, whose agents may be of different kinds."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs, workers
from tests.conformance.implementations import OURS, TORCH, Implementation

if TYPE_CHECKING:
    from pathlib import Path


def run_node(kind: str, folder: Path, port: int) -> Any:
    """The agent of one node, on a thread of its own."""
    impl = Implementation(kind)
    params = impl.rendezvous.RendezvousParameters("c10d", f"localhost:{port}", "job", 2, 2, timeout=60)
    handler = impl("rendezvous.registry").get_rendezvous_handler(params)
    spec = stubs.spec(
        impl, handler, entrypoint=workers.write_environment, args=(str(folder),), local_world_size=2, max_restarts=0
    )
    module = impl("agent.server.local_elastic_agent")
    logs = impl.mp.DefaultLogsSpecs(str(folder / "logs"))
    agent = module.LocalElasticAgent(spec, logs, "spawn" if impl.is_torch else "fork", exit_barrier_timeout=60)
    try:
        result = agent.run()
    finally:
        handler.shutdown()
    assert not result.is_failed()
    return agent.get_worker_group().group_rank, result.return_values


@pytest.mark.uses_torch
@pytest.mark.parametrize("kinds", [(TORCH, TORCH), (OURS, OURS)], ids="-".join)
def test_agents_of_one_job(kinds: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = Implementation(TORCH)("utils.distributed").get_free_port()
    nodes = dict(stubs.call_in_threads(partial(run_node, kind, tmp_path, port) for kind in kinds))
    assert nodes == {0: {0: None, 1: None}, 1: {2: None, 3: None}}
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("?.json")}
    assert sorted(found) == ["0", "1", "2", "3"]
    names = ["GROUP_RANK", "LOCAL_RANK", "ROLE_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"]
    assert [[environment[name] for name in names] for _, environment in sorted(found.items())] == [
        [str(rank // 2), str(rank % 2), str(rank), "4", "2", "4"] for rank in range(4)
    ]
    masters = {(environment["MASTER_ADDR"], environment["MASTER_PORT"]) for environment in found.values()}
    assert len(masters) == 1
    assert "running on a child thread" in caplog.text
