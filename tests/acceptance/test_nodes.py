"""Jobs on two nodes: whatever happens to one, the other hears of it, and the training comes to its end with the right loss."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import FERRORUN, Job, Launcher
from tests.support.ports import free_port
from tests.support.two_nodes import (
    AGENT_KILLED,
    LINK,
    LINK_DOWN,
    WORKER_KILLED,
    Disturbance,
    NoNetworkError,
    Outcome,
    Training,
    ip,
    loss_of_undisturbed_training,
    network,
    on_loopback,
    on_network,
)
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("torch")

DEATHS = 2
PATIENCE_S = 60.0


def flags(port: int, nodes: str = "2", conf: str = "") -> tuple[str, ...]:
    options = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job", f"--nnodes={nodes}")
    return (*FERRORUN, *options, *((f"--rdzv-conf={conf}",) if conf else ()))


@pytest.fixture(scope="module")
def right_loss(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The loss of a training that nobody disturbs, of one process."""
    return loss_of_undisturbed_training(tmp_path_factory.mktemp("undisturbed"), DEATHS)


@pytest.mark.parametrize("disturbance", [*WORKER_KILLED, *AGENT_KILLED], ids=str)
def test_every_restart_comes_back(launch: Launcher, right_loss: float, disturbance: Disturbance) -> None:
    nodes = "1:2" if disturbance in AGENT_KILLED else "2"
    check(Training(launch, on_loopback(FERRORUN, nodes), disturbance, DEATHS, PATIENCE_S).run(), right_loss)


def check(outcome: Outcome, right_loss: float) -> None:
    assert (outcome.came_back, outcome.restarts) == (DEATHS, DEATHS), outcome
    assert outcome.codes == [0, 0]
    (result,) = outcome.results
    assert (result["loss"], result["size"]) == (pytest.approx(right_loss, rel=1e-4), 4)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_job_goes_on_without_an_agent_that_is_gone(launch: Launcher, how: signal.Signals) -> None:
    """Its peers wait for ever, outside of any operation: only an agent can tell them."""
    port = free_port()
    script = launch.write("wait.py", WAIT)
    conf = "last_call_timeout=1"
    host, other = (
        launch("--max-restarts=0", script, launcher=flags(port, "1:2", f"{conf},is_host={is_host}"))
        for is_host in (1, 0)
    )
    assert host.lines(2) == ["0 of 4", "1 of 4"]
    assert other.lines(2) == ["2 of 4", "3 of 4"]
    other.send(how)
    assert host.lines(2) == ["0 of 2", "1 of 2"], host.story
    assert other.end() in (128 + how, -how)
    host.send(signal.SIGINT)
    assert host.end() == 128 + signal.SIGINT


WAIT = """
import os, select
os.write(1, "{RANK} of {WORLD_SIZE}\\n".format(**os.environ).encode())  # at once: ranks share the pipe
select.select([], [], [])
"""


