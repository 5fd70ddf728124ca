"""Starts the daemons of a Slurm cluster, and ends everything that they have started when its standard input ends.

Each line of standard input is a command as a JSON list. The answer is one line. Slurm's daemons and the processes of its
jobs leave their process groups and sessions. This process is their subreaper, so all of them stay below it.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def descendants(pid: int) -> list[int]:
    """Return the process ids of all processes below one."""
    found = []
    with suppress(OSError):  # the process has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def reap(*_: object) -> None:
    """Collect all children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    """Serve until the end of standard input."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    for ending in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # a Ctrl-C ends the tests, which then end this process
        signal.signal(ending, lambda *_: None)
    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        subprocess.Popen(json.loads(line), stdin=subprocess.DEVNULL, start_new_session=True)
        print("started", flush=True)
    while found := descendants(os.getpid()):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
