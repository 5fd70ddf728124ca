"""The command line of ``ferrorun``."""

import os
import sys
from argparse import OPTIONAL, PARSER, REMAINDER, Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from ferroelastic._completion import PrintCompletion
from ferroelastic._signals import DEFAULT_SIGNALS
from ferroelastic.argparse_util import check_env, env

EXEC = "--exec"
"""The option of ``ferrorun`` that runs a program with the hook."""


_NOT_TORCHS = "Not in torchrun."
"""Part of the help of each option that torchrun has not."""


class _OptionalValue(env):
    """Option whose value is optional and always follows ``=``, because the next argument may be the script."""

    def __init__(self, dest: str, **kwargs: Any) -> None:
        super().__init__(dest, nargs=OPTIONAL, **kwargs)


class _Repeated(env):
    """Option that may be given several times. Its value is the list of texts. ``PET_<DEST>`` has one text per line."""

    def __init__(self, dest: str, **kwargs: Any) -> None:
        super().__init__(dest, type=str.splitlines, default=[], **kwargs)

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, _option: str | None = None) -> None:
        del parser
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is self.default else [*given, *values])


class CommandLine(Namespace):
    """A parsed command line."""

    # A slot, because the attributes are those of torch's namespace.
    __slots__ = ("given",)
    given: frozenset[str]
    """Names of the options that the command line or a ``PET_*`` variable sets."""


class _Exec(Action):
    """The option ``--exec`` in another place than the first, where the command would not take it."""

    def __call__(self, parser: ArgumentParser, *_: Any) -> NoReturn:
        parser.error(
            "--exec must be the first argument, and only the program and its arguments follow it: ferrorun --exec PROGRAM ...; "
            "the program takes the options of its own launcher"
        )


