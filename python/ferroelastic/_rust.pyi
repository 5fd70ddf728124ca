"""The supervision engine: one native thread that spawns workers, sees them exit, stops them and tails their logs.

This page is the manual of the native module. Nothing here decides policy; it starts what it is given,
reports what the kernel said, and stops what it is told to stop. The engine thread never takes the GIL, so an
exit is noticed, a deadline kills and logs flow while Python is busy. Every blocking call detaches from the interpreter.

Conventions: ``index`` is the position of a process in its group (the agent's local rank). Times ending in
``_ns`` are nanoseconds; ``_s`` are seconds as ``float``; ``inf`` means no limit. All objects belong to the process that made
them: in a forked child every method raises :class:`ForkedError`, and dropping them only closes.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, final

__all__ = [
    "BeatSlot",
    "Cause",
    "Command",
    "Console",
    "Engine",
    "Exit",
    "Expiry",
    "ForkedError",
    "Group",
    "Guard",
    "HealthServer",
    "Leftover",
    "Place",
    "RendezvousClient",
    "SpawnError",
    "Standing",
    "StopReport",
    "StoreClient",
    "StoreServer",
    "StoreTimeoutError",
    "Survivor",
    "Tail",
    "TailReport",
    "Watchdog",
    "WatchdogCounts",
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

    When one command of a group fails to start, the ones already started are killed and reaped before this is raised.
    """

    index: int
    """Position of the failing command in the list given to :meth:`Engine.spawn`."""
    stage: str
    """What failed: ``"execve"``, ``"open stdout"``, ``"open stderr"``, ``"chdir"``, ``"sched_setaffinity"``, ``"clone"`` …"""

@final
class Command:
    """How to start one process. Immutable; mirrors the arguments of ``subprocess.Popen`` that an agent needs.

    Args:
        argv: program and arguments. A program without ``/`` is looked up in ``PATH`` of ``env``.
        env: the whole environment of the process (nothing is inherited).
        stdout: path of a file that is created or truncated and becomes standard output; ``None`` inherits the agent's.
        stderr: likewise for standard error.
        cwd: working directory; ``None`` inherits.
        cpus: logical CPUs the process may run on (``sched_setaffinity(2)``, set before exec); ``None`` inherits.
        open_files: soft limit of its open descriptors (``RLIMIT_NOFILE``), the hard limit at most; ``None`` inherits.

    Raises:
        ValueError: ``argv`` is empty, a string holds a NUL byte, or ``cpus`` is empty.
    """

    def __new__(
        cls,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        stdout: str | None = None,
        stderr: str | None = None,
        cwd: str | None = None,
        cpus: Sequence[int] | None = None,
        open_files: int | None = None,
    ) -> Command: ...

@final
class Exit:
    """How one process ended, as the kernel's own accounting tells it (``waitid(2)`` with ``rusage``)."""

    index: int
    pid: int
    order: int
    """Rank of this exit among the exits of the group: 0 is the first that the kernel reported."""
    code: int | None
    """Exit code 0 to 255, or ``None`` if a signal ended the process or the status is not known to this process."""
    signal: int | None
    """Number of the signal that ended the process, else ``None``."""
    core_dumped: bool
    returncode: int | None
    """As ``subprocess.Popen.returncode``: the code, or minus the signal. ``None`` when somebody else reaped the process."""
    stopped: bool
    """The exit was noticed after :meth:`Group.stop` had signalled this process: stopped by the agent, no failure of its own.
    Not so where SIGKILL ended it that the stop had not sent."""
    monotonic_ns: int
    """``CLOCK_MONOTONIC`` when the exit was noticed."""
    realtime_ns: int
    """``CLOCK_REALTIME`` when the exit was noticed (nanoseconds since the epoch)."""
    user_time_s: float
    system_time_s: float
    max_rss_bytes: int
    """Peak resident memory of the process and those of its children that it waited for. Never below the agent's own at
    the time of the spawn: until the exec the worker shares the agent's memory, and the kernel counts that."""

@final
class Survivor:
    """A process that was still there when a stop ran out of time."""

    index: int
    """The worker whose process group it belongs to."""
    pid: int
    state: str
    """State letter of ``/proc/PID/stat``, e.g. ``"D"``."""
    wait_channel: str
    """``/proc/PID/wchan``, or ``""`` where it cannot be read."""