FAIL_WITH_PEER = """
import os, sys
rank, size, folder = os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["DIR"]
with open(folder + "/line", "w" if rank == "2" else "r") as line:
    os.write(1, f"{rank} of {size}\\n".encode())
    line.read() if rank != "2" else sys.stdin.read()
sys.exit(1)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_that_fail_with_their_peers_on_a_lost_node_use_up_no_restart(
    launch: Launcher, how: signal.Signals
) -> None:
    """Their agent may hear of it before the host knows that the node is gone."""
    port = free_port()
    script = launch.write("fail.py", FAIL_WITH_PEER)
    os.mkfifo(launch.folder / "line")
    conf = "last_call_timeout=1"
    stdin, open_end = os.pipe()
    try:
        host, other = (
            launch(*("--max-restarts=0", script), launcher=flags(port, "1:2", f"{conf},is_host={is_host}"), stdin=stdin)
            for is_host in (1, 0)
        )
        assert host.lines(2) == ["0 of 4", "1 of 4"]
        other.send(how)
        assert eventually(lambda: "will restart worker group" in host.errors, LONG_S), host.story
        with (launch.folder / "line").open("w"):  # for those of the next round
            assert host.lines(2) == ["0 of 2", "1 of 2"], host.story
            host.send(signal.SIGTERM)
            assert host.end() == 128 + signal.SIGTERM
        assert other.end() in (128 + how, -how)
    finally:
        os.close(stdin)
        os.close(open_end)


def test_a_node_that_comes_late_takes_part(launch: Launcher) -> None:
    port = free_port()
    script = launch.write("wait.py", WAIT)
    host = launch("--max-restarts=0", script, launcher=flags(port, "1:2", "last_call_timeout=1,is_host=1"))
    assert host.lines(2) == ["0 of 2", "1 of 2"]
    late = launch("--max-restarts=0", script, launcher=flags(port, "1:2", "is_host=0"))
    assert host.lines(2) == ["0 of 4", "1 of 4"]
    assert late.lines(2) == ["2 of 4", "3 of 4"]
    assert "joins; will restart worker group" in host.errors
    host.send(signal.SIGTERM)
    assert host.end() == 128 + signal.SIGTERM
    # The host is gone, and says so before.
    assert late.end() == 128 + signal.SIGTERM
    assert "it hosts the rendezvous, and left: its agent was ended by SIGTERM" in late.errors


def test_the_loss_of_the_host_ends_the_job_with_a_clear_cause(launch: Launcher) -> None:
    port = free_port()
    script = launch.write("wait.py", WAIT)
    host, other = (launch(script, launcher=flags(port, "2", f"is_host={is_host}")) for is_host in (1, 0))
    other.lines(2)
    host.send(signal.SIGKILL)
    assert other.end() == 1
    assert f"the agent that hosted the rendezvous at 127.0.0.1:{port} is gone" in other.errors
    host.end()


def test_the_last_failure_ends_the_job_on_all_nodes(launch: Launcher) -> None:
    port = free_port()
    script = launch.write(
        "fail.py", "import os, select, sys\nsys.exit(7) if os.environ['RANK'] == '3' else select.select([], [], [])"
    )
    host, other = (launch(script, launcher=flags(port, "2", f"is_host={is_host}")) for is_host in (1, 0))
    assert [other.end(), host.end()] == [7, 7]
    assert "exited with code 7 on 127.0.0.1, and no restart is left" in host.errors


def test_the_number_of_the_restart_is_the_same_on_all_nodes(launch: Launcher) -> None:
    """Ranks of both nodes fail in turn: to each agent it is its first failure."""
    # Whoever fails waits until the other one has spoken: it is stopped then, and may not have come so far.
    script = """
import os, select, sys
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
print(attempt, flush=True)
said = os.environ["DIR"] + "/said." + attempt
if attempt == "2":
    sys.exit(0)
if rank != attempt:
    open(said, "w").close()
    select.select([], [], [])
while not os.path.exists(said):
    select.select([], [], [], 0.01)
sys.exit(1)
"""
    port = free_port()
    path = launch.write("turns.py", script)
    agents = [launch("--max-restarts=2", path, launcher=flags(port), nproc=1) for _ in range(2)]
    assert [agent.end() for agent in agents] == [0, 0], [agent.story for agent in agents]
    assert [agent.output.decode().split() for agent in agents] == [["0", "1", "2"]] * 2


def test_a_spare_takes_over(launch: Launcher) -> None:
    port = free_port()
    script = launch.write("wait.py", WAIT)
    host, other = (launch(script, launcher=flags(port, "2", f"is_host={is_host}")) for is_host in (1, 0))
    other.lines(2)
    spare = launch(script, launcher=flags(port, "2", "is_host=0"))
    assert eventually(lambda: "waits as a spare" in host.errors, LONG_S), host.story
    other.send(signal.SIGKILL)
    assert spare.lines(2) == ["2 of 4", "3 of 4"], (host.story, spare.story)
    host.send(signal.SIGTERM)
    assert host.end() == 128 + signal.SIGTERM
    assert spare.end() == 128 + signal.SIGTERM
    other.end()


SAY = """
import os
os.write(1, "{RANK} {MASTER_ADDR} {MASTER_PORT}\\n".format(**os.environ).encode())
"""


def test_static_nodes_meet_by_their_ranks(launch: Launcher) -> None:
    port = free_port()
    script = launch.write("say.py", SAY)
    address = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}")
    agents = [launch(f"--node-rank={rank}", script, launcher=(*FERRORUN, *address)) for rank in (1, 0)]
    assert [agent.end() for agent in agents] == [0, 0], [agent.story for agent in agents]
    said = [sorted(agent.output.decode().splitlines()) for agent in agents]
    assert said == [[f"{rank} 127.0.0.1 {port}" for rank in ranks] for ranks in ((2, 3), (0, 1))]


CONNECT = """
import os, socket
with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))) as worker:
    os.write(1, f"{worker.getpeername()[0]}\\n".encode())
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_workers_reach_their_store_at_the_given_address(launch: Launcher, address: str) -> None:
    job = launch(f"--local-addr={address}", launch.write("connect.py", CONNECT), nproc=1)
    assert job.end() == 0, job.story
    assert job.output.decode().strip() == {"localhost": "127.0.0.1"}.get(address, address)