class _Parser(ArgumentParser):
    """Reports an error in one line. The error for an invalid ``PET_*`` value names the variable.

    All arguments after the script belong to the script. argparse also searches them for options of the launcher, and rejects those that
    look like ambiguous abbreviations.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = {
            action.dest
            for action in self._actions
            if isinstance(action, env | check_env) and f"PET_{action.dest.upper()}" in os.environ
        }
        parsed, unknown = self._parse(
            list(sys.argv[1:] if args is None else args), CommandLine() if namespace is None else namespace
        )
        if isinstance(parsed, CommandLine):
            parsed.given = frozenset(self._given)
        return parsed, unknown

    def _parse(self, line: list[str], namespace: Any) -> Any:
        script = self._script_index(line)
        if script is None:
            return super().parse_known_args(line, namespace)
        line[:script] = [self._with_optional_value(text) for text in line[:script]]
        parsed, unknown = super().parse_known_args(line[: script + 1], namespace)
        arguments = line[script + 1 :]
        # A "--" right after the script is for argparse, as in torchrun.
        parsed.training_script_args = arguments[1:] if arguments[:1] == ["--"] else arguments
        return parsed, unknown

    def _script_index(self, line: Sequence[str]) -> int | None:
        """Return the index of the script in a command line. ``None`` without a script, or if a program added positional arguments."""
        positional = [action for action in self._actions if not action.option_strings]
        if [(action.dest, action.nargs) for action in positional] != [
            ("training_script", None),
            ("training_script_args", REMAINDER),
        ]:
            return None
        index = 0
        while index < len(line):
            text = line[index]
            index += 1
            if text == "--":
                return index if index < len(line) else None
            if not self._looks_like_an_option(text):
                return index - 1
            index += self._values_after(text, line[index:])
        return None

    def _looks_like_an_option(self, text: str) -> bool:
        if len(text) < 2 or text[0] != "-":  # noqa: PLR2004 - "-" is standard input
            return False
        if text in self._option_string_actions or text.partition("=")[0] in self._option_string_actions:
            return True
        if self._negative_number_matcher.match(text):
            return False  # this parser has no options that look like numbers
        return " " not in text or bool(self._get_option_tuples(text))

    def _values_after(self, text: str, following: Sequence[str]) -> int:
        """Return how many of the following arguments are values of the option ``text``."""
        action: Action | None = self._option_string_actions.get(text)
        if action is None:
            # The option includes its value, is abbreviated, or combines several short ones. argparse reports unknown ones.
            found = [] if "=" in text else self._get_option_tuples(text)
            whole = [] if len(found) != 1 or not text.startswith("--") else found
            action = whole[0][0] if whole else self._last_of_short(text)
        if action is None:
            return 0
        if isinstance(action, _OptionalValue):
            return 0
        values = 0
        while (
            values < len(following) and following[values] != "--" and not self._looks_like_an_option(following[values])
        ):
            values += 1
        if action.nargs is None:
            return min(1, values)
        if isinstance(action.nargs, int):
            return min(action.nargs, values)
        if action.nargs in (REMAINDER, PARSER):
            return len(following)
        return min(1, values) if action.nargs == OPTIONAL else values

    def _with_optional_value(self, text: str) -> str:
        """Add the default value to an option without its optional value."""
        action: Action | None = self._option_string_actions.get(text)
        return f"{text}={action.const}" if isinstance(action, _OptionalValue) else text

    def _get_option_tuples(self, option_string: str) -> Any:
        """Return the options that a text abbreviates. An abbreviation that torchrun accepts means torchrun's option."""
        found = super()._get_option_tuples(option_string)
        theirs = [match for match in found if _NOT_TORCHS not in (match[0].help or "")]
        return theirs if len(theirs) == 1 else found

    def _last_of_short(self, text: str) -> Action | None:
        """Return the option in ``-r``, ``-mr`` that takes the next argument. ``None`` if its value is in the same argument (``-r3``)."""
        for position, letter in enumerate(text[1:], 1):
            action = self._option_string_actions.get(f"-{letter}")
            if text.startswith("--") or action is None:
                return None
            if action.nargs != 0:
                return action if position == len(text) - 1 else None
        return None

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see {self.prog} --help\n")

    def _get_values(self, action: Action, arg_strings: Any) -> Any:
        self._given.add(action.dest)
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: Action, arg_string: str) -> Any:
        variable = f"PET_{action.dest.upper()}"
        from_variable = isinstance(action, env) and arg_string is action.default and variable in os.environ
        try:
            value = super()._get_value(action, arg_string)
        except ArgumentError as error:
            if not from_variable:
                raise
            raise ArgumentError(None, f"{variable}: {error.message}") from None
        # argparse checks the choices only of values on the command line.
        if from_variable and action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise ArgumentError(None, f"{variable}={value!r} is not one of {choices}")
        return value


def comma_separated_list(value: str) -> list[str]:
    """Split a value at its commas. Two commas stand for a comma within an item."""
    placeholder = "\0"
    return [item.replace(placeholder, ",") for item in value.replace(",,", placeholder).split(",")]


