"""The native module: one supervision thread spawns workers, detects their exits, stops them and tails their logs.

This stub is the manual of the module. The module makes no policy decisions: the Python layer decides what to start, stop and restart.
The engine thread never takes the GIL. Exits are detected, deadlines are enforced and logs are copied while Python is busy.
Every blocking call detaches from the interpreter.

Conventions:

* ``index`` is the position of a process in its group (the agent's local rank).
* Names ending in ``_ns`` are nanoseconds, names ending in ``_s`` are seconds as ``float``. ``inf`` means no limit.
* An object belongs to the process that created it. In a forked child every method raises :class:`ForkedError`, unless its class says
  otherwise, and dropping the object only closes its descriptors.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Literal, final

from ferroelastic._stop_notice import SignalTarget, StopReason

__all__ = [
    "BeatSlot",
    "Cause",
    "Command",
    "Console",
    "Decision",
    "Engine",
    "Exit",
    "Expiry",
    "FailureFacts",
    "ForkedError",
    "Group",
    "Guard",
    "HealthServer",
    "Leftover",
    "LogFailure",
    "LogRotation",
    "LogRules",
    "LogScan",
    "Membership",
    "Place",
    "Relay",
    "RelayReport",
    "RendezvousClient",
    "RestartPolicy",
    "SpawnError",
    "StopFile",
    "StopReport",
    "StoreClient",
    "StoreServer",
    "StoreTimeoutError",
    "Survivor",
    "Tail",
    "TailReport",
    "WarmPool",
    "WarmState",
    "Watchdog",
    "WatchdogCounts",
    "WorkerEnd",
    "Zygote",
    "__version__",
    "arm_parent_death_signal",
    "create_cgroup",
    "find_detached",
    "printable",
    "remove_cgroup",
    "stand_guard",
    "thread_stack_bytes",
]

__version__: str

class ForkedError(RuntimeError):
    """A native object was used in a process other than the one that created it (after ``os.fork``)."""

class SpawnError(OSError):
    """A process could not be started. ``errno`` and ``strerror`` are the kernel's; ``str()`` names stage, index and path.

    If one command of a group fails to start, the processes already started are killed and reaped before this is raised.
    """

    index: int
    """Position of the failing command in the list given to :meth:`Engine.spawn`."""
    stage: str
    """The step that failed: ``"execve"``, ``"open stdout"``, ``"open stderr"``, ``"chdir"``, ``"sched_setaffinity"``, ``"clone"`` …"""

@final
class Command:
    """How to start one process. Immutable. Mirrors the arguments of ``subprocess.Popen`` that an agent needs.

    Args:
        argv: program and arguments. A program without ``/`` is looked up in ``PATH`` of ``env``.
        env: the complete environment of the process (nothing is inherited).
        stdout: path of the file for standard output, created or truncated, or an end of a relay. ``None`` inherits the agent's standard
            output.
        stderr: same for standard error.
        cwd: working directory. ``None`` inherits the agent's.
        cpus: logical CPUs the process may run on (``sched_setaffinity(2)``, set before exec). ``None`` inherits the agent's.
        open_files: soft limit of open descriptors (``RLIMIT_NOFILE``), capped at the hard limit. ``None`` inherits the agent's.

    Raises:
        ValueError: ``argv`` is empty, a string contains a NUL byte, or ``cpus`` is empty.
    """

    def __new__(
        cls,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        stdout: str | WorkerEnd | None = None,
        stderr: str | WorkerEnd | None = None,
        cwd: str | None = None,
        cpus: Sequence[int] | None = None,
        open_files: int | None = None,
    ) -> Command: ...

@final
class Exit:
    """How one process ended, from the kernel's accounting (``waitid(2)`` with ``rusage``)."""

    index: int
    pid: int
    order: int
    """Position of this exit among the exits of the group: 0 is the first exit that the kernel reported."""
    code: int | None
    """Exit code 0 to 255. ``None`` if a signal ended the process or this process does not know the status."""
    signal: int | None
    """Number of the signal that ended the process, else ``None``."""
    core_dumped: bool
    returncode: int | None
    """As ``subprocess.Popen.returncode``: the code, or minus the signal. ``None`` if another owner reaped the process."""
    stopped: bool
    """Whether the agent stopped the process: the exit was detected after :meth:`Group.stop` had signalled it.
    False if SIGKILL ended the process and the stop had not sent SIGKILL."""
    monotonic_ns: int
    """``CLOCK_MONOTONIC`` when the exit was detected."""
    realtime_ns: int
    """``CLOCK_REALTIME`` when the exit was detected (nanoseconds since the epoch)."""
    user_time_s: float
    system_time_s: float
    max_rss_bytes: int
    """Peak resident memory of the process and of the children it reaped. Never below the agent's resident memory at
    the spawn: until exec the worker shares the agent's memory, and the kernel counts it."""

@final
class Survivor:
    """A process that still existed when the last deadline of a stop passed."""

    index: int
    """Index of the worker whose process group it belongs to."""
    pid: int
    state: str
    """State letter of ``/proc/PID/stat``, e.g. ``"D"``."""
    wait_channel: str
    """``/proc/PID/wchan``, or ``""`` if it cannot be read."""

@final
class Leftover:
    """A process of a worker's group that was signalled because it had not finished within ``linger_s`` of :meth:`Group.stop`."""

    index: int
    """Index of the worker whose process group it belongs to."""
    pid: int
    """Process id."""
    command: str
    """Its command line, or its name if the command line is empty."""

@final
class StopReport:
    """Outcome of a finished stop."""

    signalled_ns: int
    """``CLOCK_MONOTONIC`` just before the first signal was sent."""
    elapsed_s: float
    """From the first signal until every process group was verified empty, or the last deadline passed."""
    killed: list[int]
    """Indexes of the workers whose process group got SIGKILL because it did not end within the grace period."""
    overdue: list[Leftover]
    """Processes that had not finished within ``linger_s``, recorded when they were signalled."""
    survivors: list[Survivor]
    """Processes that SIGKILL did not end. Empty if every process group was verified empty."""

@final
class StopFile:
    """A file in memory in which the processes of a group read the deadline of their stop. Empty before a stop.

    Before a signal is sent, the engine appends one line of JSON: ``version`` (1), ``reason``, ``signal`` (a number), ``deadline_s`` (wall
    clock, seconds since the epoch) and ``deadline_monotonic_ns`` (``CLOCK_MONOTONIC``). The deadline is the time of SIGKILL, ``null`` if
    none is planned. A deadline that moves is another line; the last line counts.

    Other processes cannot delete or shorten the file. It disappears with this object and the groups that use it.

    Raises:
        OSError: the kernel refuses ``memfd_create(2)``.
    """

    path: str
    """An entry of ``/proc/PID/fd``, for processes of this user in this PID namespace."""
    def __new__(cls) -> StopFile: ...

