"""Error report and exit code of ``ferrorun`` for a failed job."""

import errno
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ferroelastic._exit_codes import FAILURE, SIGNAL_BASE, exit_code
from ferroelastic._ports import port_owner
from ferroelastic._text import format_traceback, message_of
from ferroelastic._usage import UsageError, named, working_directory

if TYPE_CHECKING:
    from ferroelastic._failure.model import Failure

_USAGE = 2
_STALL_TIMEOUT_S = 0.5


def report(error: BaseException, args: Namespace | None) -> int:
    """Write the cause of the failure to standard error, once, and return the exit code.

    Args:
        error: the exception that ended the job.
        args: the parsed command line, or ``None`` if it could not be parsed.

    Returns:
        The exit code of the first failed worker of all nodes; 128+n if signal n ended it or this process; 2 for a usage
        error, else 1.
    """
    if isinstance(error, KeyboardInterrupt):
        return SIGNAL_BASE + 2
    signal = getattr(error, "sigval", None)
    if signal is not None:  # SignalException: the agent has already logged it
        return SIGNAL_BASE + int(signal)
    failure: Failure | None = getattr(error, "job_failure", None)
    if failure is not None:
        _show(failure, getattr(args, "summary", "full"))
        return failure.job.exit_code
    first_failure = getattr(error, "get_first_failure", None)
    if first_failure is not None:  # ChildFailedError
        _, first = first_failure()
        _print(message_of(error).strip("\n"))
        return getattr(error, "exit_code", None) or exit_code(first.exitcode)
    if not isinstance(error, UsageError) and os.environ.get("LOGLEVEL", "").upper() == "DEBUG":
        _print(format_traceback(error).rstrip("\n"))
    _print(f"ferrorun: error: {' '.join(_describe(error, args).split())}")
    code: int | None = getattr(error, "exit_code", None)  # JobFailedError
    return code or (_USAGE if isinstance(error, ValueError) else FAILURE)


def _show(failure: "Failure", form: str) -> None:
    from ferroelastic._failure.box import render
    from ferroelastic._failure.save import report_of

    stream = sys.stderr
    has_colour = (
        stream is not None and stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    _print(render(failure, form, has_colour=has_colour, file=report_of(failure)))


def _print(text: str) -> None:
    from ferroelastic._console import stderr

    console = stderr()
    # The last output of this process: a slow reader gets all of it.
    is_read = console.finish(_STALL_TIMEOUT_S)
    console.write(f"{text}\n")
    if is_read:
        console.finish(_STALL_TIMEOUT_S)


def _describe(error: BaseException, args: Namespace | None) -> str:
    if isinstance(error, ValueError):
        return message_of(error)
    if isinstance(error, ImportError) and "_rust" in message_of(error):
        return (
            f"{error}; the native module is missing: install a wheel of ferroelastic for this system, or use torchrun"
        )
    chain = list(_chain(error))
    text = _describe_working_directory(chain)
    if text:
        return text
    if args is not None:
        text = _describe_spawn(chain, args) or _describe_port(error, chain, args) or _describe_log_dir(chain, args)
        if text:
            return text
    text = _text_of(chain) or type(error).__name__
    if _is_expected(error):
        return text
    return f"{type(error).__name__}: {text}; LOGLEVEL=DEBUG shows the traceback"


def _describe_working_directory(chain: list[BaseException]) -> str:
    """Describe a deleted working directory. The system's error does not name it."""
    is_relative = any(
        isinstance(link, FileNotFoundError)
        and getattr(link, "stage", None) is None  # not a program that could not be started
        and not os.path.isabs(str(link.filename or ""))
        for link in chain
    )
    if not is_relative:
        return ""
    try:
        working_directory()
    except UsageError as error:
        return str(error)
    return ""


def _is_expected(error: BaseException) -> bool:
    """Return whether the message explains the error: failures of the environment need no traceback."""
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "etcd"):
        return True
    names = [cls.__name__ for cls in type(error).__mro__]
    return isinstance(error, OSError) or "RendezvousError" in names or type(error) is RuntimeError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _text_of(chain: list[BaseException]) -> str:
    """Join the texts of a chain without repetitions: the outer text often only repeats or refers to the inner one."""
    kept: list[str] = []
    for link in chain:
        text = " ".join(re.sub(r"\[Errno \d+\] ", "", message_of(link)).split())
        # The reason of a system error is enough if an outer text has already described the operation.
        reason = getattr(link, "strerror", None) or text
        if any(text in other or reason in other for other in kept):
            continue
        kept = [other for other in kept if other not in text]
        kept.append(text)
    return ": ".join(filter(None, kept))


