"""Everything in which this package differs from torch on purpose, in one place.

A test that meets a difference names it: ``impl.expect("exit-code", torch=1, ours=7)``. ``test_differences.py`` sees to it that what is
listed is tested, and that what is tested is listed.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ABSENT", "DIFFERENCES", "Difference"]


class Difference(NamedTuple):
    """One intended difference."""

    of: str
    """The name that a program uses."""
    torch: str
    """What torch does."""
    ours: str
    """What we do."""
    why: str
    """The reason."""


DIFFERENCES: dict[str, Difference] = {
    # ---- how a job ends
    "exit-code": Difference(
        "run, as a command",
        "exits with 1 whatever happened",
        "exits with the code of the worker that failed first, 128+n for signal n",
        "a scheduler decides by the exit code",
    ),
    "failure-everywhere": Difference(
        "run, on a node whose own workers succeeded while another node's failed for good",
        "exits with 0",
        "reports the failure of the other node, and exits with the job's code",
        "an orchestrator that asks one node must not read a success",
    ),
    "spares-say-so": Difference(
        "run, on a node for which a running job has no room, when that job succeeds",
        "exits with 1, and says that the rendezvous is closed",
        "says while it waits, and at the end, that no worker is started on it, and exits with 0",
        "a spare that was not needed has not failed, and nobody may take it for a job that ran",
    ),
    "equal-settings": Difference(
        "run --max-restarts=0 on one node, --max-restarts=3 on the other",
        "runs; the nodes count apart, and one may wait for a round that the other never joins",
        "refuses the second node, and both name both values",
        "one job has one number of restarts",
    ),
    "silent-node": Difference(
        "run --nnodes=1:2, while the agent of a node is suspended for longer than the heartbeat timeout",
        "goes on as if the node were there, until another one joins",
        "ends the workers of that node by its guard process, and then goes on with the other nodes",
        "nobody waits for a node that is gone, and no rank runs twice",
    ),
    "standalone-alone": Difference(
        "run --standalone --nnodes=2",
        "waits for a second node, which cannot come",
        "is a usage error",
        "it can never begin",
    ),
    "arguments-of-the-script": Difference(
        "run.parse_args, before Python 3.12",
        "refuses arguments of the script that could be abbreviations of several options of the launcher",
        "hands them on",
        "what follows the script is the script's",
    ),
    "no-launcher-traceback": Difference(
        "run, as a command",
        "shows the launcher's own traceback as well",
        "shows the report of the failed workers only",
        "people take the launcher's traceback for the error",
    ),
    "real-failures": Difference(
        "RunProcsResult.failures, RunResult.failures",
        "hold the workers that the agent stopped, too",
        "hold the workers that failed; who was stopped is in RunProcsResult.stopped",
        "the cause of a failure is not to be searched for among its consequences",
    ),
    "stuck-is-failed": Difference(
        "RunResult.is_failed",
        "is false for UNHEALTHY, which has no failures, so that the launcher exits with 0",
        "is true for UNHEALTHY, and the stuck workers are among the failures",
        "a job that was given up is no success",
    ),
    "graceful-exit-result": Difference(
        "SimpleElasticAgent.run",
        "returns None on RendezvousGracefulExitError, at which the launcher fails",
        "returns a result that succeeded",
        "a node that is not needed has not failed",
    ),
    "corrupt-error-file": Difference(
        "ProcessFailure",
        "raises if the error file is damaged or half written, and ends the agent",
        "says so in its message",
        "a worker that is killed while it writes is an ordinary failure",
    ),
    "unknown-time": Difference(
        "ProcessFailure.timestamp",
        "is 0 for an error file with a text message and no time, which makes it the first failure",
        "is the time of the exit",
        "the first failure is the root cause",
    ),
    "no-shared-default": Difference(
        "ProcessFailure.error_file_data",
        "is one dictionary for all failures without an error file, which they change",
        "is each failure's own",
        "one failure's traits do not belong to another",
    ),
    "tidy-report": Difference(
        "ChildFailedError.format_msg",
        "ends the line of the exit code with a blank, and does not indent messages that are text",
        "has no blank and indents them",
        "it is read by people; a parser that skips white space reads both",
    ),
    # ---- stopping and restarting workers
    "grace-everywhere": Difference(
        "LocalElasticAgent._stop_workers",
        "gives workers 30 s on a failure and on a restart, whatever the shutdown timeout is",
        "gives them the shutdown timeout",
        "a checkpoint takes as long on every path",
    ),
    "whole-groups": Difference(
        "PContext",
        "leaves the children of a worker that has failed running",
        "stops the process group of each worker until it is empty",
        "they hold on to GPU memory and ports",
    ),
    "second-signal": Difference(
        "SimpleElasticAgent.run",
        "starts the shutdown again with the full timeout when a second signal comes, and raises that",
        "goes on with the shutdown, which keeps its deadline, and raises the first signal. Only a second SIGINT or SIGQUIT shortens the grace",
        "machines send signals twice (Slurm, timeout, the end of a login session); impatience is a person's",
    ),
    "signal-in-a-stop": Difference(
        "PContext.close",
        "a handler raises in the middle of it, and workers are left to run",
        "goes on to its end, with the deadline that it has, and raises the signal then",
        "workers that save have the time that they were given",
    ),
    "handlers-are-restored": Difference(
        "PContext.start, SimpleElasticAgent.run, launch_agent",
        "handlers of signals stay installed for ever",
        "the handlers of before come back",
        "Ctrl-C in a program that has run a job raises KeyboardInterrupt again, which no `except Exception` swallows",
    ),
    "success-leaves-time": Difference(
        "PContext.wait",
        "processes that a worker which succeeded leaves in its group are not looked after",
        "they have the grace period to finish, and are ended after it, with a line that names them",
        "an upload or a checkpoint writer may finish, and nothing is left behind",
    ),
    "restarts-of-a-run": Difference(
        "SimpleElasticAgent.run, again",
        "has the restarts that the former run has left",
        "has max_restarts of its own",
        "one job does not pay for another",
    ),
    "older-shutdown": Difference(
        "SimpleElasticAgent._shutdown",
        "has to take a timeout",
        "may take fewer arguments",
        "subclasses that were written for torch before 2.9 have none",
    ),
    "clean-handlers": Difference(
        "MultiprocessContext with start method fork",
        "its workers inherit the agent's signal handlers: SIGTERM raises in them, and is lost if that happens during the fork",
        "its workers have default handlers from the start",
        "a worker is no agent",
    ),
    "empty-store": Difference(
        "the workers' store of a restart",
        "holds the keys of the attempt that died",
        "is empty",
        "workers would connect to addresses of the dead",
    ),
    "end-is-news": Difference(
        "the rendezvous c10d, when a node ends the job",
        "the others find out at their next rendezvous",
        "the others are told, and stop their workers",
        "workers whose peers are gone wait for them in vain",
    ),
    "attempts-are-kept": Difference(
        "DefaultLogsSpecs.reify",
        "deletes the logs of an earlier start with the same restart count",
        "writes to attempt_0.1 and so on",
        "after a membership change the earlier logs tell what happened",
    ),
    "interval-is-a-bound": Difference(
        "WorkerSpec.monitor_interval",
        "is the time that every exit goes unnoticed",
        "is the longest time between two looks",
        "an exit is noticed when it happens",
    ),
    "nohup": Difference(
        "PContext.start",
        "handles SIGHUP also where the process was started with it ignored",
        "leaves it ignored",
        "nohup is to work",
    ),
    "health-server-lives-on": Difference(
        "LocalElasticAgent with TORCHELASTIC_HEALTH_CHECK_PORT",
        "starts the server with the workers and stops it with them, in each attempt",
        "starts it before the rendezvous and stops it at the end",
        "an agent in a long rendezvous is alive",
    ),
    "loop-is-progress": Difference(
        "LocalElasticAgent._get_alive_time",
        "is now, or the progress of the watchdog's own thread",
        "is when the agent's loop turned to what it is doing, or now while it waits; the watchdog counts where it has seen less",
        "an agent whose loop is stuck is not alive",
    ),
    "health-server-serves": Difference(
        "HealthCheckServer.start",
        "starts nothing and warns of it",
        "listens on the port and answers",
        "an orchestrator that asks is to be answered",
    ),
    # ---- timers
    "agent-outlives-expiry": Difference(
        "LocalElasticAgent with TORCHELASTIC_ENABLE_FILE_TIMER=1",
        "is killed by its watchdog, together with the worker whose timer has expired",
        "lives on: the expired timer is the worker's failure",
        "restarts are what an agent is for",
    ),
    "one-watchdog": Difference(
        "LocalElasticAgent with TORCHELASTIC_ENABLE_FILE_TIMER=1",
        "makes a server and its pipe for each attempt",
        "makes one for the run",
        "a pipe that is made anew is for a moment not there",
    ),
    "callers-scope": Difference(
        "timer.expires without a scope",
        "names all timers after one line of contextlib, so that a nested one releases the outer one's",
        "names a timer after the line of its with statement",
        "its documentation says so",
    ),
    "reused-timer": Difference(
        "what timer.expires returns",
        "serves one with statement",
        "serves any number",
        "nothing speaks against it",
    ),
    "kept-requests": Difference(
        "FileTimerClient",
        "raises if the pipe is full, or if the server has gone",
        "keeps the request and sends it before the next one",
        "a training step is not to fail because nobody watches it",
    ),
    "encoded-length": Difference(
        "FileTimerClient",
        "lets a request through that is longer than PIPE_BUF by its line's end",
        "does not",
        "it would not be written in one piece",
    ),
    "broken-lines": Difference(
        "FileTimerServer",
        "loses all requests that it has read together with a line that it does not understand",
        "loses that line",
        "one client's fault is not another's",
    ),
    "own-processes": Difference(
        "FileTimerServer",
        "signals whatever process a request names",
        "signals descendants of its own process and members of its workers' sessions",
        "a pid can be wrong, or have a new owner",
    ),
    "pipe-in-use": Difference(
        "FileTimerServer",
        "removes the pipe of another server, which does not notice",
        "refuses to start",
        "two agents must not take each other's requests away",
    ),
    "hook-after-signal": Difference(
        "timer.debug_info_logging",
        "is called before the processes are signalled",
        "is called after that",
        "Python may be busy; what the processes do is gathered natively before the signal",
    ),
    # ---- output
    "whole-lines": Difference(
        "TailLog",
        "copies a last line without its end as it is, so that lines of two ranks mix",
        "ends it",
        "a line is the unit that is copied",
    ),
    "tail-makes-files": Difference(
        "TailLog", "waits for a file to be made", "makes it", "a file that is there can be followed without polling"
    ),
    "no-filter-keeps-all": Difference(
        "tail_logfile", "copies nothing without a filter", "copies every line", "no filter filters nothing"
    ),
    "traceback-in-log": Difference(
        "MultiprocessContext",
        "an exception in a function is not in its redirected standard error",
        "it is, as the interpreter would print it",
        "that is where people look",
    ),
    "notebook-streams": Difference(
        "redirects",
        "redirect only the descriptor of Python's stream",
        "redirect descriptors 1 and 2 as well",
        "in a notebook they are different, and children write to those",
    ),
    "null-device-filters": Difference(
        "DefaultLogsSpecs with /dev/null",
        "names files below /dev/null for filtered lines, which cannot be opened",
        "names /dev/null",
        "logs that are not wanted are no error",
    ),
    "any-run-id": Difference(
        "DefaultLogsSpecs", "fails if the run id has a slash", "replaces it", "a run id is free text"
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
        "writes the traceback of the exception that is being handled",
        "writes that of the exception that it is given",
        "they may be different, or there may be none",
    ),
    "recording-never-raises": Difference(
        "ErrorHandler",
        "raises if a file cannot be read or written",
        "warns or logs",
        "it would replace the error that is being recorded",
    ),
    "worker-main-records": Difference(
        "control_plane.worker_main",
        "records nothing of what is raised in its body",
        "records it",
        "its documentation says so",
    ),
    # ---- arguments
    "named-values": Difference(
        "WorkerSpec, LaunchConfig, check_env",
        "refuse a value without naming it",
        "name the value, and what it was given to",
        "who reads it has to find it",
    ),
    "negative-restarts": Difference(
        "WorkerSpec.max_restarts", "may be negative", "may not", "a restart count cannot be computed from it"
    ),
    "checked-environment": Difference(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "may be negative", "may not", "the argument may not either"
    ),
    "any-rank-number": Difference(
        "Std.from_str", "reads rank numbers of one digit", "reads any", "hosts have more than ten devices"
    ),
    "log-level": Difference(
        "utils.logging.get_logger",
        "raises for LOGLEVEL=debug, and so does the import of torch.distributed.elastic",
        "takes the name of a level in any case, or its number",
        "other programs write it in lower case",
    ),
    "filters-are-lists": Difference(
        "LaunchConfig.duplicate_stdout_filters, duplicate_stderr_filters",
        "take a string for a list of letters",
        "raise TypeError for a string",
        "nobody looks for letters",
    ),
    "functions-of-sessions": Difference(
        "start_processes, with a function of an interactive session and start method spawn or forkserver",
        "starts workers, which fail because they cannot import the function",
        "raises PicklingError, which names what works",
        "a traceback of another process does not say what to do",
    ),
    "strict-text": Difference(
        "Std.from_str", "overlooks a line break at the end", "does not", "no other text around a value is overlooked"
    ),
    "any-callable": Difference(
        "launcher.api._get_entrypoint_name, WorkerSpec.entrypoint",
        "fails for a callable without a name, or takes one that is false for none",
        "gives the name of a partial's function, or of an instance's class",
        "functools.partial and instances with __call__ are functions, too",
    ),
    "no-numactl": Difference(
        "NUMA binding", "runs the program numactl", "asks the kernel", "containers do not have the program"
    ),
    # ---- classes
    "own-enums": Difference(
        "WorkerState and the other enumerations",
        "are torch's classes",
        "are our own, with equal values",
        "a class with members cannot be derived from; compare by ==",
    ),
    "own-classes": Difference(
        "what is given to an agent, and helpers",
        "are torch's classes",
        "are our own; only what is raised or returned is of torch's class too",
        "nobody tells them apart by isinstance, and torch's are taken where ours are",
    ),
    "no-slots": Difference(
        "Worker, WorkerGroup",
        "have slots",
        "have none, so that any attribute can be set",
        "an instance of two classes with slots cannot be",
    ),
    # ---- the rest
    "close-never-raises": Difference(
        "SubprocessHandler.close",
        "raises if the process has ended",
        "does nothing then",
        "it can end at any time",
    ),
    "timeout-comes-back": Difference(
        "utils.store.store_timeout",
        "leaves the new timeout if the body raises",
        "gives the former one back",
        "a barrier that failed must not change the next wait",
    ),
    "one-warning": Difference(
        "metrics.profile",
        "warns again, of another function, at every call",
        "warns when it decorates",
        "one warning is enough",
    ),
    "unheard-events": Difference(
        "events.record",
        "serialises an event that nobody listens to",
        "does not",
        "the default destination has no listener",
    ),
    # ---- the store
    "store-strict-start": Difference(
        "TCPStore, its server",
        "serves who does not begin with the protocol's first message, from its second segment on",
        "closes the connection at once",
        "whatever scans ports is no client, and its bytes are no requests",
    ),
    "store-start-in-pieces": Difference(
        "TCPStore, its server",
        "closes a connection whose first message comes in two segments",
        "takes it however it is cut",
        "segments are the network's, not the client's",
    ),
    "store-wrong-number": Difference(
        "TCPStore, its server",
        "closes a connection that begins with a wrong number when more of it comes",
        "closes it at once",
        "nobody should wait for an answer that does not come",
    ),
    "store-half-a-list": Difference(
        "TCPStore.multi_set",
        "sets the keys that have come, also of a client that is gone before it has sent them all, or goes on to break the protocol",
        "sets all keys or none",
        "half of an assignment looks like a whole one",
    ),
    "store-new-wait": Difference(
        "TCPStore, its server",
        "answers a second wait of a connection for a key of the first",
        "forgets the first wait",
        "torch's client cancels first; who does not has asked anew",
    ),
    "store-filled-queue": Difference(
        "TCPStore.wait",
        "waits for a queue that holds something until more is pushed, if a key is missing as well",
        "waits for the key alone",
        "what is there need not be waited for",
    ),
    "store-woken-queue": Difference(
        "TCPStore.wait",
        "tells who once waited for a queue that another key is there when something is pushed to the queue",
        "tells nobody but who waits for it",
        "a key is read that is not there",
    ),
}

_OTHER_SYSTEMS = "Windows and macOS are not supported"
_OWN_STORES = (
    "a store, or a backend of one, that belongs to torch is torch's to make; its handlers are used as they are"
)
_OWN_WORKINGS = "how torch does it, and not how it is done here"

# Pattern of a module's path, `path:name`, `path:function()` whose signature differs, or `path:Class.member` -> why it is not here.
ABSENT: dict[str, str] = {
    # modules
    "utils.data": "for training scripts, and nothing of an agent",
    "utils.data.*": "for training scripts, and nothing of an agent",
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
    "multiprocessing.api:_wrap()": "what a function worker runs first; it takes one task",
    "multiprocessing.errors:JSON": "a name for a type",
    "multiprocessing.errors:_*": _OWN_WORKINGS,
    "multiprocessing.redirects:_*": _OWN_WORKINGS,
    "multiprocessing.redirects:get_libc": _OWN_WORKINGS,
    "multiprocessing.redirects:libc": "the C library is loaded by the first redirect, not at import",
    "numa.binding:_*": "CPUs are found in sysfs and bound by the kernel's call; there is no numactl to wrap a command in",
    "rendezvous.registry:_create_*_handler": _OWN_STORES,
    "rendezvous.registry:create_handler": _OWN_STORES,
    "rendezvous.registry:_register_out_of_tree_handlers": "torch's registry loads plug-ins, when a backend is not known here",
    "rendezvous.utils:_PeriodicTimer": "keep-alives are sent by torch's handlers",
    "rendezvous.utils:_delay": "keep-alives are sent by torch's handlers",
    "timer.file_based_local_timer:FileTimerClient._open_non_blocking": _OWN_WORKINGS,
    "timer.file_based_local_timer:FileTimerServer._get_requests": "the pipe is read natively",
    "timer.file_based_local_timer:FileTimerServer._run_watchdog": "timers expire natively, and not in a loop",
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