@final
class Group:
    """Processes that were started together, each the leader of its own session and process group.

    Dropping the object stops no process. The engine reaps the processes when they end.
    """

    pids: list[int]
    """Process ids by index."""
    warm: list[int]
    """Indices of the processes that were parked in a :class:`WarmPool`, ascending."""
    generation: int
    """Event counter of the group: it increases with every exit and when a stop finishes."""
    def scan_logs(self, files: Sequence[tuple[str, int, str]], rules: LogRules) -> LogScan:
        """Search growing files for lines that match ``rules``.

        A worker that fails gets SIGKILL if it runs. If it has ended with success, the stop of :meth:`stop_on_failure` starts. During a
        stop, a line fails no further worker. A warning is in :meth:`Engine.take_warnings`, at most one per minute and rule.

        Args:
            files: path, index of the worker, and a description of the stream for messages. Missing files are created.
            rules: the rules.

        Raises:
            TimeoutError: the disk of a file has not responded for 10 s.
        """

    def log_failures(self) -> list[LogFailure]:
        """Return the workers that have failed because of a line in their log, at most one failure of each worker."""

    def exits(self, since: int = 0) -> list[Exit]:
        """Return the exits in the order in which the kernel reported them, without the first ``since``."""

    def wait(
        self,
        generation: int,
        timeout_s: float | None = None,
        wake_fd: int | None = None,
        news_fd: int | None = None,
    ) -> Literal["event", "timeout", "wake", "news"]:
        """Block, detached from the interpreter, until ``self.generation > generation``.

        Args:
            generation: the last value of :attr:`generation` that the caller has handled. Returns at once if it is outdated.
            timeout_s: timeout in seconds. ``None`` or ``inf`` waits without limit, 0 only polls.
            wake_fd: also return when this descriptor is readable (it is not read). Pass the read end of a
                ``signal.set_wakeup_fd`` pipe to run Python signal handlers at once.
            news_fd: same for a second source of events: :attr:`RendezvousClient.alarm_fd`.

        Returns:
            ``"event"``, ``"timeout"``, ``"wake"`` or ``"news"``.

        Raises:
            RuntimeError: the engine has failed or was closed.
        """

    def signal(self, index: int, signal: int, *, leader_only: bool = False) -> bool:
        """Send ``signal`` to the process group of one worker (or to its leader alone). ``False`` if no process received it."""

    def stop(
        self,
        signal: int,
        grace_s: float,
        kill_wait_s: float,
        *,
        linger_s: float = 0.0,
        target: SignalTarget = "group",
        reason: StopReason = "shutdown",
    ) -> None:
        """Start to stop all processes of the group in parallel, under one deadline. Returns at once.

        Each process group gets ``signal`` first. Stopped processes then get SIGCONT. After ``grace_s`` the group gets SIGKILL, even if its
        leader is already dead. SIGKILL goes to the leader first and to the rest of the group 100 ms later, so helpers that clean up after
        the leader (Python's resource tracker) see its exit. The stop is finished when every group is verified empty, or ``kill_wait_s``
        after the first SIGKILL. Wait with :meth:`wait`, then read :meth:`stop_report`. A second call does not change a stop.

        Args:
            signal: signal that asks the processes to end. SIGKILL has no grace period.
            grace_s: grace period: seconds from ``signal`` to SIGKILL.
            kill_wait_s: seconds from SIGKILL to giving up on processes that the kernel does not end.
            linger_s: seconds before ``signal`` is sent, in which the child processes of successful workers may finish.
            target: ``"group"`` sends ``signal`` to each process group. ``"leader"`` sends it to each worker alone; when the worker has
                ended, the rest of its group gets SIGTERM. The deadline and SIGKILL are the same.
            reason: ``"signal"``, ``"failure"``, ``"membership"``, ``"success"`` or ``"shutdown"``. Workers read it in the stop file.

        Raises:
            ValueError: ``target`` or ``reason`` has another value, or a time is negative or not a number.
        """

    def stop_on_failure(
        self, signal: int, grace_s: float, kill_wait_s: float, *, target: SignalTarget = "group"
    ) -> None:
        """Let the engine call ``stop`` with these arguments and the reason ``"failure"`` at the first exit with another code than 0.

        The engine thread signals the peers, independently of Python. If a failure was already detected, the stop
        starts at once. An exit with an unknown status does not count as a failure.
        """

    def end_grace(self) -> None:
        """Send SIGKILL now if a :meth:`stop` is in progress: ends its linger time and its grace period."""

    def stop_report(self) -> StopReport | None:
        """Return the outcome of the stop. ``None`` while it is in progress or if there was none."""

@final
class LogRotation:
    """Keeps log files within their limits until it is closed or dropped. See :meth:`Engine.rotate_logs`."""

    def close(self, timeout_s: float) -> bool:
        """End the rotation and its thread. Idempotent.

        Returns:
            ``False`` if it has not ended within ``timeout_s`` seconds, for instance because a disk does not respond.
        """

@final
class LogRules:
    """Compiled rules for log lines. Immutable.

    The patterns are those of the regex crate: no backreference and no look-around. The search takes time linear in the length of the text.
    ``^`` and ``$`` match at the ends of a line. A pattern matches a part of a line.

    Args:
        fail: pairs of a pattern and a reason. A worker that writes a line with the pattern has failed.
        warn: pairs of a pattern and a reason. A line with the pattern causes a warning.

    Raises:
        ValueError: a pattern is invalid or matches every line. The arguments are the fault and the pattern.
    """

    def __new__(cls, fail: Sequence[tuple[str, str]] = (), warn: Sequence[tuple[str, str]] = ()) -> LogRules: ...

@final
class LogFailure:
    """A worker that has failed because of a line in its log."""

    index: int
    """Index of the worker in its group."""
    reason: str
    """Reason of the rule."""
    stream: str
    """Description of the file."""
    line: str
    """The beginning of the line, without control characters."""
    realtime_ns: int
    """Nanoseconds since the epoch when the engine found the line."""

@final
class LogScan:
    """Searches the log files of a group until it is dropped. See :meth:`Group.scan_logs`."""

    def finish(self, timeout_s: float) -> bool:
        """Search the rest of the files, last lines without an end included. Then :meth:`Group.log_failures` has all failures.

        Args:
            timeout_s: timeout in seconds.

        Returns:
            Whether the search was completed in time. ``False`` also if the thread ``ferro-tee`` has failed or was closed.
        """

@final
class TailReport:
    """Outcome of a finished tail."""

    lines: int
    """Lines written to the console."""
    bytes: int
    """Bytes written to the console, prefixes included."""
    broken_lines: int
    """Number of splits in lines longer than 1 MiB."""
    dropped_bytes: int
    """Bytes that were not written to the console because it failed, or accepted nothing until the timeout. The log files have them."""
    console_error: str | None
    """Why the console failed: its reader closed it, or the disk is full."""
    unread: list[tuple[str, str]]
    """Files that could not be opened or read to their end, each with the reason."""

