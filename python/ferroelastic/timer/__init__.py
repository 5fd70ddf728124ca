"""Deadlines of workers for their own work: a worker that misses one is killed. Mirrors ``torch.distributed.elastic.timer``.

With ``TORCHELASTIC_ENABLE_FILE_TIMER=1`` the agent runs the watchdog for these deadlines. In a training script::

    from ferroelastic import timer

    timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
    with timer.expires(after=60):
        all_reduce(...)

or, for a loop with a heartbeat in every step::

    with timer.heartbeat("training step", timeout_s=60) as heart:
        for batch in batches:
            heart.beat()
            ...

Intended difference: torch has no :func:`heartbeat`. The submodules list the other differences.
"""

from ferroelastic.timer.api import TimerClient, TimerRequest, TimerServer, configure, expires
from ferroelastic.timer.file_based_local_timer import FileTimerClient, FileTimerRequest, FileTimerServer
from ferroelastic.timer.heartbeat import Heartbeat, heartbeat
from ferroelastic.timer.local_timer import LocalTimerClient, LocalTimerServer

__all__ = [
    "FileTimerClient",
    "FileTimerRequest",
    "FileTimerServer",
    "Heartbeat",
    "LocalTimerClient",
    "LocalTimerServer",
    "TimerClient",
    "TimerRequest",
    "TimerServer",
    "configure",
    "expires",
    "heartbeat",
]