@final
class Leftover:
    """A process of a worker's group that was signalled because it had not finished within ``linger_s`` of :meth:`Group.stop`."""

    index: int
    """Index of the worker whose process group it belongs to."""
    pid: int
    """Process id."""
    command: str
    """Its command line, or its name where that is empty."""

@final
class StopReport:
    """What a finished stop found."""

    signalled_ns: int
    """``CLOCK_MONOTONIC`` just before the first signal was sent."""
    elapsed_s: float
    """From the first signal until every process group was verified empty, or the last deadline passed."""
    killed: list[int]
    """Indexes whose process group did not go within the grace and got SIGKILL."""
    overdue: list[Leftover]
    """Processes that had not finished within ``linger_s``, as they were when they got the signal."""
    survivors: list[Survivor]
    """Empty when every process group was verified empty."""

@final
class Group:
    """Processes that were started together, each the leader of its own session and process group.

    Dropping the object lets go of the group: processes that still run are left to run, and are reaped when they end.
    """

    pids: list[int]
    """Process ids by index."""
    generation: int
    """Counts what has happened to the group: it grows with every exit and when a stop finishes."""
    def exits(self, since: int = 0) -> list[Exit]:
        """The exits in the order in which the kernel reported them, without the first ``since`` of them."""

    def wait(
        self,
        generation: int,
        timeout_s: float | None = None,
        wake_fd: int | None = None,
        news_fd: int | None = None,
    ) -> Literal["event", "timeout", "wake", "news"]:
        """Block, detached from the interpreter, until ``self.generation > generation``.

        Args:
            generation: the last value of :attr:`generation` the caller has acted on. Returns at once if it is behind.
            timeout_s: give up after this long; ``None`` or ``inf`` never; 0 only looks.
            wake_fd: also return when this descriptor is readable (it is not read): the read end of a
                ``signal.set_wakeup_fd`` pipe, so that Python signal handlers run at once.
            news_fd: likewise, for news from elsewhere: :attr:`RendezvousClient.alarm_fd`.

        Returns:
            ``"event"``, ``"timeout"``, ``"wake"`` or ``"news"``.

        Raises:
            RuntimeError: the engine has failed or was closed.
        """

    def signal(self, index: int, signal: int, *, leader_only: bool = False) -> bool:
        """Send ``signal`` to the process group of one worker (or to its leader alone). ``False`` if nothing was there."""

    def stop(self, signal: int, grace_s: float, kill_wait_s: float, *, linger_s: float = 0.0) -> None:
        """Begin to stop the whole group, in parallel, under one deadline; returns at once.

        Each process group gets SIGCONT if stopped, then ``signal``, after ``grace_s`` SIGKILL, also where its leader is
        already dead. SIGKILL goes to the leader first, and to the rest of its group 100 ms later: helpers that clean up after the leader
        (Python's resource tracker) see its end. Finished when every group is verified empty, or ``kill_wait_s`` after the first SIGKILL.
        Wait with :meth:`wait`; the outcome is :meth:`stop_report`. A stop that is under way or over stays as it is.

        Args:
            signal: what asks the processes to end. SIGKILL has no grace.
            grace_s: from that signal to SIGKILL.
            kill_wait_s: from SIGKILL to giving up on processes that the kernel does not let go.
            linger_s: time to finish before ``signal`` is sent, for what a worker that has succeeded leaves in its group.
        """

    def stop_on_failure(self, signal: int, grace_s: float, kill_wait_s: float) -> None:
        """From now on the engine itself begins ``stop(signal, grace_s, kill_wait_s)`` at the first exit that is not code 0.

        The peers are signalled from the engine thread, whatever Python is doing. If a failure was already noticed, the stop
        begins at once. An exit whose status is not known to this process does not count as a failure.
        """

    def hurry(self) -> None:
        """Send SIGKILL now, if a :meth:`stop` is under way: its linger time and its grace are over."""

    def stop_report(self) -> StopReport | None:
        """The outcome of the stop, or ``None`` while it runs or if there was none."""

@final
class TailReport:
    """What a finished tail did."""

    lines: int
    """Lines written to the console."""
    bytes: int
    """Bytes written to the console, prefixes included."""
    broken_lines: int
    """Lines longer than 1 MiB that had to be broken up."""
    dropped_bytes: int
    """Bytes of the files that never reached the console (they are in the files): it took nothing for the whole of the timeout, or failed."""
    console_error: str | None
    """Why the console failed: its reader has closed it, or its disk is full."""
    unread: list[tuple[str, str]]
    """Files that could not be opened, and why."""