def get_args_parser() -> ArgumentParser:  # noqa: PLR0915 - one statement per option
    """Return the parser of the command line. The defaults are the current values of the ``PET_*`` variables.

    Raises:
        ValueError: the value of a flag's ``PET_*`` variable is not an integer.
    """
    parser = _Parser(
        prog="ferrorun",
        description="Start a distributed PyTorch job on this node: its workers, and an agent that restarts them.",
    )

    def option(*flags: str, **kwargs: Any) -> None:
        """Add an option in both spellings, with dashes and with underscores."""
        long = flags[-1]
        both = (long, "--" + long[2:].replace("-", "_")) if "-" in long[2:] else (long,)
        parser.add_argument(*flags[:-1], *both, **{"action": env, **kwargs})

    def flag(*flags: str, **kwargs: Any) -> None:
        option(*flags, action=check_env, **kwargs)

    # Size of the job.
    option("--nnodes", type=str, default="1:1", help="Number of nodes, or a range as MIN:MAX.")
    option(
        "--nproc-per-node",
        type=str,
        default="1",
        help="Number of workers on this node: a number, or auto, gpu, xpu or cpu for one worker per device.",
    )

    # How the nodes find each other.
    option(
        "--rdzv-backend",
        type=str,
        default="static",
        help="Rendezvous backend: static, c10d, etcd-v2 or a registered one.",
    )
    option("--rdzv-endpoint", type=str, default="", help="Endpoint of the rendezvous, usually HOST:PORT.")
    option("--rdzv-id", type=str, default="none", help="Id of the job, equal on all its nodes.")
    option("--rdzv-conf", type=str, default="", help="Further settings of the rendezvous: KEY=VALUE,KEY=VALUE,...")
    flag(
        "--standalone",
        help="Run on this node only, with a rendezvous on a free port. "
        "Overrides the backend, the endpoint and the id of the rendezvous.",
    )

    flag(
        "--no-scheduler",
        help="Without options of the rendezvous, do not take the number of nodes, the node's rank, the id, the endpoint and the number of "
        "workers from the variables of Slurm, Kubernetes, SkyPilot, dstack, Flux or Open MPI. Not in torchrun.",
    )

    # What the agent does.
    option("--max-restarts", type=int, default=0, help="Number of restarts of failed workers before the job fails.")
    option(
        "--restart-backoff",
        type=float,
        default=0.25,
        metavar="SECONDS",
        help="Delay of the restart after the second failure in a row within 10 seconds of the start and without progress. Each further "
        "one doubles it. Default 0.25, 0 for no delay. Not in torchrun.",
    )
    option(
        "--restart-backoff-max",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="The longest delay of --restart-backoff. Default 5. Not in torchrun.",
    )
    option(
        "--healthy-window",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="Workers that ran for this time give all restarts back. Default 0: never. Not in torchrun.",
    )
    option(
        "--restart-rate",
        type=str,
        default="none",
        metavar="RESTARTS/SECONDS",
        help="The job fails with the next failure after this many restarts within this time, e.g. 5/3600. Not in torchrun.",
    )
    option(
        "--fatal-exit-codes",
        type=str,
        default="none",
        metavar="LIST",
        help="Exit codes and signals of a worker after which there is no restart, e.g. 2,10-12,SIGSEGV. Exit code 97 always prevents it. "
        "Not in torchrun.",
    )
    option(
        "--fatal-causes",
        type=str,
        default="stuck",
        metavar="LIST",
        help="Kinds and causes of failures after which there is no restart, e.g. stuck,watchdog,early_exit. Default stuck. "
        "Not in torchrun.",
    )
    option(
        "--min-uptime",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="There is no restart after a failure while no workers of the job have run for this time or made progress. Default 0. "
        "Not in torchrun.",
    )
    option(
        "--restarts-without-progress",
        type=int,
        default=None,
        metavar="N",
        help="The job fails with the next failure after N restarts without progress: a changed file of --progress-file, or a heartbeat. "
        "Not in torchrun.",
    )
    option(
        "--progress-file",
        type=str,
        default=None,
        metavar="GLOB",
        help="Files whose change is progress of the training, e.g. 'checkpoints/*.pt'. Not in torchrun.",
    )
    option(
        "--on-node-failure",
        type=str,
        default="restart",
        choices=["restart", "wait", "exit"],
        help="When a node leaves or is lost: restart with the other nodes if they are enough, wait for another node up to the join timeout, "
        "or end the job. Not in torchrun.",
    )
    option(
        "--early-exit-timeout",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="The workers have failed if one of them has ended with exit code 0 and others still run after this time. Default 0: never. "
        "Not in torchrun.",
    )
    option(
        "--restart-policy",
        type=str,
        default=None,
        metavar="MODULE:NAME",
        help="An object or class with the method decide() of ferroelastic.agent.server.RestartPolicy, which decides on failures of this "
        "node's workers. Not in torchrun.",
    )
    option(
        "--monitor-interval",
        type=float,
        default=0.1,
        help="Longest time between two checks of the workers, in seconds.",
    )
    option(
        "--start-method",
        type=str,
        default="spawn",
        choices=["spawn", "fork", "forkserver"],
        help="Start method of multiprocessing for --run-path.",
    )
    option(
        "--event-log-handler",
        type=str,
        default="null",
        help="Handler for the agent's events: null, console, jsonl (a file in the log folder) or a registered one.",
    )
    option("--role", type=str, default="default", help="Role of the workers, for logs and events.")

    # What the workers run.
    flag("-m", "--module", help="The script is the name of a module, run as 'python -m' does.")
    flag("--no-python", help="The script is an executable, run without Python.")
    flag(
        "--run-path",
        help="Run the script with runpy.run_path in the worker that multiprocessing starts. "
        "Takes precedence over --no-python.",
    )

    # Their output.
    option(
        "--log-dir",
        type=str,
        default=None,
        help="Folder for log files. Each run creates its own folder in it, named after the job's id.",
    )
    option(
        "-r",
        "--redirects",
        type=str,
        default="0",
        help="Write output of the workers to log files: 1 is stdout, 2 stderr, 3 both. "
        "0:3,1:2 is both for local rank 0 and stderr for local rank 1.",
    )
    option("-t", "--tee", type=str, default="0", help="As --redirects, but both to log files and to the console.")
    option(
        "--log-line-prefix-template",
        type=str,
        default="",
        help="Prefix of each teed line on the console. ${role_name}, ${local_rank}, ${rank}, ${hostname}, and not in "
        "torchrun ${time}, ${pid} and ${round}, are replaced. "
        "Default $TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE, else [${role_name}${local_rank}]:.",
    )
    option(
        "--local-ranks-filter",
        type=str,
        default="",
        help="Show only the output of these local ranks, e.g. 0,1. Log files contain the output of all ranks.",
    )
    option(
        "--ranks-filter",
        type=str,
        default="",
        metavar="RANKS",
        help="Show only the output of these global ranks, e.g. 0,8-15. Log files contain the output of all ranks. Not in torchrun.",
    )
    option(
        "--log-format",
        type=str,
        default="text",
        choices=["text", "json"],
        help="Format of the console: text, or json for one JSON object per line with time, rank, local_rank, host, stream, round and "
        "message. With json, all output that would go to the console directly is teed. Not in torchrun.",
    )
    option(
        "--fail-on-log",
        action=_Repeated,
        metavar="PATTERN=REASON",
        help="Fail a worker whose output has a line that matches the regular expression PATTERN. The reason begins after the last '='. "
        "All output that would go to the console directly is teed. May be repeated. Not in torchrun.",
    )
    option(
        "--warn-on-log",
        action=_Repeated,
        metavar="PATTERN=REASON",
        help="As --fail-on-log, but log a warning, at most one per minute and pattern. Not in torchrun.",
    )
    option(
        "--log-max-size",
        type=str,
        default="",
        metavar="SIZE",
        help="Size of a log file from which its lines move to a numbered file, e.g. 100M: stdout.log.1 is newer than stdout.log.2. "
        "By default there is no limit. Not in torchrun.",
    )
    option(
        "--log-max-files",
        type=int,
        default=5,
        metavar="N",
        help="Number of numbered files of each log file with --log-max-size. Older ones are deleted. Not in torchrun.",
    )
    option(
        "--duplicate-stdout-filters",
        type=comma_separated_list,
        default=[],
        help="Also write stdout lines that contain one of these strings to one file, e.g. loss,epoch. "
        "Write a comma within a string as two commas.",
    )
    option(
        "--duplicate-stderr-filters",
        type=comma_separated_list,
        default=[],
        help="Same for stderr.",
    )

    # The static rendezvous.
    option("--node-rank", type=int, default=0, help="Rank of this node. Static rendezvous only.")
    option(
        "--master-addr",
        type=str,
        default="127.0.0.1",
        help="Address of the node with rank 0. Static rendezvous only. Write IPv6 addresses in brackets: [::1].",
    )
    option(
        "--master-port",
        type=int,
        default=None,
        help="Port on the node with rank 0. Static rendezvous only. Default 29500.",
    )
    option(
        "--local-addr",
        type=str,
        default=None,
        help="Address of this node for the other nodes. By default it is detected.",
    )

    # The rest.
    parser.add_argument(
        "--logs-specs",
        "--logs_specs",
        type=str,
        default=None,
        help="Name of an installed plugin (entry point of group torchrun.logs_specs) that configures the log files.",
    )
    parser.add_argument(
        "--numa-binding",
        "--numa_binding",
        type=str,
        choices=["node", "socket", "exclusive", "core-complex"],
        default=None,
        help="Bind each worker to CPUs near its GPU: the CPUs of the NUMA node, the CPUs of the socket, "
        "an exclusive share of the node's cores, or the cores of one cache.",
    )
    option(
        "--signals-to-handle",
        type=str,
        default=DEFAULT_SIGNALS,
        help="Signals to ferrorun that end the job. The workers get the same signal. "
        "SIGUSR1 and SIGUSR2 are often added under Slurm. Other signals that would terminate ferrorun are ignored.",
    )
    option(
        "--signals-to-forward",
        type=str,
        default="",
        help="Signals to ferrorun that are forwarded to the workers (not to their children) without ending the job, "
        "e.g. SIGUSR1. Not in torchrun.",
    )
    option(
        "--shutdown-timeout",
        type=int,
        default=None,
        help="Grace period of the workers in seconds: the time from the signal that stops them to SIGKILL. "
        "Default $TORCH_ELASTIC_SHUTDOWN_TIMEOUT, else 30.",
    )
    option(
        "--grace-signal-target",
        type=str,
        choices=["group", "leader"],
        default="group",
        help="Receivers of the signal that stops a worker: the whole process group of the worker, or the worker (leader) alone, so that "
        "its data loaders run until it has saved. The rest of the group gets SIGTERM after the worker. Not in torchrun.",
    )
    option(
        "--exit-barrier-timeout",
        type=float,
        default=None,
        help="Seconds that ferrorun waits for the other nodes after its own workers have succeeded. "
        "Default $TORCH_ELASTIC_EXIT_BARRIER_TIMEOUT, else 300. Not yet in torchrun.",
    )
    option(
        "--interactive-rank",
        type=int,
        default=None,
        help="Connect the worker with this local rank to the terminal: it reads the terminal's input, and its output is neither teed "
        "nor redirected. For breakpoint() and input(). Not in torchrun.",
    )
    flag(
        "--keep-detached",
        help="Never end helper processes that left their worker's process group (setsid, setpgid). By default they are ended after a "
        "failure, before a restart and on a stop, and keep running after a success. Not in torchrun.",
    )
    flag("--end-detached", help="End such helper processes after a success as well. Not in torchrun.")
    option(
        "--warm-workers",
        action=_OptionalValue,
        type=str,
        const="auto",
        default="0",
        metavar="N",
        help="Keep N parked processes that have imported the modules of --warm-imports and become workers at the next restart. "
        "Without =N, one per worker. Not in torchrun.",
    )
    option(
        "--warm-imports",
        type=comma_separated_list,
        default=["torch"],
        metavar="MODULES",
        help="Modules for --warm-workers and --preload, e.g. torch,transformers. package.module:function imports the module and calls "
        "the function. Not in torchrun.",
    )
    flag(
        "--preload",
        help="The first start also uses parked processes and waits for them: all workers of the node share one import. Implies "
        "--warm-workers. Not in torchrun.",
    )
    option(
        "--summary",
        type=str,
        default="full",
        choices=["full", "short", "json"],
        help="Form of the report of a failed job on standard error: full is a box with all facts, short has at most 5 lines, json is one "
        "line of JSON. Not in torchrun.",
    )
    flag(
        "--virtual-local-rank",
        help="Give every worker LOCAL_RANK=0 and only its own GPU in CUDA_VISIBLE_DEVICES.",
    )
    parser.add_argument(
        EXEC,
        action=_Exec,
        nargs=0,
        default=False,
        help="Run a program that calls torch's launcher, e.g. ferrorun --exec accelerate launch train.py: its jobs run under the agent of "
        "ferrorun. Must be the first argument. All that follows is the program and its arguments. Not in torchrun.",
    )
    parser.add_argument(
        "--print-completion",
        "--print_completion",
        action=PrintCompletion,
        metavar="SHELL",
        help="Print a script that completes the options of ferrorun in a shell, e.g. bash, zsh or tcsh, and exit. Needs the package shtab.",
    )
    parser.add_argument("training_script", type=str, help="Script, module or command to run in each worker.")
    parser.add_argument("training_script_args", nargs=REMAINDER, help="Arguments of the script.")
    return parser
