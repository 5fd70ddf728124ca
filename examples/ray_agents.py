"""One agent per node of a Ray cluster: a training that Ray places and ferrorun starts.

Ray places one actor on each of ``--nodes`` nodes. Each actor runs one ferrorun, which starts the workers of its node. The actor on the
first bundle hosts the rendezvous. Run it on a machine of the cluster with

    python examples/ray_agents.py --nodes 2 --gpus 8 -- --nproc-per-node=8 --max-restarts=3 train.py

All arguments after ``--`` are those of ferrorun. The exit code is the one of the job. Ctrl-C and SIGTERM end the job: the actors forward
SIGTERM to ferrorun, so that workers have the grace period to save a checkpoint. ``ray.cancel`` cannot do that, because it does not reach
a call that waits for a process.
"""

import argparse
import signal
import socket
import subprocess
import sys
import uuid

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote
class Agent:
    """Runs ferrorun on one node."""

    def __init__(self) -> None:
        self._launcher: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def endpoint(self) -> str:
        """Return the address of this node with a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, arguments: list[str]) -> int:
        """Run ferrorun to its end, and return its exit code."""
        if self._is_stopped:
            return 128 + signal.SIGTERM
        self._launcher = subprocess.Popen([sys.executable, "-m", "ferroelastic.run", *arguments])  # noqa: S603
        if self._is_stopped:  # between the two lines above
            self._launcher.terminate()
        code = self._launcher.wait()
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Send SIGTERM to ferrorun. It stops the workers."""
        self._is_stopped = True
        if self._launcher is not None:
            self._launcher.terminate()


def run_agents(nodes: int, cpus: float, gpus: float, arguments: list[str]) -> int:
    """Run one agent per node, and return the exit code of the job."""
    bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
    try:
        ray.get(group.ready())
        agents = [
            Agent.options(
                num_cpus=cpus,
                num_gpus=gpus,
                max_concurrency=2,  # stop() is called while run() waits
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            ).remote()
            for number in range(nodes)
        ]
        rendezvous = [
            f"--nnodes={nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={ray.get(agents[0].endpoint.remote())}",
            f"--rdzv-id={uuid.uuid4().hex}",
        ]
        runs = [
            agent.run.remote([*rendezvous, f"--rdzv-conf=is_host={int(number == 0)}", *arguments])
            for number, agent in enumerate(agents)
        ]
        try:
            codes = ray.get(runs)
        except KeyboardInterrupt:
            ray.get([agent.stop.remote() for agent in agents])
            codes = ray.get(runs)
        return next((code for code in codes if code), 0)
    finally:
        remove_placement_group(group)


def main() -> None:
    """Parse the arguments and run the job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes, with one agent each")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs that Ray reserves on each node")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs that Ray reserves on each node")
    parser.add_argument("arguments", nargs="+", help="arguments of ferrorun, after --")
    args = parser.parse_args()
    ray.init()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run_agents(args.nodes, args.cpus, args.gpus, args.arguments))


if __name__ == "__main__":
    main()