@final
class Tail:
    r"""Follows growing log files and copies their lines, whole and prefixed, to a console. Mirrors ``TailLog``.

    Woken by inotify, never polling (files for which no inotify watch is to be had are looked at every 20 ms). The
    files are the buffer: a console that takes nothing costs no memory and loses no line. ``\n``, ``\r\n`` and ``\r`` end a
    line, as Python's universal newlines.
    """

    def finish(self, timeout_s: float) -> TailReport:
        """Copy what the files still hold, a last line without newline included, and close.

        Args:
            timeout_s: give up when the console has taken nothing for this long.
        """

@final
class Engine:
    """Owner of the supervision thread (named ``ferro-sup``), which lives until :meth:`close`.

    Workers are spawned from that thread with ``PR_SET_PDEATHSIG`` = SIGKILL: they end when the agent ends, however it ends.

    Args:
        pidfd: use pidfds where the kernel has them (probed once, in a throw-away child). ``False`` forces the fallback:
            one blocking ``waitid`` thread per worker.

    Raises:
        OSError: the thread, the epoll instance or a descriptor could not be made.
    """

    def __new__(cls, *, pidfd: bool = True) -> Engine: ...
    backend: Literal["pidfd", "thread"]
    """How exits are noticed on this system."""
    def spawn(self, commands: Sequence[Command]) -> Group:
        """Start all commands, in order, with ``vfork`` semantics.

        Raises:
            SpawnError: one could not be started; none is left.
        """

    def observe(self, pids: Sequence[int], sentinels: Sequence[int] | None = None) -> Group:
        """Supervise processes that Python started and reaps itself (``multiprocessing``): exits are seen, never collected.

        Args:
            pids: the processes, by index.
            sentinels: a descriptor of each that becomes readable when it ends (``multiprocessing.Process.sentinel``); they are
                duplicated, and used where there are no pidfds and the process is no child of this one (``forkserver``).

        Raises:
            OSError: a pid does not exist.
        """

    def tail(
        self,
        files: Sequence[tuple[str, str]],
        *,
        console_fd: int,
        only_lines_with: Sequence[str] = (),
        whole_lines_only: bool = False,
    ) -> Tail:
        """Follow ``files`` (path, line prefix) from their beginning; a file that does not exist is created.

        A file that cannot be opened is tried again until the end, and named in :attr:`TailReport.unread` if it never could be.

        Args:
            files: paths and the prefix of each.
            console_fd: descriptor that the lines are written to; it is duplicated.
            only_lines_with: if not empty, copy only lines that contain one of these strings.
            whole_lines_only: show no line before it is whole. Otherwise the beginning of a line (a prompt, dots of progress) is shown
                after 100 ms, and goes on in place if nothing else was written meanwhile. With ``only_lines_with`` lines are always whole.

        Raises:
            OSError: the console cannot be opened.
        """

    def watchdog(self, path: str, *, evidence_s: float = 0.0, py_spy: str | None = None) -> Watchdog:
        """Make the named pipe of a watchdog (``mkfifo(3)``, mode 0600) and the page of its heartbeats, ``path`` + ``.beats``.

        A pipe that a dead server left at ``path`` is taken over, an empty regular file is replaced. Nothing is served before
        :meth:`Watchdog.start`.

        Args:
            path: where the pipe is made.
            evidence_s: seconds that gathering evidence may delay the signal of an expired timer, 60 at most; 0 gathers none.
            py_spy: program to ask for the stacks of workers that have no dump of their own armed; ``None`` asks nobody.

        Raises:
            OSError: ``EADDRINUSE`` if a living process serves the pipe, ``EEXIST`` if ``path`` is a file with content, else what
                the kernel said.
        """

    def health_server(self, host: str, port: int, timeout_s: float) -> HealthServer:
        """Listen for health checks, and answer them from the engine thread.

        Args:
            host: name or address of this host to listen on; ``"0.0.0.0"`` and ``"::"`` are all of them.
            port: TCP port; 0 takes a free one.
            timeout_s: seconds without progress after which the agent counts as dead.

        Raises:
            OSError: nobody can listen there: ``EADDRINUSE``, ``EACCES`` …, or the host has no address.
            OverflowError: ``port`` is not in 0 to 65535.
            ValueError: ``timeout_s`` is negative or not a number.
        """

    def adopt_guard(self, guard: Guard) -> None:
        """Take a guard over: it is told of all workers from now on. One that is lost is replaced, up to 16 times.

        Raises:
            ValueError: it was handed over before.
        """

    def watch_lease(self, client: RendezvousClient) -> None:
        """Have the guard end the workers when their lease is over, also while this process is suspended.

        Args:
            client: this node's membership. Replaces the former one.
        """

    def own_orphans(self) -> None:
        """Say that this process has no children of its own in other sessions than its own.

        Where it is PID 1 or a subreaper, the engine collects the zombies that workers leave to it: those in sessions of workers, and from
        now on those in all other sessions.
        """

    def use_cgroup(self, folder: str | None) -> bool:
        """Let workers be born in this cgroup from now on; ``None`` lets them be born in that of this process again.

        Returns:
            Whether the kernel can do that (``CLONE_INTO_CGROUP``, Linux 5.7, on x86-64). It is tried with a process that ends at once.

        Raises:
            OSError: it is not there.
        """

    def dismiss_guard(self, timeout_s: float) -> bool:
        """Kill the guard, because this process ends as it should. ``False`` if it was not gone after ``timeout_s`` seconds."""

    def take_remarks(self) -> list[str]:
        """What there is for the log since the last call, as sentences: the loss of the guard."""

    def close(self, timeout_s: float = 5.0) -> bool:
        """End the thread; workers that still run get SIGKILL. ``False`` if it did not end within ``timeout_s``."""

