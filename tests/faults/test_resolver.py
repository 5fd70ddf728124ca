"""A name server that does not answer holds up no failure, no restart, no stop and no end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.harness import FERRORUN, Launcher
from tests.support.waiting import LONG_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER = "127.0.0.77"
# Longer than any test waits: whoever asks and waits, fails.
OPTIONS = "options timeout:30 attempts:5\n"


@pytest.fixture
def deaf(launch: Launcher) -> Iterator[tuple[str, ...]]:
    """Prefix of commands that see a host whose name nobody knows, and a name server that never answers."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("takes root and unshare of util-linux")
    # A resolver asks at port 53 and at no other.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        try:
            server.bind((SERVER, 53))
        except OSError as error:
            pytest.skip(f"no name server can be had at {SERVER}: {error}")
        conf = launch.write("resolv.conf", f"nameserver {SERVER}\n{OPTIONS}")
        switch = launch.write("nsswitch.conf", "hosts: files dns\n")
        mounts = (
            f"mount --bind {conf} /etc/resolv.conf && mount --bind {switch} /etc/nsswitch.conf && hostname unknown-host"
        )
        prefix = (
            "unshare",
            "--mount",
            "--uts",
            "--",
            "/bin/sh",
            "-c",
            f'{mounts} && unset RES_OPTIONS && exec "$@"',
            "sh",
        )
        if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode != 0:
            pytest.skip("no mount namespace to be had")
        yield prefix


def test_a_failed_job_ends(launch: Launcher, deaf: tuple[str, ...]) -> None:
    script = launch.shell('test "$TORCHELASTIC_RESTART_COUNT" = 0 && exit 5; exit 3')
    job = launch.start(*deaf, *FERRORUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", *script)
    assert job.end() == 3, job.story
    assert "unknown-host" in job.errors


def test_a_job_ends_after_a_signal(launch: Launcher, deaf: tuple[str, ...]) -> None:
    job = launch.start(
        *deaf, *FERRORUN, "--standalone", "--nproc-per-node=2", *launch.shell("echo ready; exec sleep 1000")
    )
    job.lines(2)
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM, job.story


@pytest.mark.parametrize("conf", ["is_host=0", ""])
def test_a_node_that_looks_for_its_host_ends(launch: Launcher, deaf: tuple[str, ...], conf: str) -> None:
    options = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=nowhere.example:29400")
    confs = (f"--rdzv-conf={conf}",) if conf else ()
    job = launch.start(*deaf, *FERRORUN, *options, *confs, *launch.shell("exit 0"))
    # It asks: a thread waits for the name server.
    assert eventually(lambda: handles_signals(job.process.pid) and asks(job.process.pid), LONG_S), job.story
    job.send(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM, job.story


def handles_signals(pid: int) -> bool:
    with open(f"/proc/{pid}/status") as status:
        caught = next(line for line in status if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & (1 << (signal.SIGTERM - 1)))


def asks(pid: int) -> bool:
    """Whether a process has a socket for a name server."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has been closed since
            inodes.add(os.readlink(link))
    with open(f"/proc/{pid}/net/udp") as table:
        server = "4D00007F:0035"
        return any(f"socket:[{line.split()[9]}]" in inodes for line in table if server in line.split()[2])