LEAVE_WORD = """
import os, sys
from ferroelastic._rust import StoreClient
store = StoreClient(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 60)
store.set(b"/remote_error", (0).to_bytes(4, "little"))
{then}
"""


def test_a_worker_that_leaves_a_note_of_an_error_and_exits_has_failed_with_its_own_code(launch: Launcher) -> None:
    job = launch(launch.write("word.py", LEAVE_WORD.format(then="sys.exit(7)")), nproc=1)
    assert job.end() == 7, job.story


def test_a_worker_that_leaves_a_note_of_an_error_and_stays_is_stopped(launch: Launcher) -> None:
    job = launch(launch.write("word.py", LEAVE_WORD.format(then="import select; select.select([], [], [])")), nproc=1)
    assert job.end() == 1, job.story
    assert "rank 0 wrote /remote_error to the store, and no restart is left" in job.errors


@pytest.mark.parametrize("hosting", ["torchrun", "ferrorun"])
@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_agents_of_torchrun_and_ferrorun_do_not_mix_and_say_so(launch: Launcher, hosting: str, backend: str) -> None:
    port = free_port()
    torchrun = (sys.executable, "-m", "torch.distributed.run")
    sides = {"torchrun": torchrun, "ferrorun": FERRORUN}
    script = launch.write("wait.py", WAIT)

    def start(side: str, *, is_host: bool) -> Job:
        if backend == "static":
            rank = 0 if is_host else 1
            options: tuple[str, ...] = ("--master-addr=127.0.0.1", f"--master-port={port}", f"--node-rank={rank}")
        else:
            options = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job")
            options += (f"--rdzv-conf=is_host={int(is_host)}",)
        return launch(script, launcher=(*sides[side], "--nnodes=2", *options))

    joining = "ferrorun" if hosting == "torchrun" else "torchrun"
    host = start(hosting, is_host=True)
    guest = start(joining, is_host=False)
    assert guest.end() == 1, guest.story
    if joining == "ferrorun":
        assert "is a TCPStore of torch, started by torchrun" in guest.errors
    else:
        if backend == "c10d":
            assert "this endpoint is served by ferrorun, which torchrun cannot join" in guest.errors
        else:
            assert "DistNetworkError" in guest.errors
        assert eventually(lambda: "an agent of torchrun from 127.0.0.1 tried to join" in host.errors, LONG_S), (
            host.story
        )
    host.send(signal.SIGTERM)
    host.end()


# ---- over a network


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    try:
        with network() as names:
            yield names
    except NoNetworkError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("disturbance", [WORKER_KILLED[0], LINK_DOWN[0], LINK_DOWN[1]], ids=str)
def test_nodes_on_a_network_come_back(
    launch: Launcher, namespaces: tuple[str, str], right_loss: float, disturbance: Disturbance
) -> None:
    nodes = "1:2" if disturbance in LINK_DOWN else "2"
    commands = on_network(FERRORUN, namespaces, nodes, "last_call_timeout=1,heartbeat_timeout=2")
    check(Training(launch, commands, disturbance, DEATHS, PATIENCE_S).run(namespaces), right_loss)


def test_a_node_whose_link_is_down_is_lost_and_comes_back_with_its_link(
    launch: Launcher, namespaces: tuple[str, str]
) -> None:
    script = launch.write("wait.py", WAIT)
    near, far = (
        launch("--max-restarts=0", script, launcher=launcher)
        for launcher in on_network(FERRORUN, namespaces, "1:2", "last_call_timeout=1,heartbeat_timeout=2")
    )
    assert near.lines(2) == ["0 of 4", "1 of 4"]
    far.lines(2)
    ip("-n", namespaces[1], "link", "set", LINK, "down")
    assert near.lines(2) == ["0 of 2", "1 of 2"], near.story
    assert "was lost: it was silent for 2.0 s" in near.errors
    assert eventually(
        lambda: "the host of the rendezvous at 10.83.0.1:29400 has not answered for too long" in far.errors, LONG_S
    ), far.story
    ip("-n", namespaces[1], "link", "set", LINK, "up")
    assert near.lines(2) == ["0 of 4", "1 of 4"], near.story
    assert far.lines(2) == ["2 of 4", "3 of 4"], far.story
    near.send(signal.SIGTERM)
    assert near.end() == 128 + signal.SIGTERM
    assert far.end() == 128 + signal.SIGTERM