@final
class Console:
    """Writes to somebody else's terminal, pipe, socket or file without waiting for its reader.

    Opens the file behind the descriptor again, without blocking, so that the description which others share keeps its flags; where that is not
    possible, asks for room before each write.

    Args:
        fd: descriptor to write to; it is duplicated.

    Raises:
        OSError: the descriptor is not open.
    """

    def __new__(cls, fd: int) -> Console: ...
    def write(self, data: bytes) -> int:
        """Write as much as there is room for.

        Returns:
            How many bytes were written; less than all where the reader does not keep up.

        Raises:
            OSError: the reader is gone (``EPIPE``), or the disk is full.
        """

@final
class Guard:
    """A small process that outlives a killed agent by a moment, to end what the kernel does not end with it: the workers' own children.

    It is forked where this process has one thread, else executed. It ignores all signals. When this process is gone and has not dismissed it
    (:meth:`Engine.dismiss_guard`), it kills what lives in the sessions of the workers, in the run's cgroup, and what carries the run's mark in
    its environment; 100 ms later than the workers, so that helpers which clean up after them can.

    Args:
        name: environment variable that marks the run.
        token: what stands for this run in its value, between colons.
        argv: program that calls :func:`stand_guard`, with the line to this process as descriptor 0. Used where this process cannot be forked, and to
            replace a guard that was lost.
        env: its whole environment; without the mark.
        keep_detached: spare processes that have left the sessions of the workers.
        cgroup: folder of the run's cgroup.

    Raises:
        OSError: neither worked.
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
    """What an executed guard process runs: returns when the agent is gone and what it left has ended. The arguments are those of :class:`Guard`.

    Closes all descriptors but 0, and ignores all signals.
    """

def create_cgroup(name: str) -> str:
    """Make a cgroup (version 2) below that of this process and return its folder.

    Raises:
        OSError: there is no version 2, or this process may not make one (it is not root, and nothing was delegated to its user).
    """

def remove_cgroup(folder: str) -> None:
    """Remove a cgroup and those below it. Processes that live on go to the cgroup above.

    Raises:
        OSError: it cannot be removed.
    """

def find_detached(
    name: str,
    token: str,
    *,
    sessions: Sequence[int] = (),
    cgroup: str | None = None,
    not_in_session: int = 0,
) -> list[tuple[int, str]]:
    """Find the living processes of a run, by their cgroup, or else by the mark in their environment and by their session.

    Args:
        name: as for :class:`Guard`.
        token: as for :class:`Guard`.
        sessions: process ids of workers that have ended, which were their sessions' numbers.
        cgroup: folder of a cgroup that all workers were born in. Then nothing else is looked at, which takes a tenth of the time.
        not_in_session: processes of this session, the agent's, are none of them.

    Returns:
        Process id and command line of each. Guard processes are left out.
    """

def arm_parent_death_signal(signal: int) -> None:
    """``prctl(PR_SET_PDEATHSIG)`` for the calling process: it gets ``signal`` when the *thread* that created it ends."""

def printable(text: str) -> str:
    """Return a text of another process or node with its control characters, and changes of the direction of writing, escaped."""

def thread_stack_bytes() -> int:
    """Return the size in bytes of the stacks of this package's threads: twice the usual one. It is reserved, not used.

    In a forked child, glibc may take a thread for an ended one of the parent whose stack it has. No stack of this size is one of those.
    """

@final
class HealthServer:
    """Answers GET and HEAD on one port, whatever Python is doing: ``/livez`` (and ``/``, ``/healthz``), ``/readyz``, ``/status``, ``/metrics``.

    At most 256 connections of at most 2 s each are open; the one that has been idle for longest makes room for another.

    Whether the agent is alive is asked of one Python thread, in this loop::

        while server.next_question():
            server.answer(alive_callback())

    At most one question is outstanding; its answer serves the probes of the next 100 ms. A probe waits for 0.5 s. Then it is told
    that the interpreter is stuck (the thread did not come back from :meth:`next_question`) or that the callback hangs (it did), and
    further probes are told so at once until there is an answer.

    Everything else is put on the server's board, which costs the caller a microsecond. How workers end is seen by the engine itself.

    In a forked child every method but :meth:`close` raises :class:`ForkedError`.
    """

    host: str
    """The address that it listens on."""
    port: int
    """The port that it listens on."""
    def next_question(self) -> bool:
        """Block, detached from the interpreter, until a probe wants to know of the agent's progress. ``False`` once the server is closed."""

    def answer(self, progress: float) -> None:
        """Say when there was progress last, in seconds since the epoch. A time to come is as good as now."""

    def answer_failed(self, reason: str) -> None:
        """Say that it cannot be told when there was progress last, and why: the agent counts as dead."""

    def set_job(self, run_id: str, role: str) -> None:
        """Say which job it is, and the role of its workers."""

    def set_state(self, state: str) -> None:
        """Say what the agent is doing.

        Args:
            state: ``starting``, ``rendezvous``, ``spawning``, ``running``, ``stopping``, ``exit barrier`` or ``unknown``. The agent is ready
                while it is ``running`` and no worker has failed.

        Raises:
            ValueError: it is none of these.
        """

    def set_workers(self, workers: Sequence[tuple[int, int, int]]) -> None:
        """Say that workers were started, which begins a round.

        Args:
            workers: of each its rank on this host, its rank in the job and its pid. Replaces the former list.
        """

    def note_restart(self, cause: str, reason: str) -> None:
        """Say that workers will be started again.

        Args:
            cause: ``failure`` or ``membership``.
            reason: what happened, for people.

        Raises:
            ValueError: it is no such cause.
        """

    def observe_phase(self, phase: str, duration_s: float) -> None:
        """Say how long a part of a restart took.

        Args:
            phase: ``detect``, ``stop``, ``rendezvous`` or ``spawn``.
            duration_s: seconds.

        Raises:
            ValueError: it is no such phase, or the duration is negative or not a number.
        """

    def close(self) -> None:
        """Stop to listen, and drop all connections; the port is free afterwards. Doing so again does nothing.

        In a forked child it closes the child's copy of the listening socket and nothing else.
        """

