"""All intended differences between this package and torch.

A test of a difference names it: ``impl.expect("exit-code", torch=1, ours=7)``. ``test_differences.py`` checks that each listed difference
is tested, and that each tested difference is listed.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ABSENT", "DIFFERENCES", "Difference"]


class Difference(NamedTuple):
    """One intended difference."""

    of: str
    """The public name or command that differs."""
    torch: str
    """Behaviour of torch."""
    ours: str
    """Behaviour of this package."""
    why: str
    """Reason for the difference."""
    since: str = ""
    """First version of torch that differs. Empty if all supported versions do."""
    fixed_in: str = ""
    """First version of torch that behaves as this package. Empty if there is none."""


DIFFERENCES: dict[str, Difference] = {
    # ---- how a job ends
    "exit-code": Difference(
        "run, as a command",
        "exits with 1 after any failure",
        "exits with the code of the worker that failed first, 128+n for signal n",
        "schedulers decide by the exit code",
    ),
    "no-restart-code": Difference(
        "SimpleElasticAgent.run, after a worker's exit code 97",
        "restarts the workers",
        "ends the run, although a restart is left",
        "a script can say that a restart is useless",
    ),
    "restart-backoff": Difference(
        "SimpleElasticAgent.run, when workers fail twice right after their start",
        "restarts them at once",
        "delays the second restart by 0.25 s, and further ones up to 5 s",
        "a port, a mount or a driver needs time to come back",
    ),
    "failure-everywhere": Difference(
        "run, on a node whose own workers succeeded while another node's failed for good",
        "exits with 0",
        "reports the failure of the other node and exits with the job's code",
        "an orchestrator that checks a single node must not see a success",
    ),
    "spares-say-so": Difference(
        "run, on a node that a running job with the maximum number of nodes does not need, when that job succeeds",
        "exits with 1 and reports that the rendezvous is closed",
        "reports while it waits, and at the end, that it starts no worker, and exits with 0",
        "an unused spare has not failed, and must not look like a job that ran",
    ),
    "equal-settings": Difference(
        "run --max-restarts=0 on one node, --max-restarts=3 on the other",
        "runs; each node counts restarts separately, and a node may wait for a round that the other never joins",
        "refuses the second node; the errors on both nodes contain both values",
        "a job has one restart limit",
    ),
    "silent-node": Difference(
        "run --nnodes=1:2, while the agent of a node is suspended for longer than the heartbeat timeout",
        "continues as if the node were present, until another node joins",
        "ends the workers of that node by its guard process, then continues with the other nodes",
        "the job does not wait for a lost node, and no rank runs twice",
    ),
    "scheduler": Difference(
        "run, without options of the rendezvous, in a step of Slurm with two nodes",
        "runs a job with one worker on each node",
        "runs one job of both nodes, with one worker per GPU of the step; --no-scheduler does as torch",
        "the scheduler knows the nodes, and srun ferrorun train.py is the whole command",
    ),
    "cpu-limit": Difference(
        "run --nproc-per-node=cpu, with a limit of a control group or SLURM_CPUS_ON_NODE below the number of CPUs",
        "starts one worker per CPU of the affinity mask",
        "starts no more workers than the limit allows",
        "workers above the limit only slow each other down",
    ),
    "standalone-alone": Difference(
        "run --standalone --nnodes=2",
        "waits for a second node, which cannot join",
        "reports a usage error",
        "the job can never start",
    ),
    "arguments-of-the-script": Difference(
        "run.parse_args, before Python 3.12",
        "rejects arguments of the script that look like ambiguous abbreviations of launcher options",
        "passes them to the script",
        "all arguments after the script belong to the script",
    ),
    "no-launcher-traceback": Difference(
        "run, as a command",
        "also prints the launcher's own traceback",
        "prints only the report of the failed workers",
        "users mistake the launcher's traceback for the error",
    ),
    "real-failures": Difference(
        "RunProcsResult.failures, RunResult.failures",
        "include the workers that the agent stopped",
        "contain only the workers that failed; RunProcsResult.stopped contains the stopped workers",
        "the list of failures shows the cause without its consequences",
    ),
    "stuck-is-failed": Difference(
        "RunResult.is_failed",
        "is false for UNHEALTHY, which has no failures; the launcher exits with 0",
        "is true for UNHEALTHY; the failures include the stuck workers",
        "an abandoned job is not a success",
    ),
    "graceful-exit-result": Difference(
        "SimpleElasticAgent.run",
        "returns None on RendezvousGracefulExitError, which makes the launcher fail",
        "returns a successful result",
        "a node that is not needed has not failed",
    ),
    "corrupt-error-file": Difference(
        "ProcessFailure",
        "raises if the error file is damaged or incomplete, which ends the agent",
        "reports the damaged file in its message",
        "a worker that is killed while it writes the file is an ordinary failure",
    ),
    "unknown-time": Difference(
        "ProcessFailure.timestamp",
        "is 0 for an error file with a text message and no time, which makes it the first failure",
        "is the time of the exit",
        "the first failure is reported as the root cause",
    ),
    "no-shared-default": Difference(
        "ProcessFailure.error_file_data",
        "is a single mutable dictionary for all failures without an error file",
        "is a separate dictionary for each failure",
        "data of one failure must not appear in another",
    ),
    "tidy-report": Difference(
        "ChildFailedError.format_msg",
        "ends the line of the exit code with a blank, and does not indent text messages",
        "writes no trailing blank and indents text messages",
        "the report is for people; parsers that skip white space accept both",
    ),
    "quiet-shutdown": Difference(
        "launch_agent",
        "raises an exception of the final shutdown of the rendezvous",
        "logs it",
        "it would replace the exception or the result of the job",
        fixed_in="2.15",
    ),
    "older-handlers": Difference(
        "record, with an error handler without the hooks of torch 2.15",
        "raises AttributeError",
        "calls the hooks that the handler has",
        "handlers for older versions of torch keep working",
        since="2.15",
    ),
    "more-events": Difference(
        "events and metrics of an agent",
        "has events for the rendezvous and the states of agents and workers",
        "also has the events ferroelastic.phase, ferroelastic.decision and ferroelastic.exit, and the metrics phase.*",
        "they have the durations of all phases, the causes of restarts and the exit of each worker in each round",
    ),
    # ---- stopping and restarting workers
    "stop-file": Difference(
        "a worker's environment",
        "has no deadline of a stop",
        "has FERROELASTIC_STOP_FILE, the file that ferroelastic.stop_deadline() reads",
        "a worker needs the deadline to decide whether it can still save",
    ),
    "grace-everywhere": Difference(
        "LocalElasticAgent._stop_workers",
        "gives workers 30 s on a failure and on a restart, independent of the shutdown timeout",
        "gives them the shutdown timeout as grace period",
        "saving a checkpoint takes the same time in all cases",
    ),
    "whole-groups": Difference(
        "PContext",
        "leaves the children of a failed worker running",
        "stops the process group of each worker until it is empty",
        "the children occupy GPU memory and ports",
    ),
    "second-signal": Difference(
        "SimpleElasticAgent.run",
        "restarts the shutdown with the full timeout at a second signal, and raises the second signal",
        "continues the shutdown with its deadline, and raises the first signal. Only a second SIGINT or SIGQUIT ends the grace period",
        "schedulers send signals twice (Slurm, timeout, the end of a login session); a person repeats SIGINT or SIGQUIT",
    ),
    "signal-in-a-stop": Difference(
        "PContext.close",
        "is interrupted by an exception of the signal handler, and leaves workers running",
        "completes with its deadline, then raises the signal",
        "workers get their whole grace period to save a checkpoint",
    ),
    "handlers-are-restored": Difference(
        "PContext.start, SimpleElasticAgent.run, launch_agent",
        "leave their signal handlers installed",
        "restore the previous handlers",
        "after a job, Ctrl-C raises KeyboardInterrupt again, which no `except Exception` swallows",
    ),
    "success-leaves-time": Difference(
        "PContext.wait",
        "ignores the processes that a successful worker leaves in its group",
        "gives them the grace period to finish, then ends them and logs their names",
        "an upload or a checkpoint writer can finish, and no process is left running",
    ),
    "restarts-of-a-run": Difference(
        "SimpleElasticAgent.run, again",
        "has only the restarts that the previous run left",
        "has max_restarts restarts",
        "each run is a separate job",
    ),
    "older-shutdown": Difference(
        "SimpleElasticAgent._shutdown",
        "must accept a timeout",
        "may accept fewer arguments",
        "subclasses for torch before 2.12 have no timeout argument",
        since="2.12",
    ),
    "clean-handlers": Difference(
        "MultiprocessContext with start method fork",
        "its workers inherit the agent's signal handlers: SIGTERM raises in the workers, and is lost if it raises during the fork",
        "its workers have the default handlers from the start",
        "the agent's handlers are not meant for workers",
    ),
    "empty-store": Difference(
        "the workers' store of a restart",
        "contains the keys of the previous attempt",
        "is empty",
        "workers would connect to addresses of processes that have ended",
    ),
    "end-is-news": Difference(
        "the rendezvous c10d, when a node ends the job",
        "other nodes detect it at their next rendezvous",
        "notifies the other nodes, which stop their workers",
        "workers would wait in vain for peers that have ended",
    ),
    "attempts-are-kept": Difference(
        "DefaultLogsSpecs.reify",
        "deletes the logs of an earlier start with the same restart count",
        "writes to attempt_0.1 and so on",
        "the logs from before a membership change show what happened",
    ),
    "interval-is-a-bound": Difference(
        "WorkerSpec.monitor_interval",
        "is the delay until an exit is detected",
        "is the maximum time between two checks of the workers",
        "the agent is notified of exits and does not need to poll",
    ),
    "nohup": Difference(
        "PContext.start",
        "handles SIGHUP even if it was ignored when the process started",
        "leaves it ignored",
        "nohup must work",
    ),
    "health-server-lives-on": Difference(
        "LocalElasticAgent with TORCHELASTIC_HEALTH_CHECK_PORT",
        "starts the server with the workers and stops it with them, in each attempt",
        "starts it before the rendezvous and stops it at the end of the run",
        "an agent in a long rendezvous is alive",
    ),
    "loop-is-progress": Difference(
        "LocalElasticAgent._get_alive_time",
        "is now, or the progress of the watchdog's own thread",
        "is the start of the loop's current step, or now while the loop waits; the watchdog's progress counts if it is older",
        "an agent with a stuck loop is not alive",
    ),
    "health-server-serves": Difference(
        "HealthCheckServer.start",
        "starts nothing and logs a warning",
        "listens on the port and answers health checks",
        "orchestrators need health checks",
    ),
    # ---- timers
    "agent-outlives-expiry": Difference(
        "LocalElasticAgent with TORCHELASTIC_ENABLE_FILE_TIMER=1",
        "is killed by its watchdog, together with the worker whose timer has expired",
        "continues: the expired timer is a failure of its worker",
        "the agent must survive to restart the workers",
    ),
    "one-watchdog": Difference(
        "LocalElasticAgent with TORCHELASTIC_ENABLE_FILE_TIMER=1",
        "creates a server and its pipe for each attempt",
        "creates one server and pipe for the run",
        "a pipe that is created again is missing for a moment",
    ),
    "callers-scope": Difference(
        "timer.expires without a scope",
        "names all timers after the same line of contextlib, so a nested timer releases the outer one",
        "names a timer after the line of its with statement",
        "this is the documented behaviour",
    ),
    "reused-timer": Difference(
        "the return value of timer.expires",
        "can be used in one with statement",
        "can be used in any number of with statements",
        "a timer can be defined once and used in a loop",
    ),
    "kept-requests": Difference(
        "FileTimerClient",
        "raises if the pipe is full or the server has ended",
        "keeps the request and sends it before the next one",
        "a training step must not fail because the watchdog is unavailable",
    ),
    "encoded-length": Difference(
        "FileTimerClient",
        "accepts a request that exceeds PIPE_BUF by its newline",
        "rejects it",
        "the write would not be atomic",
    ),
    "broken-lines": Difference(
        "FileTimerServer",
        "drops all requests that it has read together with an invalid line",
        "drops only the invalid line",
        "an error of one client must not affect other clients",
    ),
    "own-processes": Difference(
        "FileTimerServer",
        "signals any process that a request names",
        "signals only descendants of its own process and members of its workers' sessions",
        "a pid can be wrong or reused",
    ),
    "pipe-in-use": Difference(
        "FileTimerServer",
        "removes the pipe of another running server, which does not detect it",
        "refuses to start",
        "two agents must not read each other's requests",
    ),
    "hook-after-signal": Difference(
        "timer.debug_info_logging",
        "is called before the processes are signalled",
        "is called after the signal",
        "Python may be busy; the native engine collects evidence of the processes before the signal",
    ),
    # ---- output
    "whole-lines": Difference(
        "TailLog",
        "copies a last line without a newline unchanged, so lines of two ranks mix",
        "adds the newline",
        "output is copied in complete lines",
    ),
    "last-lines": Difference(
        "tail_logfile",
        "loses lines that are written between its last read and its check of the event",
        "copies all lines that are written before the event is set",
        "the last lines of a failed worker have the cause",
        fixed_in="2.15",
    ),
    "tail-makes-files": Difference(
        "TailLog", "waits until a file exists", "creates it", "an existing file can be followed without polling"
    ),
    "no-filter-keeps-all": Difference(
        "tail_logfile",
        "copies nothing without a filter",
        "copies every line",
        "without a filter no line is filtered out",
    ),
    "traceback-in-log": Difference(
        "MultiprocessContext",
        "does not write the exception of a function to its redirected standard error",
        "writes it, as the interpreter would print it",
        "users look for it in this log file",
    ),
    "notebook-streams": Difference(
        "redirects",
        "redirect only the descriptor of Python's stream",
        "redirect descriptors 1 and 2 as well",
        "in a notebook the descriptors differ, and child processes write to 1 and 2",
    ),
    "null-device-filters": Difference(
        "DefaultLogsSpecs with /dev/null",
        "returns paths below /dev/null for filtered lines, which cannot be opened",
        "returns /dev/null",
        "discarded logs are not an error",
    ),
    "any-run-id": Difference(
        "DefaultLogsSpecs", "fails if the run id contains a slash", "replaces the slash", "a run id may be any text"
    ),
    # ---- recording errors
    "nanoseconds": Difference(
        "ErrorHandler.record_exception",
        "writes the time in seconds",
        "also writes timestamp_ns",
        "several ranks often fail within a second",
    ),
    "own-traceback": Difference(
        "ErrorHandler.record_exception",
        "writes the traceback of the exception being handled",
        "writes the traceback of the exception in its argument",
        "they may differ, or no exception is being handled",
    ),
    "recording-never-raises": Difference(
        "ErrorHandler",
        "raises if a file cannot be read or written",
        "warns or logs",
        "the second exception would replace the recorded error",
    ),
    "worker-main-records": Difference(
        "control_plane.worker_main",
        "does not record exceptions of its body",
        "records them",
        "this is the documented behaviour",
    ),
    # ---- arguments
    "named-values": Difference(
        "WorkerSpec, LaunchConfig, check_env",
        "reject a value without naming it",
        "name the argument and its value",
        "the user has to find the invalid argument",
    ),
    "negative-restarts": Difference(
        "WorkerSpec.max_restarts", "may be negative", "must be >= 0", "a restart count cannot be computed from it"
    ),
    "checked-environment": Difference(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "may be negative", "must be >= 0", "the argument must be >= 0, too"
    ),
    "any-rank-number": Difference(
        "Std.from_str", "accepts ranks with one digit", "accepts any rank", "hosts have more than ten devices"
    ),
    "log-level": Difference(
        "utils.logging.get_logger",
        "raises for LOGLEVEL=debug, and so does the import of torch.distributed.elastic",
        "accepts the name of a level in any case, or its number",
        "other programs use lower case",
    ),
    "filters-are-lists": Difference(
        "LaunchConfig.duplicate_stdout_filters, duplicate_stderr_filters",
        "treat a string as a list of characters",
        "raise TypeError for a string",
        "a filter for single characters is never intended",
    ),
    "functions-of-sessions": Difference(
        "start_processes, with a function of an interactive session and start method spawn or forkserver",
        "starts workers, which fail because they cannot import the function",
        "raises PicklingError with the remedy",
        "a traceback of another process shows no remedy",
    ),
    "strict-text": Difference(
        "Std.from_str", "ignores a trailing newline", "rejects it", "other text around a value is rejected, too"
    ),
    "any-callable": Difference(
        "launcher.api._get_entrypoint_name, WorkerSpec.entrypoint",
        "fails for a callable without a name, and treats a falsy callable as missing",
        "uses the name of a partial's function, or of an instance's class",
        "functools.partial and instances with __call__ are valid entrypoints",
    ),
    "no-numactl": Difference(
        "NUMA binding", "runs the program numactl", "uses system calls", "containers often lack numactl"
    ),
    # ---- classes
    "own-enums": Difference(
        "WorkerState and the other enumerations",
        "are torch's classes",
        "are our own classes with equal values",
        "an enumeration with members cannot be subclassed; compare with ==",
    ),
    "own-classes": Difference(
        "arguments of an agent, and helper classes",
        "are torch's classes",
        "are our own classes; only exceptions and results are instances of torch's classes too",
        "programs do not check them with isinstance, and torch's instances are accepted as arguments",
    ),
    "no-slots": Difference(
        "Worker, WorkerGroup",
        "have slots",
        "have no slots, so any attribute can be set",
        "a class cannot derive from two classes with slots",
    ),
    # ---- the rest
    "close-never-raises": Difference(
        "SubprocessHandler.close",
        "raises if the process has ended",
        "does nothing if the process has ended",
        "a process can end at any time",
    ),
    "timeout-comes-back": Difference(
        "utils.store.store_timeout",
        "keeps the new timeout if the body raises",
        "restores the previous timeout",
        "a failed barrier must not change the next wait",
    ),
    "one-warning": Difference(
        "metrics.profile",
        "issues a second deprecation warning, for another function, at every call",
        "warns once, when it decorates",
        "one warning is enough",
    ),
    "unheard-events": Difference(
        "events.record",
        "serialises an event even without a listener",
        "skips an event without a listener",
        "the default destination has no listener",
    ),
    # ---- the store
    "store-strict-start": Difference(
        "TCPStore, its server",
        "serves a client without the protocol's first message from its second segment on",
        "closes the connection at once",
        "a port scanner is not a client, and its bytes must not be executed as requests",
    ),
    "store-start-in-pieces": Difference(
        "TCPStore, its server",
        "closes a connection whose first message arrives in two segments",
        "accepts any segmentation",
        "the network determines the segments, not the client",
    ),
    "store-wrong-number": Difference(
        "TCPStore, its server",
        "closes a connection with a wrong magic number only when more bytes arrive",
        "closes it at once",
        "the peer should not wait for a reply that is never sent",
    ),
    "store-half-a-list": Difference(
        "TCPStore.multi_set",
        "sets the received keys even if the client disconnects or violates the protocol before it has sent all keys",
        "sets all keys or none",
        "a partial update cannot be distinguished from a complete one",
    ),
    "store-new-wait": Difference(
        "TCPStore, its server",
        "answers a second wait of a connection when a key of the first wait is set",
        "replaces the first wait",
        "torch's client cancels the first wait; a client that does not has started a new one",
    ),
    "store-filled-queue": Difference(
        "TCPStore.wait",
        "waits for another push to a queue with entries, if a key of the same wait is missing",
        "waits only for the missing key",
        "the queue is already available",
    ),
    "store-woken-queue": Difference(
        "TCPStore.wait",
        "a push to a queue also wakes a client that waited for the queue earlier and now waits for another key",
        "wakes only waiters of the queue",
        "the woken client would read a missing key",
    ),
}

_OTHER_SYSTEMS = "Windows and macOS are not supported"
_OWN_STORES = "torch creates its own stores and backends; its handlers are used unchanged"
_OWN_WORKINGS = "an implementation detail of torch"

# Pattern of a module's path, `path:name`, `path:function()` whose signature differs, or `path:Class.member` -> reason for its absence.
ABSENT: dict[str, str] = {
    # modules
    "utils.data": "for training scripts, not for an agent",
    "utils.data.*": "for training scripts, not for an agent",
    "rendezvous._etcd_stub": _OWN_STORES,
    "rendezvous.c10d_rendezvous_backend": _OWN_STORES,
    "rendezvous.dynamic_rendezvous": _OWN_STORES,
    "rendezvous.etcd_*": _OWN_STORES,
    "rendezvous.static_tcp_rendezvous": _OWN_STORES,
    # functions, classes and constants
    "*:IS_WINDOWS": _OTHER_SYSTEMS,
    "*:IS_MACOS": _OTHER_SYSTEMS,
    "*:_get_default_signal": _OTHER_SYSTEMS,
    "control_plane:_worker_server": _OWN_WORKINGS,
    "multiprocessing.api:_MAPPING_REGEX": _OWN_WORKINGS,
    "multiprocessing.api:_VALUE_REGEX": _OWN_WORKINGS,
    "multiprocessing.api:_get_kill_signal": _OTHER_SYSTEMS,
    "multiprocessing.api:_wrap()": "main function of a function worker; here it has a single argument",
    "multiprocessing.errors:JSON": "a type alias",
    "multiprocessing.errors:_*": _OWN_WORKINGS,
    "multiprocessing.redirects:_*": _OWN_WORKINGS,
    "multiprocessing.redirects:get_libc": _OWN_WORKINGS,
    "multiprocessing.redirects:libc": "the C library is loaded by the first redirect, not at import",
    "numa.binding:_*": "CPUs are read from sysfs and bound by a system call; no command is wrapped in numactl",
    "rendezvous.registry:_create_*_handler": _OWN_STORES,
    "rendezvous.registry:create_handler": _OWN_STORES,
    "rendezvous.registry:_register_out_of_tree_handlers": "torch's registry loads plug-ins if a backend is unknown here",
    "rendezvous.utils:_PeriodicTimer": "keep-alives are sent by torch's handlers",
    "rendezvous.utils:_delay": "keep-alives are sent by torch's handlers",
    "run:_PrintCompletionAction": _OWN_WORKINGS,
    "timer.file_based_local_timer:FileTimerClient._open_non_blocking": _OWN_WORKINGS,
    "timer.file_based_local_timer:FileTimerServer._get_requests": "the pipe is read natively",
    "timer.file_based_local_timer:FileTimerServer._run_watchdog": "timers expire in the native engine, not in a loop",
    "timer.file_based_local_timer:_retry": _OWN_WORKINGS,
    "utils.distributed:_*": _OWN_STORES,
    "utils.distributed:create_c10d_store": _OWN_STORES,
    "utils.store:_try_detecting_missing_ranks": _OWN_WORKINGS,
    # members of classes, and attributes of their instances
    "multiprocessing.api:MultiprocessContext._ret_vals": "values are returned through files",
    "multiprocessing.api:MultiprocessContext._worker_finished_event": "a worker ends when its function has returned",
    "multiprocessing.errors:ProcessFailure._get_error_data": _OWN_WORKINGS,
    "multiprocessing.errors:ProcessFailure._set_no_reply_file": _OWN_WORKINGS,
    "multiprocessing.subprocess_handler.subprocess_handler:SubprocessHandler._popen": "processes are started natively",
    "multiprocessing.subprocess_handler.subprocess_handler:SubprocessHandler._std*": "log files are opened natively",
    "multiprocessing.tail_log:TailLog._finished_events": "files are followed natively",
    "multiprocessing.tail_log:TailLog._futs": "files are followed natively",
}