@final
class Tail:
    r"""Follows growing log files and copies their complete lines, with a prefix, to a console. Mirrors ``TailLog``.

    Inotify wakes the engine; files without an inotify watch are polled every 20 ms. The files are the buffer: a blocked
    console costs no memory and loses no line. ``\n``, ``\r\n`` and ``\r`` end a line, as in Python's universal newlines.
    """

    def finish(self, timeout_s: float) -> TailReport:
        """Copy the rest of the files, including a last line without newline, and close.

        Args:
            timeout_s: give up if the console accepts nothing for this many seconds, or if the disk of the log files does not respond for
                2 s longer than that.

        Returns:
            The outcome. Later calls return the same report.
        """

@final
class RelayReport:
    """Outcome of a finished relay."""

    bytes: int
    """Bytes written to the console."""
    dropped_bytes: int
    """Bytes that were not written to the console because it failed, or accepted nothing until the timeout."""
    console_error: str | None
    """The last error of the console: its reader closed it, or the disk is full."""

@final
class WorkerEnd:
    """The worker's end of a stream: the write end of a pipe, or a pseudo-terminal in raw mode."""

    def fileno(self) -> int:
        """Return the descriptor. It is closed when this object, the relay and the commands that use it are gone."""

@final
class Relay:
    """Copies streams of workers to a console, and keeps the last 64 KiB of each.

    The bytes are copied unchanged and at once. The bytes of one write of up to ``PIPE_BUF`` bytes stay together. A stream is read only when
    the console has taken the former bytes: a full console blocks the workers that write to it. If the console fails, the bytes are
    discarded.
    """

    is_terminal: bool
    """Whether the console is a terminal. The streams are pseudo-terminals then, and have its window size."""
    def worker_end(self, index: int) -> WorkerEnd:
        """Return the worker's end of a stream.

        Raises:
            IndexError: there is no such stream, or :meth:`finish` was called.
        """

    def last(self, index: int) -> bytes:
        """Return the last bytes of a stream that were read, at most 65536."""

    def flush(self, timeout_s: float) -> None:
        """Copy the bytes that the workers have written, unless the console is full. Waits for up to ``timeout_s`` seconds."""

    def finish(self, timeout_s: float) -> RelayReport:
        """Copy the rest of the streams. Call this when the workers have ended.

        Processes that have left their worker may write further. Their output is copied until they close the stream: by this object, and
        after the end of the engine by the successor of :meth:`Engine.relay`.

        Args:
            timeout_s: give up if the console accepts nothing for this many seconds. The bytes are dropped, and the last ones are kept.

        Returns:
            The outcome so far.
        """

@final
class Engine:
    """Owner of the supervision thread (named ``ferro-sup``), which runs until :meth:`close`.

    That thread spawns the workers with ``PR_SET_PDEATHSIG`` = SIGKILL: they end when the agent ends, even by SIGKILL.

    Args:
        pidfd: use pidfds if the kernel has them (probed once, in a short-lived child). ``False`` forces the fallback:
            one blocking ``waitid`` thread per worker.

    Raises:
        OSError: the thread, the epoll instance or a descriptor could not be created.
    """

    def __new__(cls, *, pidfd: bool = True) -> Engine: ...
    backend: Literal["pidfd", "thread"]
    """How exits are detected on this system."""
    def spawn(
        self, commands: Sequence[Command], pool: WarmPool | None = None, stop_file: StopFile | None = None
    ) -> Group:
        """Start all commands, in order, with ``vfork`` semantics.

        Args:
            commands: the commands.
            pool: its parked processes become the first workers, see :attr:`Group.warm`. Further commands start new processes.
            stop_file: gets a notice before each signal of a stop, see :class:`StopFile`.

        Raises:
            SpawnError: a command could not be started. The processes already started were killed.
        """

    def warm_pool(self, command: Command, configuration: bytes, *, children: int, timeout_s: float) -> WarmPool:
        """Start a zygote: an interpreter that imports modules and then forks processes, which wait to become workers.

        Args:
            command: the zygote. Its standard input becomes the channel to this process. It must create a :class:`Zygote`.
            configuration: first message to the zygote, see :meth:`Zygote.receive`.
            children: number of processes to keep parked.
            timeout_s: the zygote is killed if it is not ready within this time.

        Raises:
            SpawnError: the zygote cannot be started.
            OSError: the channel cannot be created, or the kernel has no pidfds.
        """

    def observe(
        self, pids: Sequence[int], sentinels: Sequence[int] | None = None, stop_file: StopFile | None = None
    ) -> Group:
        """Supervise processes that Python started and reaps (``multiprocessing``): the engine detects exits but does not reap.

        Args:
            pids: the processes, by index.
            sentinels: for each process a descriptor that becomes readable when it ends (``multiprocessing.Process.sentinel``). The
                descriptors are duplicated. They are used for processes that are no children of this one (``forkserver``), without pidfds.
            stop_file: as for :meth:`spawn`.

        Raises:
            OSError: a pid does not exist.
        """

    def rotate_logs(self, files: Sequence[str], *, max_size: int, max_files: int) -> LogRotation:
        """Keep log files within limits while workers append to them. Call it before :meth:`tail` and :meth:`Group.scan_logs`.

        A file of ``max_size`` bytes loses its complete lines to ``FILE.1``, which was ``FILE.2`` before, and so on. Lines that a tail or a
        scan has not read yet stay. A thread of its own (``ferro-rotate``) does so. The first error of each file is in
        :meth:`take_warnings`.

        Args:
            files: paths of the files. The writers append (``O_APPEND``).
            max_size: size in bytes from which the lines move. The file is larger until the thread has checked it, every 200 ms.
            max_files: number of numbered files that are kept.
        """

    def tail(
        self,
        files: Sequence[tuple[str, str]],
        *,
        console_fd: int,
        only_lines_with: Sequence[str] = (),
        whole_lines_only: bool = False,
        is_json: bool = False,
    ) -> Tail:
        """Follow ``files`` (path, line prefix) from their start, on a thread of its own (named ``ferro-tee``). Missing files are created.

        ``${time}`` in a prefix becomes the time at which the engine read the line: ISO 8601 in UTC with milliseconds.

        Opening a file is retried until :meth:`Tail.finish`. :attr:`TailReport.unread` names the files that could never be opened.

        Args:
            files: paths and the prefix of each.
            console_fd: descriptor that the lines are written to. It is duplicated.
            only_lines_with: if not empty, copy only lines that contain one of these strings.
            whole_lines_only: write a line only when it is complete. Otherwise the start of a line (a prompt, progress dots) is written
                after 100 ms and continued in place if no other output came in between. ``only_lines_with`` and ``is_json`` imply
                complete lines.
            is_json: write each line as a JSON object. Its prefix begins the object, up to the opening quote of the last string. The content
                of the line follows, with U+FFFD for bytes that are not UTF-8, and the end of the object.

        Raises:
            OSError: the console cannot be opened.
            TimeoutError: the disk of a log file has not responded for 10 s.
        """

    def relay(self, streams: int, *, console_fd: int, successor: Command | None = None) -> Relay:
        """Create streams for workers, and copy them to a console on a thread of their own (named ``ferro-log``).

        Args:
            streams: number of streams.
            console_fd: descriptor that the bytes are written to. It is duplicated.
            successor: program that copies standard input to standard error. It is started at the end of the engine for each stream that
                processes still use, and outlives this process. ``None``: writes to such a stream fail.

        Raises:
            OSError: a stream cannot be created.
        """

    def watchdog(self, path: str, *, evidence_s: float = 0.0, py_spy: str | None = None) -> Watchdog:
        """Create the named pipe of a watchdog (``mkfifo(3)``, mode 0600) and its heartbeat page, ``path`` + ``.beats``.

        A pipe left at ``path`` by a dead server is reused, an empty regular file is replaced. Requests are read from
        :meth:`Watchdog.start` on.

        Args:
            path: path of the pipe.
            evidence_s: seconds that collecting evidence may delay the signal of an expired timer, 60 at most. 0 collects none.
            py_spy: path of py-spy, which dumps the stacks of workers without an armed faulthandler. ``None`` dumps no such stacks.

        Raises:
            OSError: ``EADDRINUSE`` if a running process serves the pipe, ``EEXIST`` if ``path`` is a file with content, else the
                kernel's error.
        """

    def health_server(self, host: str, port: int, timeout_s: float) -> HealthServer:
        """Listen for health checks and answer them from the engine thread.

        Args:
            host: name or address of this host to listen on. ``"0.0.0.0"`` and ``"::"`` are all addresses.
            port: TCP port. 0 selects a free one.
            timeout_s: seconds without progress after which the agent counts as dead.

        Raises:
            OSError: listening failed (``EADDRINUSE``, ``EACCES`` …), or the host has no address.
            OverflowError: ``port`` is not in 0 to 65535.
            ValueError: ``timeout_s`` is negative or not a number.
        """

    def adopt_guard(self, guard: Guard) -> None:
        """Take ownership of a guard and report all workers to it. If the guard is lost it is replaced, up to 16 times.

        Raises:
            ValueError: an engine already owns the guard.
        """

    def watch_lease(self, client: RendezvousClient) -> None:
        """Let the guard end the workers when their lease expires, even while this process is suspended.

        Args:
            client: this node's membership. Replaces the previous one.
        """

    def own_orphans(self) -> None:
        """Declare that all children of this process outside of its own session were left to it by workers.

        If this process is PID 1 or a subreaper, the engine reaps the zombies in sessions of workers. After this call it also reaps the
        zombies in all other sessions except this process's own.
        """

    def use_cgroup(self, folder: str | None) -> bool:
        """Spawn further workers in this cgroup. ``None`` spawns them in this process's cgroup again.

        Returns:
            Whether the kernel supports it (``CLONE_INTO_CGROUP``, Linux 5.7, on x86-64). Probed with a short-lived process.

        Raises:
            OSError: the cgroup does not exist.
        """

    def dismiss_guard(self, timeout_s: float) -> bool:
        """Kill the guard before a regular exit of this process. ``False`` if it has not ended after ``timeout_s`` seconds."""

    def take_warnings(self) -> list[str]:
        """Return the warnings since the last call, each a sentence for the log. The loss of the guard is such a warning."""

    def close(self, timeout_s: float = 5.0) -> bool:
        """End the thread. Running workers get SIGKILL. ``False`` if the thread did not end within ``timeout_s``."""