@final
class StoreServer:
    """A key-value store that clients of torch's ``TCPStore`` (2.4 and later) use as they are, on a thread of its own: ``ferro-store``.

    It speaks all operations of torch's libuv server. Beyond the limits, and for anybody who is no client, the connection is closed. By
    default they are torch's, and besides 256 MiB each for a whole request and for a reply, which torch does not limit. A connection holds
    at most one of both, and a few MiB; what is stored has no limit.

    With a ``run_id`` agents meet at the same port, see :class:`RendezvousClient`. Each round begins with an empty store.

    Args:
        host: IP address to listen on. ``::`` takes IPv4 as well.
        port: port; 0 takes a free one.
        run_id: the job whose agents meet here; ``None`` for a store alone.
        min_nodes: fewest nodes of a round.
        max_nodes: most nodes of a round. Further ones wait as spares.
        last_call_s: how long a round with enough nodes waits for further ones, in seconds.
        silence_s: an agent that was silent for so long is lost, in seconds.
        address: address of this host for the workers; by default they take the one that their agent was given.
        most_membership_changes: how often nodes may come and go before the job is closed; ``None`` for no limit.
        most_key_bytes: largest key, in bytes (8 KiB).
        most_value_bytes: largest value in a request, in bytes (8 MiB); ``APPEND`` may make larger ones.
        most_keys: most keys in a request (131,072).
        most_request_bytes: most bytes that the keys and values of a request have together (256 MiB).
        most_reply_bytes: most bytes of a reply (256 MiB): of the values of a ``MULTI_GET``, say, or the names of a ``LIST_KEYS``.

    Raises:
        OSError: the port is taken, or the address is not one of this host.
        OverflowError: a limit is negative.
        ValueError: a number of seconds is negative.
    """

    port: int
    """Where it listens."""
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
        most_membership_changes: int | None = None,
        most_key_bytes: int = 8192,
        most_value_bytes: int = 8_388_608,
        most_keys: int = 131_072,
        most_request_bytes: int = ...,
        most_reply_bytes: int = ...,
    ) -> StoreServer: ...
    def close(self, patience_s: float = 0.0) -> None:
        """Take nobody in any more, wait up to ``patience_s`` seconds for agents to go, and end all connections."""

