"""Deadlines that a worker sets itself, so that it is ended when it hangs; mirrors ``torch.distributed.elastic.timer``.

With ``TORCHELASTIC_ENABLE_FILE_TIMER=1`` the agent serves them. A training script says::

    from ferroelastic import timer

    timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
    with timer.expires(after=60):
        all_reduce(...)

or, for a loop that shows at every step that it is alive::

    with timer.heartbeat("training step", timeout_s=60) as heart:
        for batch in batches:
            heart.beat()
            ...

Intended difference: :func:`heartbeat`. Those of the mirrored names are in the modules below.
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