@final
class Console:
    """Writes to a shared terminal, pipe, socket or file without waiting for its reader.

    Reopens the file behind the descriptor with ``O_NONBLOCK``, because the flags of a shared open file description must not change.
    If the file cannot be reopened, each write polls for room first.

    Args:
        fd: descriptor to write to. It is duplicated.

    Raises:
        OSError: the descriptor is not open.
    """

    def __new__(cls, fd: int) -> Console: ...
    def write(self, data: bytes) -> int:
        """Write as much as there is room for.

        Returns:
            Number of bytes written. Less than ``len(data)`` if the reader is slow.

        Raises:
            OSError: the reader closed the stream (``EPIPE``), or the disk is full.
        """

@final
class Guard:
    """A small process that outlives a killed agent and then kills the child processes of its workers, which the kernel does not.

    It is forked if this process has one thread, otherwise executed. It ignores all signals except SIGKILL and SIGSTOP. When this process ends without
    :meth:`Engine.dismiss_guard`, the guard kills all processes in the workers' sessions, in the run's cgroup, and with the run's mark in
    their environment. It waits 100 ms after the workers' end, the time in which helpers can clean up after them.

    Args:
        name: environment variable that marks the run.
        token: value of this run in the variable, which separates values by colons.
        argv: program that calls :func:`stand_guard`, with the connection to this process as descriptor 0. Used if this process cannot
            fork, and to replace a lost guard.
        env: its complete environment, without the mark.
        keep_detached: spare processes that have left the sessions of the workers.
        cgroup: folder of the run's cgroup.

    Raises:
        OSError: the guard could neither be forked nor executed.
    """

    pid: int
    """Process id of the guard."""
    forked: bool
    """Whether it was forked."""
    def __new__(
        cls,
        name: str,
        token: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        keep_detached: bool = False,
        cgroup: str | None = None,
    ) -> Guard: ...

def stand_guard(name: str, token: str, *, keep_detached: bool = False, cgroup: str | None = None) -> None:
    """Main function of an executed guard process. Returns when the agent and the processes it left have ended.

    Closes all descriptors but 0, and ignores all signals. The arguments are those of :class:`Guard`.
    """

def create_cgroup(name: str) -> str:
    """Create a cgroup (version 2) below the cgroup of this process and return its folder.

    Raises:
        OSError: the system has no cgroup version 2, or this process may not create one (neither root nor a delegated cgroup).
    """

def remove_cgroup(folder: str) -> None:
    """Remove a cgroup and its descendants. Running processes move to the parent cgroup.

    Raises:
        OSError: the cgroup cannot be removed.
    """