def _describe_spawn(chain: list[BaseException], args: Namespace) -> str:
    """Describe an entrypoint that could not be started (``SpawnError``)."""
    error = next((link for link in chain if getattr(link, "stage", None) is not None), None)
    if not isinstance(error, OSError):
        return ""
    remedies = {
        errno.EACCES: "allow it with chmod +x" if args.no_python else "check PYTHON_EXEC",
        errno.ENOENT: "check the path" if args.no_python else "check PYTHON_EXEC",
        errno.ENOEXEC: "give it a first line such as #!/bin/sh, or drop --no-python for a Python script",
    }
    text = _text_of([error])
    remedy = remedies.get(error.errno or 0)
    return f"{text}; {remedy}" if remedy else text


def _describe_log_dir(chain: list[BaseException], args: Namespace) -> str:
    if not args.log_dir:
        return ""
    for error in chain:
        if (
            isinstance(error, OSError)
            and error.errno != errno.EADDRINUSE  # the watchdog's pipe
            and (str(error.filename or "").startswith(args.log_dir) or args.log_dir in message_of(error))
        ):
            # Not the error's own text, which may contain the path and a remedy.
            reason = os.strerror(error.errno).lower() if error.errno else "it is a file"
            return (
                f"log folder {named('log_dir', args.log_dir)} cannot be written: {reason}; give another with --log-dir"
            )
    return ""


def _describe_port(error: BaseException, chain: list[BaseException], args: Namespace) -> str:
    """Describe a conflict on the rendezvous' port, with the process that listens on it."""
    # Errors of ports have no file name, those of the watchdog's pipe have one.
    in_use = any(
        getattr(link, "errno", None) == errno.EADDRINUSE or "address already in use" in message_of(link).lower()
        for link in chain
        if getattr(link, "filename", None) is None
    )
    if getattr(error, "was_refused", False):
        return ""
    if not in_use and not ("Rendezvous" in type(error).__name__ or isinstance(error, (ConnectionError, TimeoutError))):
        return ""
    host, port, flag = _endpoint(args)
    if not port:
        return ""
    owner = port_owner(port) if in_use or _is_here(host) else ""
    if not owner:
        return f"port {port} is in use by a process of another user; choose another with {flag}" if in_use else ""
    if in_use:
        return f"port {port} is in use by {owner}; end that process or choose another port with {flag}"
    return f"{_text_of(chain)}; port {port} of this host belongs to {owner}; if that is not the rendezvous, choose another port with {flag}"


def _endpoint(args: Namespace) -> tuple[str, int | None, str]:
    """Return host and port of the rendezvous and the option that sets the port. No port if the agent does not listen on it itself."""
    if args.rdzv_backend not in ("static", "c10d"):
        return "", None, ""
    if args.rdzv_backend == "static" and not args.rdzv_endpoint:
        return args.master_addr, args.master_port, "--master-port"
    from ferroelastic.rendezvous.utils import parse_rendezvous_endpoint

    try:
        host, port = parse_rendezvous_endpoint(args.rdzv_endpoint, default_port=29400)
    except ValueError:
        return "", None, ""
    return host, port, "--rdzv-endpoint"


def _is_here(host: str) -> bool:
    """Return whether a host is this machine. Does not query a resolver, which could delay the exit."""
    import socket

    import psutil

    if host in {"localhost", "::1", socket.gethostname()} or host.startswith("127."):
        return True
    return any(host == address.address for addresses in psutil.net_if_addrs().values() for address in addresses)
