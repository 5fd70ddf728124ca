"""Agents in forked children of a process that has used torch: ``python -m tests.acceptance.forked ours 50``.

Each child runs a job with a restart and two workers, and collects garbage all the time: what the child has inherited is destroyed at
moments of its own.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.utils.data import DataLoader, TensorDataset

SIDES = {"ours": "ferroelastic", "torch": "torch.distributed.elastic"}
PATIENCE_S = 60.0
SCRIPT = 'test "$TORCHELASTIC_RESTART_COUNT" = 1 || exit 9'


def use_torch() -> list[Any]:
    """Leave native objects with threads: stores, data loaders, thread pools."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(3)]
    clients[0].set("key", "value")
    loader = DataLoader(TensorDataset(torch.arange(8.0)), num_workers=1, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    product = torch.randn(300, 300, requires_grad=True) @ torch.randn(300, 300)
    product.sum().backward()  # type: ignore[no-untyped-call]  # torch's
    ended = [threading.Thread(target=time.sleep, args=(0,)) for _ in range(4)]
    for thread in ended:  # whose stacks are in glibc's cache
        thread.start()
        thread.join()
    cycle: list[Any] = [clients]
    cycle.append(cycle)
    return [server, cycle, loader, batches]


def run_job(package: str, seed: int) -> int:
    """Run one job with the agent of a package; 0 if all was as it should be."""
    signal.alarm(int(PATIENCE_S))  # a child that hangs ends by this
    chance = random.Random(seed)
    is_over = threading.Event()

    def collect() -> None:
        while not is_over.wait(chance.uniform(0, 0.01)):
            gc.collect()

    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    server = importlib.import_module(f"{package}.agent.server")
    local = importlib.import_module(f"{package}.agent.server.local_elastic_agent")
    rendezvous = importlib.import_module(f"{package}.rendezvous")
    registry = importlib.import_module(f"{package}.rendezvous.registry")
    multiprocessing = importlib.import_module(f"{package}.multiprocessing")
    params = rendezvous.RendezvousParameters("c10d", "localhost:0", f"job{seed}", 1, 1, is_host=True)
    spec = server.WorkerSpec(
        role="default",
        local_world_size=2,
        rdzv_handler=registry.get_rendezvous_handler(params),
        entrypoint="/bin/sh",
        args=("-c", SCRIPT),
        max_restarts=1,
        monitor_interval=0.05,
    )
    with tempfile.TemporaryDirectory() as folder:
        agent = local.LocalElasticAgent(spec, multiprocessing.DefaultLogsSpecs(log_dir=folder))
        result = agent.run()
    spec.rdzv_handler.shutdown()
    is_over.set()
    return int(result.is_failed())


def run_all(package: str, number: int) -> list[int]:
    """Exit statuses of as many children, one after the other."""
    statuses = []
    for seed in range(number):
        kept = use_torch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CPython warns of a fork with threads
            child = os.fork()
        if child == 0:
            code = 1
            try:
                del kept
                code = run_job(package, seed)
            finally:
                os._exit(code)
        statuses.append(os.waitpid(child, 0)[1])
        del kept
        gc.collect()
    return statuses


if __name__ == "__main__":
    Path("/proc/self/comm").write_text("forked")
    found = run_all(SIDES[sys.argv[1]], int(sys.argv[2]))
    print(f"{found.count(0)} of {len(found)} jobs as they should be; others {sorted(set(found) - {0})}")
    sys.exit(found.count(0) != len(found))