class StoreTimeoutError(RuntimeError):
    """Keys of a store were not set in time; the text is that of torch's ``DistStoreError``."""

@final
class StoreClient:
    """A connection to a ``TCPStore``, for one request at a time; calls from several threads take turns. Keys are what is on the wire.

    A store that is not done with a request in time may answer it while another one is under way. So such a connection is not used again:
    every further call raises ``ConnectionError`` at once.

    Args:
        host: name or address of the store's host.
        port: its port.
        timeout_s: how long it is tried to connect, in seconds, and how long a request and its answer take at most.

    Raises:
        ConnectionError: the store cannot be reached; of every method, the connection was lost, or the store did not answer in time.
    """

    def __new__(cls, host: str, port: int, timeout_s: float) -> StoreClient: ...
    def set_timeout(self, timeout_s: float) -> None:
        """Let requests and their answers take at most ``timeout_s`` seconds from now on, not those under way."""

    def set(self, key: bytes, value: bytes) -> None:
        """``SET``: returns without an answer."""

    def compare_set(self, key: bytes, expected: bytes, desired: bytes) -> bytes:
        """``COMPARE_SET``: set the key if it is ``expected``, or is missing and that is empty. The value that is there then."""

    def get(self, keys: list[bytes], timeout_s: float) -> list[bytes]:
        """``WAIT`` and ``MULTI_GET``: the values, once all keys are there. They may take the client's own timeout to come, besides.

        Raises:
            StoreTimeoutError: they were not within ``timeout_s`` seconds.
        """

    def multi_set(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """``MULTI_SET``: returns without an answer."""

    def add(self, key: bytes, delta: int) -> int:
        """``ADD``: the sum."""

    def append(self, key: bytes, value: bytes) -> None:
        """``APPEND``: returns without an answer."""

    def check(self, keys: list[bytes]) -> bool:
        """``CHECK``: whether all keys are there."""

    def delete(self, key: bytes) -> bool:
        """``DELETE_KEY``: whether it was there."""

    def num_keys(self) -> int:
        """``GETNUMKEYS``."""

    def wait(self, keys: list[bytes], timeout_s: float) -> None:
        """``WAIT`` until all keys are there.

        If they are not, the store is to answer that the wait has ended, within the client's own timeout and at most 10 s.

        Raises:
            StoreTimeoutError: they were not within ``timeout_s`` seconds.
        """

@final
class RendezvousClient:
    """An agent's membership in a rendezvous that a :class:`StoreServer` hosts, on a thread of its own: ``ferro-rdzv``.

    It connects when it is asked to join. Nothing here waits but :meth:`wait` and :meth:`close`; what comes of a call is seen in
    :meth:`standing`. In a forked child every method raises :class:`ForkedError`.

    Args:
        host: name or address of the host.
        port: its port.
        run_id: the job.
        min_nodes: fewest nodes of a round; the same on all nodes.
        max_nodes: most nodes of a round; the same on all nodes.
        name: address of this node for the others; by default that by which it reaches the host.
        node_rank: the rank of this node, where it is given beforehand.
        is_host: the host is in this process, and need not be told that this agent lives.
        connect_timeout_s: how long it is tried to reach the host, in seconds.
        settings: other settings that must be the same on all nodes, by the name of their option.
    """

    generation: int
    """Counts what has happened."""
    alarm_fd: int
    """Readable while there are remarks, and from when a round, or the rendezvous, is over until the next :meth:`join`. For ``Group.wait(news_fd=...)``."""
    address: str | None
    """Address of this node by which it reaches the host, once it does."""
    stop_within_s: float | None
    """Seconds within which the workers of this node must be gone, because the host has not answered for so long that others will have
    their ranks then; ``None`` while it answers."""
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
        """Take part in the next round; there are no workers now.

        Args:
            role: role of the workers that will be started.
            local_world_size: how many.
            timeout_s: how long to wait for the round to begin, in seconds.
        """

    def fail(self, at_ns: int, text: str, exit_code: int, is_final: bool) -> None:
        """Tell the others that a worker has failed: the round is over for all.

        Args:
            at_ns: when, in nanoseconds since the epoch.
            text: which worker, and how.
            exit_code: that of the job, if this failure ends it.
            is_final: there will be no other round.
        """

    def finish(self) -> None:
        """Tell the others that all workers of this node have succeeded."""

    def end(self, text: str, exit_code: int) -> None:
        """Let there be no other round, for anybody.

        Args:
            text: why.
            exit_code: that of the job.
        """

    def leave(self, text: str) -> None:
        """Go, for the reason ``text``; the others may go on."""

    def standing(self) -> Standing:
        """How the agent stands now."""

    def take_remarks(self) -> list[str]:
        """What the host wants its user to know, each once."""

    def wait(
        self,
        generation: int,
        timeout_s: float | None = None,
        wake_fd: int | None = None,
        news_fd: int | None = None,
    ) -> Literal["event", "timeout", "wake", "news"]:
        """Block until ``self.generation > generation``; as :meth:`Group.wait`."""

    def close(self) -> None:
        """End the membership. What was asked for before is still said."""

@final
class Standing:
    """How an agent stands in its rendezvous."""

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
    """``placed``: in a round. ``over``: it is over, stop the workers and join again. ``released``: all workers of all nodes have succeeded.
    ``closed``: there will be no other round, because the job has failed; ``spare``: it has succeeded without this node. The last four: it
    cannot take part; ``late``: the job of this host had ended, or was about to, when the agent came."""
    place: Place | None
    """Its place, when it is ``placed``; that which it had, when the round is ``over``."""
    cause: Cause | None
    """Why the round is ``over``."""
    text: str
    """Why, in words. When ``timed out``, the nodes that came, separated by commas."""
    exit_code: int | None
    """That of the job, when it is ``closed`` or a ``spare``."""

@final
class Place:
    """A node's place in a round, the same kind of thing on every node."""

    round: int
    """Number of the round, from 0."""
    group_rank: int
    """Rank of the node."""
    group_world_size: int
    """Number of nodes."""
    first_rank: int
    """Global rank of its first worker; the others follow."""
    world_size: int
    """Number of workers of the job."""
    first_role_rank: int
    """Rank of its first worker among those of its role."""
    role_world_size: int
    """Number of workers of its role."""
    address: str | None
    """Address that the workers find their store at, if the host has said one."""
    failures: int
    """How many rounds ended because a worker failed."""
    membership_changes: int
    """How many rounds ended because nodes came, went or were lost."""
    cause: Cause | None
    """Why the round before ended; ``None`` in the first."""

@final
class Cause:
    """Why a round ended, for all its nodes."""

    kind: Literal["failure", "membership"]
    """A worker failed, or nodes came, went or were lost."""
    node: str
    """Where; empty if it is not known."""
    at_ns: int | None
    """When, in nanoseconds since the epoch, if a worker failed."""
    text: str
    """What happened."""
    exit_code: int
    """That of the job, if it ends of this."""

@final
class Watchdog:
    """Deadlines that processes set themselves through a named pipe; who misses one is signalled, see ``ferroelastic.timer``.

    The worker that such a process descends from is signalled, too. The engine thread reads the pipe, keeps the deadlines on the monotonic clock (a request names wall clock time, which is
    converted when it is read, so that a step of the clock moves no deadline) and signals through a pidfd that was opened when the
    process first asked. Only the workers that :meth:`workers` names, their descendants and their sessions
    are ever signalled; before workers are named, this process and its descendants.
    """

    path: str
    """The named pipe."""
    def start(self) -> None:
        """Begin to serve. Doing so again does nothing."""

    def workers(self, workers: Sequence[tuple[int, str, str]]) -> None:
        """Say which processes are workers: their evidence is gathered together when a timer of one of them expires.

        Args:
            workers: of each its pid, what to call it (``"rank 3"``) and the folder for its evidence, which exists, or "" for no evidence. Replaces the former list.
        """

    def register(self, requests: Sequence[tuple[int, str, float, int]]) -> None:
        """Take requests as if they had come through the pipe: pid, scope, expiration time (seconds since the epoch, negative releases), signal."""

    def clear(self, pids: Sequence[int]) -> None:
        """Forget all timers of these processes."""

    def timers(self) -> list[tuple[int, str, float, int]]:
        """The armed timers, in the form of :meth:`register`."""

    def expiry(self, pid: int) -> Expiry | None:
        """The last timer over which process ``pid`` was signalled (for a worker also one of its descendants' timers).

        It is known before the signal is sent: whoever sees the process end can ask why.
        """

    def counts(self) -> WatchdogCounts:
        """What was received so far."""

    def last_request_s(self, pid: int) -> float | None:
        """Seconds since the last request or beat of process ``pid``; ``None`` if there was none or it has ended."""

    def overdue_s(self) -> float:
        """Seconds for which the oldest missed deadline has been waiting for its process to end; 0 if none is."""

    def next_expiries(self) -> list[Expiry]:
        """Block until timers have expired and been dealt with. Empty once the watchdog is closed and everything was reported."""

    def drain(self) -> None:
        """Read what is in the pipe and deal with what has expired, then return."""

    def close(self) -> None:
        """Stop to serve and remove the pipe and the page of heartbeats. Doing so again does nothing."""

@final
class WatchdogCounts:
    """What a watchdog has received."""

    requests: int
    """Requests that were understood."""
    broken: int
    """Lines that were torn, not JSON, without a needed field, or with a value out of range."""
    oversized: int
    """Lines longer than ``PIPE_BUF``."""
    unknown_version: int
    """Requests of another version of the wire format."""
    refused: int
    """Timers over the limit of 65,536, those of processes that do not exist, and heartbeats whose slot is not their process's own."""
    expired: int
    """Timers that expired."""
    armed: int
    """Timers that are armed now."""
    last_broken: str
    """The newest line that was not understood or was refused, and why, shortened; empty if there was none."""

@final
class Expiry:
    """A timer that expired, and what was done."""

    pid: int
    scope: str
    expiration_time: float
    """Seconds since the epoch, as the process gave it; for a heartbeat, last beat plus timeout."""
    signal: int
    """The signal that was asked for; 0 or less asks for none."""
    late_ns: int
    """From the deadline to the decision."""
    signalled_ns: int
    """``CLOCK_MONOTONIC`` just before the signal; 0 if none was sent."""
    outcome: Literal["signalled", "no signal", "gone", "not ours", "denied"]
    """What became of it. ``not ours``: the process is none of this agent's workers, nor started by one, and is left alone."""
    worker: int
    """Pid of the worker that the process is or descends from; 0 if none was named."""
    evidence: list[str]
    """Files with evidence, the process's own worker first."""

@final
class BeatSlot:
    """A word of shared memory by which a process shows that it is alive.

    Args:
        path: the page of heartbeats, made by :meth:`Engine.watchdog`.

    Raises:
        OSError: there is no such page (``ENOENT``), or all its slots are taken (``ENOSPC``).
    """

    def __new__(cls, path: str) -> BeatSlot: ...
    index: int
    """Position in the page; the request that arms the heartbeat names it."""
    def beat(self) -> None:
        """Store the time (``CLOCK_MONOTONIC``). No system call, no lock."""

    def close(self) -> None:
        """Give the slot back. Later beats do nothing."""
