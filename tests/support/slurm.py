"""A Slurm cluster on this machine: one controller and several nodes, on loopback, in a temporary folder."""

from __future__ import annotations

import functools
import json
import os
import pwd
import random
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import ROOT
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.harness import Launcher

SLURM = ROOT / "target" / "slurm"
REQUIRED_ENV = "FERROELASTIC_TEST_SLURM"
"""``require``: a test without Slurm fails. Otherwise it is skipped."""
NODES = ("n1", "n2", "n3", "n4", "n5", "n6")
_GUARD = Path(__file__).with_name("slurm_guard.py")
_NODE_ENV = "FERRO_TEST_NODE"
_WITH_HOSTS = 'mount --bind "$0" /etc/hosts && exec "$@"'

# No munge: the daemons and clients of one user trust each other. All ports are on loopback.
_CONFIGURATION = """
ClusterName=ferroelastic
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
PluginDir={libraries}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdTimeout=5
ReturnToService=2
KillWait={kill_wait_s}
NodeName={nodes} NodeAddr=127.0.0.1 Port={ports} CPUs=64 State=UNKNOWN
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""
KILL_WAIT_S = 10


class NoSlurmError(Exception):
    """Slurm cannot run here."""


class Cluster:
    """A running cluster.

    Args:
        folder: an empty folder for its files.

    Raises:
        NoSlurmError: a program, a package or a permission is missing.
    """

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0:
            raise NoSlurmError("only root can mount a file with the names of the nodes")
        self.folder = folder
        root = _unpacked()
        self._programs = root / "usr"
        (libraries,) = self._programs.glob("lib/*/slurm*")
        self.environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "LD_LIBRARY_PATH": f"{libraries.parent}:{libraries}",
            "PATH": f"{Path(sys.executable).parent}:{root / 'usr/bin'}:{os.environ['PATH']}",
        }
        """What clients need, and jobs inherit from clients."""
        with ExitStack() as probes:
            ports = [probes.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(7)]
        configuration = _CONFIGURATION.format(
            controller_port=ports[0],
            first_job=random.randrange(1, 9000),
            ports=",".join(map(str, ports[1:])),
            nodes=",".join(NODES),
            user=pwd.getpwuid(os.geteuid()).pw_name,
            libraries=libraries,
            folder=folder,
            kill_wait_s=KILL_WAIT_S,
        )
        (folder / "slurm.conf").write_text(configuration)
        (folder / "state").mkdir()
        hosts = folder / "hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {node}\n" for node in NODES))
        self._log = (folder / "log").open("ab")
        self._guard = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", _WITH_HOSTS, str(hosts), sys.executable, "-S", "-E", str(_GUARD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **self.environment},
            text=True,
        )
        try:
            self._start(self._program("slurmctld"), "-D")
            for node in NODES:
                self._start_node(node)
            self._wait_for_idle()
        except BaseException:
            self.close()
            raise

    def run(self, *command: str, env: dict[str, str] | None = None) -> str:
        """Run a client, such as ``scontrol``, to its end; its output."""
        return subprocess.run(
            command,
            env={**os.environ, **self.environment, **(env or {})},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=LONG_S,
        ).stdout

    def job_id(self, name: str) -> str:
        """Wait for a job of this name to run; its number."""
        assert eventually(lambda: bool(self._running(name)), LONG_S), self.run("squeue")
        return self._running(name)

    def end_time_limit(self, job_id: str) -> None:
        """Move the end of the job's time limit to now."""
        self.run("scontrol", "update", f"JobId={job_id}", "EndTime=now+1")

    def begin_at_once(self, job_id: str) -> None:
        """Wait until a job is requeued, and let it begin. Slurm waits for two minutes otherwise."""
        waiting = ("squeue", "--noheader", "--format=%i", f"--jobs={job_id}", "--states=PENDING")
        assert eventually(lambda: bool(self.run(*waiting).strip()), LONG_S), self.run("squeue")
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def lose(self, node: str) -> None:
        """Kill all processes of a node, as a loss of power does."""
        found = self._processes(node)
        # None may live to report the end of another one.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def mark_down(self, node: str) -> None:
        """Tell the controller that a node is lost, which it would notice by itself after half a minute."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def bring_back(self, node: str) -> None:
        """Start a lost node again."""
        assert eventually(lambda: not self._processes(node), LONG_S)
        self._start_node(node)
        self._wait_for_idle()

    def close(self) -> None:
        """End the cluster with all of its jobs."""
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        with suppress(BrokenPipeError):  # unshare has failed
            self._guard.stdin.close()
        self._guard.wait()
        self._guard.stdout.close()
        self._log.close()

    def _running(self, name: str) -> str:
        return self.run("squeue", "--noheader", "--format=%i", "--states=RUNNING", f"--name={name}").strip()

    def _program(self, name: str) -> str:
        (path,) = self._programs.glob(f"sbin/{name}*")
        return str(path)

    def _start_node(self, node: str) -> None:
        mark = ("env", f"{_NODE_ENV}={node}")
        self._start(*mark, self._program("slurmd"), "-D", "-N", node, "-d", self._program("slurmstepd"))

    def _start(self, *command: str) -> None:
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        with suppress(BrokenPipeError):
            self._guard.stdin.write(json.dumps(command) + "\n")
            self._guard.stdin.flush()
        if not self._guard.stdout.readline():
            raise NoSlurmError((self.folder / "log").read_text()[-1000:])

    def _wait_for_idle(self) -> None:
        def is_idle() -> bool:
            with suppress(subprocess.CalledProcessError):  # the controller does not answer yet
                return self.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES)
            return False

        if not eventually(is_idle, LONG_S):
            raise NoSlurmError(f"the nodes do not start: {(self.folder / 'log').read_text()[-3000:]}")

    def _processes(self, node: str) -> list[int]:
        """The daemons of a node, and the processes of its jobs."""
        marks = {f"{_NODE_ENV}={node}".encode(), f"SLURMD_NODENAME={node}".encode()}
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):  # it has ended, or is another user's
                if marks & set(Path(f"/proc/{name}/environ").read_bytes().split(b"\0")):
                    found.append(int(name))
        return found


class Batch:
    """A batch job. The command ``sbatch`` ends with the job, and the output of the job goes to a file."""

    def __init__(self, launch: Launcher, cluster: Cluster, script: str, *options: str, **env: str) -> None:
        number = len(launch.jobs)
        self._output = launch.folder / f"out.{number}"
        options = (f"--output={self._output}", "--open-mode=append", f"--chdir={launch.folder}", *options)
        path = launch.write(f"{number}.sbatch", script)
        self.job = launch.start("sbatch", "--wait", *options, path, env={**cluster.environment, **env})

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    @property
    def story(self) -> str:
        return f"{self.output[-3000:]}\n{self.job.story}"

    def wait_for(self, *lines: str) -> None:
        """Wait for lines of the output, in any order."""
        assert eventually(lambda: set(lines) <= set(self.output.splitlines()), LONG_S), self.story


@functools.cache
def _failure_to_unpack() -> str:
    """Unpack the packages. The reason if that fails, which later modules need not wait for; empty otherwise."""
    script = str(Path(__file__).with_name("unpack_slurm.sh"))
    # Less than the timeout of a test: without a mirror the tests are skipped.
    done = subprocess.run(["timeout", "150", script, str(SLURM)], check=False, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    return " | ".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode} of {script}"


def _unpacked() -> Path:
    """The folder of the unpacked packages."""
    failure = _failure_to_unpack()
    if failure:
        raise NoSlurmError(failure)
    return SLURM / "root"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for the tests of a module."""
    try:
        cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    except NoSlurmError as error:
        if os.environ.get(REQUIRED_ENV) == "require":
            raise
        pytest.skip(f"no Slurm: {error}")
    yield cluster
    cluster.close()
