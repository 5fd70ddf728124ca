"""What the kernel tells about the end of a worker, from copies of its files."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from ferroelastic._failure import oom, sender
from ferroelastic._failure.collect import Observation
from ferroelastic._failure.core import find_core, signal_origin
from ferroelastic._failure.kmsg import KernelLog, oom_victims, xid_line
from ferroelastic._failure.model import Sender
from ferroelastic._failure.oom import OomKill

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "36 32 0:31 / /sys/fs/cgroup/memory rw,nosuid shared:17 - cgroup cgroup rw,memory\n"
CONTAINER_MOUNT = "36 32 0:31 /docker/abc /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory\n"


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))


def v2(root: Path, *, kills: int = 0, ooms: int = 0, limit: object = "max") -> oom.OomCounts:
    top = "sys/fs/cgroup"
    write(
        root,
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/7/cgroup": "0::/slice/job/step\n",
            f"{top}/cgroup.controllers": "memory",
            f"{top}/slice/memory.events": f"low 0\nhigh 0\nmax 0\noom {ooms}\noom_kill {kills}\n",
            f"{top}/slice/memory.max": "max\n",
            f"{top}/slice/job/memory.events": f"low 0\nhigh 0\nmax 0\noom {ooms}\noom_kill {kills}\n",
            f"{top}/slice/job/memory.max": f"{limit}\n",
            f"{top}/slice/job/memory.peak": 2 * GIB,
            f"{top}/slice/job/step/cgroup.procs": "7\n",
            "proc/vmstat": f"nr_free_pages 1\noom_kill {kills + 3}\n",
            "proc/meminfo": "MemTotal:        4194304 kB\nMemFree: 1 kB\n",
        },
    )
    return oom.count(oom.find_cgroup(7, str(root)), str(root))


def test_v2_a_limit_of_an_ancestor_was_reached(tmp_path: Path) -> None:
    before, after = v2(tmp_path), v2(tmp_path, kills=1, ooms=1, limit=2 * GIB)
    cgroup = oom.find_cgroup(7, str(tmp_path))
    assert cgroup is not None
    # The memory controller is not enabled in the folder of the step.
    assert cgroup.folder == f"{tmp_path}/sys/fs/cgroup/slice/job"
    kill = oom.kills_between(before, after, cgroup, str(tmp_path))
    assert kill == OomKill(1, "cgroup", 2 * GIB, 2 * GIB, is_of_workers=True)


def test_v2_the_host_was_out_of_memory(tmp_path: Path) -> None:
    before, after = v2(tmp_path, limit=2 * GIB), v2(tmp_path, kills=2, limit=2 * GIB)
    kill = oom.kills_between(before, after, oom.find_cgroup(7, str(tmp_path)), str(tmp_path))
    assert kill == OomKill(2, "host", 4 * GIB, None, is_of_workers=True)


def test_no_kill(tmp_path: Path) -> None:
    before = v2(tmp_path, kills=5, ooms=5)
    assert oom.kills_between(before, v2(tmp_path, kills=5, ooms=6), oom.find_cgroup(7, str(tmp_path))) is None


@pytest.mark.parametrize("mount", [V1_MOUNT, CONTAINER_MOUNT])
def test_v1(tmp_path: Path, mount: str) -> None:
    top = "sys/fs/cgroup/memory"
    folder = top if mount == CONTAINER_MOUNT else f"{top}/docker/abc"
    write(
        tmp_path,
        {
            "proc/self/mountinfo": V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified") + mount,
            "proc/7/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n",
            f"{top}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
            f"{top}/memory.limit_in_bytes": 9223372036854771712,
            f"{folder}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
            f"{folder}/memory.limit_in_bytes": GIB,
            f"{folder}/memory.max_usage_in_bytes": GIB - 4096,
        },
    )
    cgroup = oom.find_cgroup(7, str(tmp_path))
    before = oom.count(cgroup, str(tmp_path))
    write(tmp_path, {f"{folder}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"})
    kill = oom.kills_between(before, oom.count(cgroup, str(tmp_path)), cgroup, str(tmp_path))
    assert kill == OomKill(1, "cgroup", GIB, GIB - 4096, is_of_workers=True)


def test_v1_a_worker_that_was_killed_during_the_start(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory"

    def after_kills(number: int) -> tuple[oom.MemoryCgroup | None, oom.OomCounts]:
        write(
            tmp_path,
            {
                "proc/self/mountinfo": V1_MOUNT,
                "proc/self/cgroup": "4:memory:/job\n",
                "proc/7/cgroup": "4:memory:/\n",  # the kernel's text for a zombie
                f"{top}/memory.oom_control": "oom_kill 0\n",
                f"{top}/job/memory.oom_control": f"oom_kill {number}\n",
                f"{top}/job/memory.limit_in_bytes": GIB,
                f"{top}/job/memory.max_usage_in_bytes": GIB,
            },
        )
        cgroup = oom.find_cgroup("self", str(tmp_path))
        return cgroup, oom.count(cgroup, str(tmp_path))

    before = after_kills(2)
    after_kills(3)
    observation = Observation(str(tmp_path))
    observation.begin(7, before)
    assert observation.kills() == OomKill(1, "cgroup", GIB, GIB, is_of_workers=True)
    observation.close()


def test_without_a_cgroup_only_the_host_counts(tmp_path: Path) -> None:
    write(tmp_path, {"proc/vmstat": "oom_kill 1\n", "proc/meminfo": "MemTotal: 1024 kB\n"})
    before = oom.count(None, str(tmp_path))
    write(tmp_path, {"proc/vmstat": "oom_kill 2\n"})
    kill = oom.kills_between(before, oom.count(None, str(tmp_path)), None, str(tmp_path))
    assert kill == OomKill(1, "host", 1 << 20, None, is_of_workers=False)
    # Any process of the host may have been killed.
    assert sender.from_oom(kill, set(), 7, None, str(tmp_path)) is None
    assert sender.from_oom(kill, {7}, 7, 99, str(tmp_path)) == Sender(
        "oom_killer", scope="host", limit_bytes=1 << 20, peak_bytes=99
    )


def test_nothing_can_be_read(tmp_path: Path) -> None:
    assert oom.find_cgroup("self", str(tmp_path)) is None
    assert oom.count(None, str(tmp_path)) == oom.OomCounts()
    assert oom.kills_between(oom.OomCounts(), oom.OomCounts(), None, str(tmp_path)) is None


def test_this_process_has_a_cgroup_or_none() -> None:
    cgroup = oom.find_cgroup()
    counts = oom.count(cgroup)
    assert cgroup is None or counts.cgroup is not None


def test_another_process_was_killed(tmp_path: Path) -> None:
    kill = OomKill(1, "cgroup", GIB, GIB, is_of_workers=True)
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    namespace = tmp_path / "proc/self/ns/pid"
    namespace.symlink_to("pid:[4026531836]")
    assert sender.from_oom(kill, {8}, 7, None, str(tmp_path)) is None
    namespace.unlink()
    # Inside of a container the kernel log has other pids.
    namespace.symlink_to("pid:[4026532999]")
    assert sender.from_oom(kill, {8}, 7, None, str(tmp_path)) == Sender(
        "oom_killer", scope="cgroup", limit_bytes=GIB, peak_bytes=GIB
    )


def test_lines_of_the_kernel_log() -> None:
    lines = [
        "usb 1-1: new device",
        "NVRM: Xid (PCI:0000:65:00): 31, pid=99, name=python, Ch 00000008, MMU Fault",
        "NVRM: Xid (PCI:0000:65:00): 79, pid='7', name=python, GPU has fallen off the bus.",
        "Memory cgroup out of memory: Killed process 7 (python) total-vm:1kB, anon-rss:1kB",
        "Out of memory: Killed process 12 (stress) total-vm:1kB",
        "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),task=python,pid=7,uid=0",
    ]
    assert xid_line(lines, 7) == lines[2]
    assert xid_line(lines, 5) is None
    assert xid_line(["NVRM: Xid (PCI:0000:65:00): 43, Ch 00000010"], 5) == "NVRM: Xid (PCI:0000:65:00): 43, Ch 00000010"
    assert oom_victims(lines) == {7, 12}


def test_the_kernel_log_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.write_bytes(b"6,1,5,-;old\n")
    log = KernelLog(str(path))
    with path.open("ab") as file:
        file.write(b"4,2,9,-;\x1b[2Jnew line\n SUBSYSTEM=pci\n")
    assert log.lines() == ["new line"]
    assert log.lines() == []
    log.close()
    log.close()
    assert log.lines() == []
    assert KernelLog(str(tmp_path / "absent")).lines() == []


def test_the_log_of_this_kernel_does_not_block() -> None:
    log = KernelLog()
    assert isinstance(log.lines(), list)
    log.close()


# ---- cores


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("core", "core.7"), ("core-%e-%p-%t", "core-python3-7-1700000000"), ("%%x.%p", "%x.7"), ("%c.%P.%s", "0.55.11")],
)
def test_a_core_is_found(tmp_path: Path, pattern: str, name: str) -> None:
    write(tmp_path, {"proc/sys/kernel/core_pattern": pattern + "\n", "proc/sys/kernel/core_uses_pid": "1\n"})
    work = tmp_path / "work"
    work.mkdir()
    (work / name).write_bytes(b"core")
    (work / "core.8").write_bytes(b"another")
    died_at_s = os.stat(work / name).st_mtime
    found = find_core(7, died_at_s, str(work), str(tmp_path))
    assert (found.text, found.path) == (f"{work}/{name}", f"{work}/{name}")
    # A file of long ago.
    found = find_core(7, died_at_s + 1000, str(work), str(tmp_path))
    assert (found.text, found.path) == (
        f"not found; kernel.core_pattern is {pattern + ('' if '%p' in pattern.lower() else '.%p')!r}",
        None,
    )


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("|/usr/lib/systemd/systemd-coredump %P %u", "in the journal of systemd: coredumpctl info 7"),
        ("|/usr/share/apport/apport -p%p", "given to /usr/share/apport/apport (kernel.core_pattern)"),
        ("|", "given to a program (kernel.core_pattern)"),
        ("@@/run/cores.socket", "sent to the socket /run/cores.socket (kernel.core_pattern)"),
        ("/cores/%h/%p", "not found; kernel.core_pattern is '/cores/%h/%p'"),
    ],
)
def test_a_core_that_is_elsewhere(tmp_path: Path, pattern: str, text: str) -> None:
    write(tmp_path, {"proc/sys/kernel/core_pattern": pattern + "\n"})
    assert find_core(7, 0, str(tmp_path), str(tmp_path)).text == text


def core_file(code: int, pid: int, uid: int) -> bytes:
    """A core with one segment of notes, of which the second one is the signal."""
    prstatus = struct.pack("<III", 5, 4, 1) + b"CORE\0\0\0\0" + b"\1\2\3\4"
    siginfo = struct.pack("<iii", 11, 0, code).ljust(16, b"\0") + struct.pack("<iI", pid, uid)
    notes = prstatus + struct.pack("<III", 5, 128, 0x53494749) + b"CORE\0\0\0\0" + siginfo.ljust(128, b"\0")
    header = (
        b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<Q", 64) + b"\0" * 14 + struct.pack("<HHHHH", 56, 1, 0, 0, 0)
    )
    segment = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(notes), 0, 0)
    return header[:64] + segment + notes


def test_the_sender_that_a_core_records(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(core_file(0, os.getpid(), 1000))
    origin = signal_origin(str(path))
    assert origin == (os.getpid(), 1000)
    found = sender.from_core(origin, 7)
    assert found is not None
    assert (found.kind, found.pid) == ("process", os.getpid())
    assert found.name
    assert sender.from_core((7, 0), 7) is None  # abort() of the worker itself
    assert sender.from_core((2**22 + 1, 1000), 7) == Sender("process", pid=2**22 + 1, name="a process of uid 1000")


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"no core at all" * 100, core_file(1, 0, 0), core_file(0, 1, 1)[:150]]
)
def test_a_core_without_a_sender(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "core"
    path.write_bytes(content)
    assert signal_origin(str(path)) is None


def test_the_sender_in_the_trace_of_the_kernel(tmp_path: Path) -> None:
    folder = "sys/kernel/tracing"
    trace = """# tracer: nop
            bash-4711    [001] d..1.  123.456789: signal_generate: sig=15 errno=0 code=0 comm=python pid=7 grp=1 res=0
     kill me now-4712    [001] d..1.  123.456789: signal_generate: sig=9 errno=0 code=0 comm=python pid=7 grp=1 res=0
            bash-4713    [001] d..1.  123.456789: signal_generate: sig=9 errno=0 code=0 comm=python pid=8 grp=1 res=0
"""
    write(tmp_path, {f"{folder}/events/signal/signal_generate/enable": "1\n", f"{folder}/trace": trace})
    assert sender.from_trace(7, 9, str(tmp_path)) == Sender("process", pid=4712, name="kill me now")
    assert sender.from_trace(7, 2, str(tmp_path)) is None
    write(tmp_path, {f"{folder}/events/signal/signal_generate/enable": "0\n"})
    assert sender.from_trace(7, 9, str(tmp_path)) is None
