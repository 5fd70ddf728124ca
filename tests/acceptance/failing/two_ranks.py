"""A training in which rank 1 fails, and rank 0 fails for that reason within a millisecond."""

import os
import select
import signal
import time
from pathlib import Path

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a stop by the agent does not hide the second failure
pid, ready = (Path(os.environ["DIR"], name) for name in ("pid", "ready"))


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    while not path.exists():
        time.sleep(0.001)


if os.environ["RANK"] == "1":
    pid.with_name("pid~").write_text(str(os.getpid()))
    pid.with_name("pid~").rename(pid)
    wait_for(ready)
    os.write(2, b"RuntimeError: the ring is corrupt\n")
    os._exit(11)
wait_for(pid)
watched = select.poll()
watched.register(os.pidfd_open(int(pid.read_text())), select.POLLIN)
ready.touch()
watched.poll()
os.write(2, b"RuntimeError: rank 1 has closed the ring\n")
os._exit(12)