def find_detached(
    name: str,
    token: str,
    *,
    sessions: Sequence[int] = (),
    cgroup: str | None = None,
    not_in_sessions: Sequence[int] = (),
) -> list[tuple[int, str]]:
    """Find the running processes of a run.

    Args:
        name: as for :class:`Guard`.
        token: as for :class:`Guard`.
        sessions: process ids of workers that have ended. Each was also the id of the worker's session.
        cgroup: folder of the cgroup in which all workers were spawned. If given, only its processes are returned, which takes a tenth
            of the time. Otherwise processes are found by the mark in their environment and by their session.
        not_in_sessions: sessions of the agent and of its zygote. Their processes are left out.

    Returns:
        Process id and command line of each process, without guard processes.
    """

def arm_parent_death_signal(signal: int) -> None:
    """Call ``prctl(PR_SET_PDEATHSIG)`` for this process: it gets ``signal`` when the *thread* that created it ends."""

def printable(text: str) -> str:
    """Return a text from another process or node with control characters and changes of the text direction escaped."""

def thread_stack_bytes() -> int:
    """Return the stack size in bytes of this package's threads: twice the default. The stack is reserved, not allocated.

    In a forked child, glibc may mistake a new thread for an ended thread of the parent that had the same stack. No thread of the parent
    has a stack of this size.
    """

@final
class HealthServer:
    """Answers GET and HEAD on one port, independently of Python.

    Paths: ``/livez`` (and ``/``, ``/healthz``), ``/readyz``, ``/status``, ``/metrics``.

    At most 256 connections are open, each for at most 2 s. If all are in use, a new connection replaces the longest idle one.

    One Python thread reports the agent's last progress when a probe needs it, in this loop::

        while server.next_question():
            server.answer(alive_callback())

    At most one question is outstanding, and its answer is valid for 100 ms. A probe waits up to 0.5 s. It then reports that the interpreter
    is stuck (the thread did not return from :meth:`next_question`) or that the callback hangs (it did). Further probes report the same at
    once until the answer arrives.

    The other methods update the server's state, in about a microsecond. The engine itself detects the exits of workers.

    In a forked child every method but :meth:`close` raises :class:`ForkedError`.
    """

    host: str
    """The address that it listens on."""
    port: int
    """The port that it listens on."""
    def next_question(self) -> bool:
        """Block, detached from the interpreter, until a probe needs the agent's last progress. ``False`` once the server is closed."""

    def answer(self, progress: float) -> None:
        """Set the time of the last progress, in seconds since the epoch. A time in the future counts as now."""

    def answer_failed(self, reason: str) -> None:
        """Report that the callback failed, with the reason. The agent then counts as dead."""

    def set_job(self, run_id: str, role: str) -> None:
        """Set the job's id and the role of its workers."""

    def set_state(self, state: str) -> None:
        """Set the state of the agent.

        Args:
            state: ``starting``, ``rendezvous``, ``spawning``, ``running``, ``stopping``, ``exit barrier`` or ``unknown``.
                The agent is ready while it is ``running`` and no worker has failed.

        Raises:
            ValueError: ``state`` has another value.
        """

    def set_workers(self, workers: Sequence[tuple[int, int, int]]) -> None:
        """Set the workers of a new round.

        Args:
            workers: local rank, global rank and pid of each worker. Replaces the previous list.
        """

    def note_decision(self, reason: str, text: str) -> None:
        """Count a decision of the restart policy.

        Args:
            reason: the rule that decided, as :attr:`Decision.reason`.
            text: the reason, for people.
        """

    def note_restart(self, cause: str, reason: str) -> None:
        """Record that the workers will be restarted.

        Args:
            cause: ``failure`` or ``membership``.
            reason: the event, as text.

        Raises:
            ValueError: ``cause`` has another value.
        """

    def note_warm_refusal(self, reason: str) -> None:
        """Count a cold start of the workers although warm workers were requested. ``reason`` is text for people."""

    def observe_phase(self, phase: str, duration_s: float) -> None:
        """Record the duration of a phase of a restart.

        Args:
            phase: ``detect``, ``stop``, ``rendezvous``, ``spawn`` or ``release``.
            duration_s: duration in seconds.

        Raises:
            ValueError: ``phase`` has another value, or the duration is negative or not a number.
        """

    def close(self) -> None:
        """Stop listening and close all connections. The port is free afterwards. Idempotent.

        In a forked child this only closes the child's copy of the listening socket.
        """

@final
class StoreServer:
    """A key-value store for unmodified clients of torch's ``TCPStore`` (2.4 and later), on its own thread ``ferro-store``.

    It supports all operations of torch's libuv server. It closes the connection of a client that exceeds a limit or violates the protocol.
    The default limits are torch's. In addition a request and a reply are limited to 256 MiB each, which torch does not limit. A connection
    buffers at most one request, one reply and a few MiB. The size of the stored data has no limit.

    With a ``run_id`` the store also hosts the rendezvous of the job's agents, see :class:`RendezvousClient`. Each round starts with an
    empty store.

    Args:
        host: IP address to listen on. ``::`` accepts IPv4 as well.
        port: TCP port. 0 selects a free one.
        run_id: id of the job whose agents meet here. ``None`` serves a store only.
        min_nodes: minimum number of nodes of a round.
        max_nodes: maximum number of nodes of a round. Further nodes wait as spares.
        last_call_s: seconds that a round with enough nodes waits for further nodes.
        silence_s: heartbeat timeout in seconds. An agent without messages for this long is lost.
        address: address of this host for the workers. By default they use the host name that their agent was started with.
        max_membership_changes: maximum number of membership changes before the job is closed. ``None`` means no limit.
        max_key_bytes: maximum size of a key in bytes (8 KiB).
        max_value_bytes: maximum size of a value in a request, in bytes (8 MiB). ``APPEND`` can create larger values.
        max_keys: maximum number of keys in a request (131,072).
        max_request_bytes: maximum total size of the keys and values in a request, in bytes (256 MiB).
        max_reply_bytes: maximum size of a reply in bytes (256 MiB), for example of ``MULTI_GET`` or ``LIST_KEYS``.

    Raises:
        OSError: the port is in use, or the address does not belong to this host.
        OverflowError: a limit is negative.
        ValueError: a number of seconds is negative.
    """

    port: int
    """The port that it listens on."""
    def __new__(
        cls,
        host: str,
        port: int = 0,
        *,
        run_id: str | None = None,
        min_nodes: int = 1,
        max_nodes: int = 1,
        last_call_s: float = 30.0,
        silence_s: float = 15.0,
        address: str | None = None,
        max_membership_changes: int | None = None,
        max_key_bytes: int = 8192,
        max_value_bytes: int = 8_388_608,
        max_keys: int = 131_072,
        max_request_bytes: int = ...,
        max_reply_bytes: int = ...,
    ) -> StoreServer: ...
    def close(self, timeout_s: float = 0.0) -> None:
        """Accept no new agents, wait up to ``timeout_s`` seconds for the present agents to leave, and close all connections."""

class StoreTimeoutError(RuntimeError):
    """Keys of a store were not set in time. The text is that of torch's ``DistStoreError``."""

@final
class StoreClient:
    """A connection to a ``TCPStore``, for one request at a time. Concurrent calls of several threads are serialised.

    Keys are passed as they are on the wire. A connection is not reused after a request timed out, because the late reply could be
    mistaken for the reply to the next request: every further call raises ``ConnectionError`` at once.

    Args:
        host: name or address of the store's host.
        port: TCP port of the store.
        timeout_s: timeout in seconds for connecting, and for a request with its reply.

    Raises:
        ConnectionError: the store cannot be reached. Every method raises it if the connection was lost or a reply timed out.
    """

    def __new__(cls, host: str, port: int, timeout_s: float) -> StoreClient: ...
    def set_timeout(self, timeout_s: float) -> None:
        """Set the timeout in seconds for a request with its reply. Requests in progress keep the old timeout."""

    def set(self, key: bytes, value: bytes) -> None:
        """``SET``: set a key. Returns without waiting for a reply."""

    def compare_set(self, key: bytes, expected: bytes, desired: bytes) -> bytes:
        """``COMPARE_SET``: set the key if its value is ``expected``, or if it is missing and ``expected`` is empty.

        Returns:
            The value after the operation.
        """

    def get(self, keys: list[bytes], timeout_s: float) -> list[bytes]:
        """``WAIT`` and ``MULTI_GET``: wait until all keys are set and return their values.

        Transferring the values may take the client's own timeout in addition.

        Raises:
            StoreTimeoutError: a key was not set within ``timeout_s`` seconds.
        """

    def multi_set(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """``MULTI_SET``: set several keys. Returns without waiting for a reply."""

    def add(self, key: bytes, delta: int) -> int:
        """``ADD``: add ``delta`` to a counter and return the sum."""

    def append(self, key: bytes, value: bytes) -> None:
        """``APPEND``: append to a value. Returns without waiting for a reply."""

    def check(self, keys: list[bytes]) -> bool:
        """``CHECK``: return whether all keys are set."""

    def delete(self, key: bytes) -> bool:
        """``DELETE_KEY``: delete a key and return whether it was set."""

    def num_keys(self) -> int:
        """``GETNUMKEYS``: return the number of keys."""

    def wait(self, keys: list[bytes], timeout_s: float) -> None:
        """``WAIT``: wait until all keys are set.

        After the timeout the client cancels the wait. The store must acknowledge this within the client's own timeout, 10 s at most.

        Raises:
            StoreTimeoutError: a key was not set within ``timeout_s`` seconds.
        """

@final
class FailureFacts:
    """The facts of a failure, for a restart policy.

    Args:
        status: exit code of the worker that failed first, or minus the signal that ended it. ``None`` if no worker has ended.
        causes: kind of the failure and its known causes.
        has_progressed: whether the workers of this node have made progress in this round.
        is_exhausted: whether the agent has no restart left.
        final_reason: the reason for the end of the job, if the program's policy ends it.
        delay_s: delay of the restart in seconds, if the program's policy gives one.
    """

    def __new__(
        cls,
        status: int | None = None,
        causes: list[str] = ...,
        *,
        has_progressed: bool = False,
        is_exhausted: bool = False,
        final_reason: str | None = None,
        delay_s: float | None = None,
    ) -> FailureFacts: ...

@final
class Decision:
    """A decision of a restart policy on a failure."""

    reason: str
    """Name of the rule that decided."""
    text: str
    """The reason as text. It continues the description of the failure."""
    delay_s: float | None
    """Delay of the restart in seconds; ``None`` if the failure ends the job."""

@final
class RestartPolicy:
    """A restart policy with the clock of this machine, for agents whose rendezvous makes no decisions.

    Args:
        settings: the settings, by the name of their option. Missing settings have their defaults. Unknown names are ignored.
        seed: determines the jitter of the delays.

    Raises:
        ValueError: a setting is not valid.
    """

    used: int
    """Number of restarts that count against the limit."""
    def __new__(cls, settings: dict[str, str], seed: str) -> RestartPolicy: ...
    def begin_round(self, elapsed_s: float = 0.0) -> None:
        """Note that the workers were started ``elapsed_s`` seconds ago."""

    def note_membership_change(self) -> None:
        """Note that the round has ended by a change of membership."""

    def decide(self, facts: FailureFacts) -> Decision:
        """Decide on the failure that ended the round."""

@final
class RendezvousClient:
    """An agent's membership in a rendezvous that a :class:`StoreServer` hosts, on its own thread ``ferro-rdzv``.

    It connects at the first :meth:`join`. Only :meth:`wait` and :meth:`close` block. :meth:`membership` shows the effect of the other calls.
    In a forked child every method raises :class:`ForkedError`.

    Args:
        host: name or address of the host.
        port: TCP port of the host.
        run_id: id of the job.
        min_nodes: minimum number of nodes of a round, equal on all nodes.
        max_nodes: maximum number of nodes of a round, equal on all nodes.
        name: address of this node for the other nodes. By default the address of its connection to the host.
        node_rank: rank of this node, if it is assigned by the user.
        is_host: whether this process hosts the rendezvous. It then sends no heartbeats.
        connect_timeout_s: timeout in seconds for connecting to the host.
        settings: further settings that must be equal on all nodes, by the name of their option.
    """

    generation: int
    """Event counter of the membership."""
    alarm_fd: int
    """Readable while there are remarks, and from the end of a round or of the rendezvous until the next :meth:`join`.
    For ``Group.wait(news_fd=...)``."""
    address: str | None
    """Local address of the connection to the host. ``None`` before it is connected."""
    stop_within_s: float | None
    """Seconds until the lease of this node expires and other nodes may take its ranks: its workers must have ended by then.
    ``None`` while the host answers."""
    def __new__(
        cls,
        host: str,
        port: int,
        run_id: str,
        *,
        min_nodes: int = 1,
        max_nodes: int = 1,
        name: str | None = None,
        node_rank: int | None = None,
        is_host: bool = False,
        connect_timeout_s: float = 60.0,
        settings: dict[str, str] | None = None,
    ) -> RendezvousClient: ...
    def join(self, role: str, local_world_size: int, timeout_s: float) -> None:
        """Join the next round. The node must have no running workers.

        Args:
            role: role of the workers that will be started.
            local_world_size: number of workers that will be started.
            timeout_s: seconds to wait for the start of the round.
        """

    def fail(self, at_ns: int, text: str, exit_code: int, facts: FailureFacts, *, detail: str = "") -> None:
        """Report a failed worker. This ends the round on all nodes. The restart policy of the host decides on a restart.

        Args:
            at_ns: time of the failure in nanoseconds since the epoch.
            text: the failure: worker and exit status.
            exit_code: exit code of the job if this failure ends it.
            facts: facts for the restart policy.
            detail: the explanation of the failure for the report on all nodes, up to 32 KiB. A longer one is not sent. It is not
                interpreted.
        """

    def progress(self) -> None:
        """Report that the workers of this node have made progress in this round."""

    def finish(self) -> None:
        """Report that all workers of this node have succeeded."""

    def end(self, text: str, exit_code: int) -> None:
        """End the job on all nodes.

        Args:
            text: the reason.
            exit_code: exit code of the job.
        """

    def leave(self, text: str) -> None:
        """Leave the rendezvous for the reason ``text``. The other nodes may continue."""

    def membership(self) -> Membership:
        """Return the current state of the membership."""

    def take_warnings(self) -> list[str]:
        """Return the warnings for the log since the last call. Each warning is returned once."""

    def wait(
        self,
        generation: int,
        timeout_s: float | None = None,
        wake_fd: int | None = None,
        news_fd: int | None = None,
    ) -> Literal["event", "timeout", "wake", "news"]:
        """Block until ``self.generation > generation``. Same arguments as :meth:`Group.wait`."""

    def close(self) -> None:
        """End the membership. Messages of earlier calls are still sent."""

@final
class Membership:
    """State of an agent's membership in its rendezvous."""

    state: Literal[
        "idle",
        "joining",
        "placed",
        "over",
        "released",
        "closed",
        "spare",
        "timed out",
        "unreachable",
        "refused",
        "late",
    ]
    """State of the membership:

    * ``idle``: not joined.
    * ``joining``: waiting for the start of a round.
    * ``placed``: in a round.
    * ``over``: the round has ended. Stop the workers and join again.
    * ``released``: all workers of all nodes have succeeded.
    * ``closed``: the job has failed. There is no other round.
    * ``spare``: the job has succeeded without this node.
    * ``timed out``: too few nodes joined in time.
    * ``unreachable``: the host could not be reached in time.
    * ``refused``: the host does not accept this node.
    * ``late``: the job of this host had ended, or was about to end, when the agent joined."""
    place: Place | None
    """Place of the node if it is ``placed``. Previous place if the round is ``over``."""
    cause: Cause | None
    """Why the round is ``over``."""
    text: str
    """The reason as text. If ``timed out``: the joined nodes, as far as they are known, and the end of the previous round."""
    exit_code: int | None
    """Exit code of the job if the state is ``closed`` or ``spare``."""
    decision: Decision | None
    """Decision of the restart policy, if a failure has ended the round or the job."""
    detail: str
    """Explanation of the failure that ended the job or the round, as :meth:`RendezvousClient.fail` got it on its node. Empty without one."""
    is_loss: bool
    """Whether the loss or the departure of a node ended the job or the round."""

@final
class Place:
    """Ranks and sizes that a round has assigned to a node."""

    round: int
    """Number of the round, starting at 0."""
    group_rank: int
    """Rank of the node."""
    group_world_size: int
    """Number of nodes."""
    first_rank: int
    """Global rank of its first worker. Its other workers have the next ranks."""
    world_size: int
    """Number of workers of the job."""
    first_role_rank: int
    """Rank of its first worker within the role."""
    role_world_size: int
    """Number of workers of its role."""
    address: str | None
    """Address of the workers' store, if the host has set one."""
    failures: int
    """Number of rounds that ended because a worker failed."""
    restarts_used: int
    """Number of restarts that count against the limit."""
    membership_changes: int
    """Number of rounds that ended because a node joined, left or was lost."""
    cause: Cause | None
    """Why the previous round ended. ``None`` in the first round."""

@final
class Cause:
    """Why a round ended, for all its nodes."""

    kind: Literal["failure", "membership"]
    """A worker failed, or a node joined, left or was lost."""
    node: str
    """The node of the event. Empty if unknown."""
    at_ns: int | None
    """Time of the failure in nanoseconds since the epoch. ``None`` without a failure."""
    text: str
    """Description of the event."""
    exit_code: int
    """Exit code of the job if this event ends it."""
    is_loss: bool
    """Whether a node was lost or has left."""

@final
class WarmState:
    """The state of a pool of warm workers at one moment."""

    phase: Literal["importing", "ready", "lost", "refused"]
    """``"lost"``: the zygote has ended. ``"refused"``: it cannot serve, nor could a new one. Parked processes remain usable in both."""
    reason: str
    """The reason of ``"lost"`` or ``"refused"``, as a fragment of a sentence."""
    shortage: str
    """Why the zygote could not fork the last missing process; empty if it could."""
    zygote: int
    """Process id of the zygote."""
    parked: int
    """Number of processes that wait to become workers."""
    released: int
    """Number of processes that have become workers."""
    ready_after_s: float | None
    """Seconds from the start of the zygote until it was ready; ``None`` before."""

@final
class WarmPool:
    """A zygote and its parked processes. All are children of this process and are killed with it, or when this object is dropped.

    A release sends a parked process its command through a Unix socket: arguments, environment, limits and CPUs as a message, and the
    standard streams as descriptors. New processes are forked 0.2 s after a release.
    """

    generation: int
    """Counter of the changes of :meth:`state`."""
    def state(self) -> WarmState:
        """Return the current state."""

    def wait(
        self,
        generation: int,
        timeout_s: float | None = None,
        wake_fd: int | None = None,
        news_fd: int | None = None,
    ) -> Literal["event", "timeout", "wake", "news"]:
        """Block, detached from the interpreter, until ``self.generation > generation``. As :meth:`Group.wait`."""

    def find_changed(self) -> str | None:
        """Return an imported file whose modification time or size has changed since the import; ``None`` if there is none.

        Raises:
            OSError: the list of the files cannot be read.
        """

    def resize(self, children: int, *, delayed: bool = False) -> None:
        """Change the number of parked processes. Surplus ones stay parked.

        Args:
            children: number of processes to keep parked.
            delayed: fork missing ones 0.2 s later, so that workers that were just released start undisturbed. Default: at once.
        """

    def release(self, command: Command, descriptors: Mapping[int, int]) -> int | None:
        """Turn a parked process into a process that Python supervises and reaps, for ``multiprocessing``.

        The next :meth:`Engine.observe` of the process counts it in :attr:`Group.warm`.

        Args:
            command: as for :meth:`Engine.spawn`.
            descriptors: numbers of descriptors in the process, and the descriptors of this process that it gets there. They are inheritable.

        Returns:
            Its process id; ``None`` if no process is parked, or the command or the descriptors do not fit in one message.

        Raises:
            OSError: a descriptor is not open.
        """

    def close(self, timeout_s: float) -> bool:
        """Kill the zygote and the parked processes; return ``False`` if they have not ended within ``timeout_s``. Idempotent."""

@final
class Zygote:
    """The zygote's own end of a :class:`WarmPool`. For a process with one thread. No other class of this module is used there.

    The constructor takes the channel from standard input, which reads from ``/dev/null`` afterwards, and names the process
    ``ferro-warm``.

    Raises:
        OSError: standard input is not open.
    """

    def __new__(cls) -> Zygote: ...
    def receive(self) -> bytes | None:
        """Wait for the agent's next message; ``None`` if the agent has closed the pool or has ended."""

    def next_order(self) -> int | None:
        """Wait for the agent's next order: the number of processes to fork. ``None`` as in :meth:`receive`."""

    def report_ready(self, imported: Sequence[str]) -> None:
        """Report that the process can be forked. The agent later checks that the files ``imported`` have not changed."""

    def report_refusal(self, reason: str) -> None:
        """Report that the process cannot serve. ``reason`` is a fragment of a sentence."""

    def report_shortage(self, reason: str) -> None:
        """Report that no further process can be forked now."""

    def fork(self) -> bool:
        """Fork as ``os.fork`` does, except that the child's parent is the agent (``CLONE_PARENT``), and report the child.

        Return whether this is the child.

        Handlers of ``os.register_at_fork`` run; handlers of ``pthread_atfork(3)`` do not.

        Raises:
            OSError: ``EBUSY`` if this process has other threads, ``EAGAIN`` if a limit of processes is reached, else the kernel's error.
        """

    @staticmethod
    def track_module(module: ModuleType) -> None:
        """Give a module and its dictionary back to the garbage collector, after ``gc.freeze`` has taken all objects from it."""

    def separate(self) -> None:
        """In a child: wait until the zygote has reported it. Then lead a new session and process group, and be killed with the agent.

        Raises:
            OSError: the zygote or the agent has ended, a system call failed, or a signal with a handler has arrived.
        """

    def park(self) -> tuple[list[str], list[tuple[str, str]]] | None:
        """In a child: wait for the release, and apply its standard streams, limit of descriptors, CPUs and working directory.

        ``/proc`` shows the new command line, environment and name from then on. The object cannot be used after it.

        Returns:
            Arguments and environment of the worker; ``None`` if the agent has closed the pool or has ended.

        Raises:
            OSError: a part of the release cannot be applied, or a signal with a handler has arrived.
        """

@final
class Watchdog:
    """Deadlines that processes set for themselves through a named pipe, see ``ferroelastic.timer``. A missed deadline is signalled.

    The signal goes to the process that set the deadline. If that process descends from a worker, the worker is signalled first. The engine thread reads the pipe
    and signals through a pidfd that was opened at the first request of the process. Requests give wall clock time, which is converted to the
    monotonic clock when the request is read: a clock step moves no deadline. Only the workers set by :meth:`workers`, their descendants and
    the members of their sessions are signalled. Before the first call of :meth:`set_workers`, these are this process and its descendants.
    """

    path: str
    """Path of the named pipe."""
    def start(self) -> None:
        """Start to serve the pipe. Idempotent."""

    def set_workers(self, workers: Sequence[tuple[int, str, str]]) -> None:
        """Set the workers. If a timer of one expires, evidence of all of them is collected.

        Args:
            workers: for each worker its pid, its name (``"rank 3"``) and an existing folder for its evidence. An empty folder collects no
                evidence. Replaces the previous list.
        """

    def register(self, requests: Sequence[tuple[int, str, float, int]]) -> None:
        """Register requests as if they were read from the pipe.

        Args:
            requests: pid, scope, expiration time and signal of each. The time is in seconds since the epoch; a negative one releases.
        """

    def clear(self, pids: Sequence[int]) -> None:
        """Remove all timers of these processes."""

    def timers(self) -> list[tuple[int, str, float, int]]:
        """Return the armed timers, in the form of :meth:`register`."""

    def expiry(self, pid: int) -> Expiry | None:
        """Return the last expired timer for which process ``pid`` was signalled. For a worker this includes timers of its descendants.

        The expiry is recorded before the signal is sent, so it is available when the exit is detected.
        """

    def counts(self) -> WatchdogCounts:
        """Return the request counters."""

    def last_request_age_s(self, pid: int) -> float | None:
        """Return the seconds since the last request or heartbeat of process ``pid``. ``None`` if there was none or it has ended."""

    def overdue_s(self) -> float:
        """Return the seconds since the oldest missed deadline of a process that has not ended yet. 0 if there is none."""

    def next_expiries(self) -> list[Expiry]:
        """Block until timers have expired and been handled, and return them. Empty once the watchdog is closed and all were returned."""

    def drain(self) -> None:
        """Handle all requests in the pipe and all expired timers, then return."""

    def close(self) -> None:
        """Stop serving, and remove the pipe and the heartbeat page. Idempotent."""

@final
class WatchdogCounts:
    """Request counters of a watchdog."""

    requests: int
    """Valid requests."""
    broken: int
    """Lines that were incomplete, not JSON, without a required field, or with a value out of range."""
    oversized: int
    """Lines longer than ``PIPE_BUF``."""
    unknown_version: int
    """Requests of another version of the wire format."""
    refused: int
    """Timers beyond the limit of 65,536, timers of processes that do not exist, and heartbeats in the slot of another process."""
    expired: int
    """Timers that expired."""
    armed: int
    """Timers that are armed now."""
    last_broken: str
    """The last invalid or refused line with the reason, truncated. Empty if there was none."""

@final
class Expiry:
    """An expired timer and the action taken."""

    pid: int
    scope: str
    expiration_time: float
    """Seconds since the epoch, from the request. For a heartbeat: last beat plus timeout."""
    signal: int
    """The requested signal. 0 or less requests none."""
    late_ns: int
    """Nanoseconds from the deadline to its detection."""
    signalled_ns: int
    """``CLOCK_MONOTONIC`` just before the signal. 0 if none was sent."""
    outcome: Literal["signalled", "no signal", "gone", "not ours", "denied"]
    """The action taken:

    * ``signalled``: the signal was sent.
    * ``no signal``: the request asked for none.
    * ``gone``: the process had ended.
    * ``not ours``: the process is neither a worker of this agent nor a descendant of one, and was not signalled.
    * ``denied``: the kernel did not permit the signal."""
    worker: int
    """Pid of the worker that the process is, or descends from. 0 if it is unknown."""
    evidence: list[str]
    """Paths of the evidence, starting with the worker of the process."""

@final
class BeatSlot:
    """A slot in shared memory for the heartbeats of one process.

    Args:
        path: path of the heartbeat page that :meth:`Engine.watchdog` creates.

    Raises:
        OSError: the page does not exist (``ENOENT``), or all its slots are in use (``ENOSPC``).
    """

    def __new__(cls, path: str) -> BeatSlot: ...
    index: int
    """Position in the page. The request that arms the heartbeat contains it."""
    def beat(self) -> None:
        """Store the current time (``CLOCK_MONOTONIC``). Needs no system call and no lock."""

    def close(self) -> None:
        """Free the slot. Later beats do nothing."""
