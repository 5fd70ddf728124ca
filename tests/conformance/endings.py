"""A script that ends in one of many ways, or does one thing with an effect on its output: ``python endings.py NAME``.

Its output, its exit code and the text of its errors are compared between starts.
"""

import atexit
import os
import resource
import signal
import sys
import threading
import warnings
from contextlib import suppress
from typing import Any


def show_arguments() -> None:
    print(ascii(sys.argv), ascii(sys.orig_argv[-len(sys.argv) :]))
    with open("/proc/self/cmdline", "rb") as line:
        print(line.read().split(b"\0")[-len(sys.argv) - 1 :])
    print(ascii(sorted(entry for entry in os.environ.items() if entry[0].startswith("ODD"))))


def fail() -> None:
    try:
        {}["key"]  # type: ignore[index]
    except KeyError as error:
        raise ValueError("the value") from error


def fail_with_note() -> None:
    class OwnError(Exception):
        pass

    raise OwnError("two\nlines", 3)


def fail_in_thread() -> None:
    thread = threading.Thread(target=fail, name="own")
    thread.start()
    thread.join()


def fail_at_exit() -> None:
    atexit.register(fail)


def fail_in_destructor() -> None:
    class Own:
        def __del__(self) -> None:
            fail()

    globals()["kept"] = Own()


def end_in_order() -> None:
    class Own:
        def __del__(self) -> None:
            os.write(1, b"destructor\n")

    globals()["kept"] = Own()
    atexit.register(print, "first registered")
    atexit.register(print, "last registered")
    script_has_ended = threading.Event()

    def wait() -> None:
        script_has_ended.wait()
        threading.main_thread().join()
        print("thread")

    threading.Thread(target=wait).start()
    print("end of the script")
    script_has_ended.set()


def write_unflushed() -> None:
    print("a line")
    sys.stdout.write("no end of line")
    sys.stderr.write("an error without end of line")


def write_unflushed_and_leave() -> None:
    write_unflushed()
    os._exit(4)


def write_unflushed_and_fork() -> None:
    write_unflushed()
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        print("parent")
    else:
        print("child")


def write_much() -> None:
    for number in range(3000):
        print(number, "x" * 10)
        if number % 1000 == 0:
            os.write(1, b"directly\n")


def write_odd_text() -> None:
    print("\udc80ä€\r\n")
    print("\udc80ä€\r\n", file=sys.stderr)


def warn() -> None:
    warnings.warn("own", stacklevel=1)
    warnings.warn("deprecated", DeprecationWarning, stacklevel=1)


def read() -> None:
    print(repr(sys.stdin.readline()), repr(input("prompt ")), repr(sys.stdin.read()))


def trace() -> None:
    events: list[tuple[str, int]] = []

    def tracer(frame: Any, event: str, _: object) -> Any:
        events.append((event, frame.f_lineno))
        return tracer

    sys.settrace(tracer)
    print("traced")
    with suppress(ValueError):
        fail()
    sys.settrace(None)
    print(events)


def debug() -> None:
    import pdb  # noqa: T100 - a debugger is to be tried

    pdb.Pdb(nosigint=True).set_trace()
    print("after the debugger")


def crash(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), number)


def crash_with_stack() -> None:
    import faulthandler

    faulthandler.enable(all_threads=False)
    crash(signal.SIGABRT)


def abort() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()


def interrupt() -> None:
    raise KeyboardInterrupt


def handle_signal() -> None:
    signal.signal(signal.SIGTERM, lambda number, _: print("handled", number))
    signal.raise_signal(signal.SIGTERM)
    signal.alarm(1)
    signal.pause()


def recurse() -> None:
    recurse()


def execute() -> None:
    print("before")
    sys.stdout.flush()
    os.execv("/bin/sh", ["sh", "-c", "tr '\\0' '\\n' < /proc/$$/environ | sort | grep ^PYTHON; exit 5"])


def call_subprocess() -> None:
    import subprocess

    code = "import sys; print(sys.flags, sys.path, sys.warnoptions)"
    subprocess.run([sys.executable, "-c", code], check=True)


ENDINGS: dict[str, Any] = {
    "arguments": show_arguments,
    "end": lambda: None,
    "exit-3": lambda: sys.exit(3),
    "exit-text": lambda: sys.exit("text"),
    "exit-none": lambda: sys.exit(None),
    "exit-300": lambda: sys.exit(300),
    "exit-minus-1": lambda: sys.exit(-1),
    "exit-object": lambda: sys.exit([1, "ä"]),  # type: ignore[arg-type]
    "exit-true": lambda: sys.exit(True),
    "exit-huge": lambda: sys.exit(2**80),
    "os-exit": lambda: os._exit(4),
    "abort": abort,
    "interrupt": interrupt,
    "interrupt-signal": lambda: crash(signal.SIGINT),
    "sigterm": lambda: crash(signal.SIGTERM),
    "sigkill": lambda: crash(signal.SIGKILL),
    "sigsegv": lambda: crash(signal.SIGSEGV),
    "alarm": handle_signal,
    "stack": crash_with_stack,
    "error": fail,
    "own-error": fail_with_note,
    "error-in-thread": fail_in_thread,
    "error-at-exit": fail_at_exit,
    "error-in-destructor": fail_in_destructor,
    "recursion": recurse,
    "order": end_in_order,
    "unflushed": write_unflushed,
    "unflushed-os-exit": write_unflushed_and_leave,
    "unflushed-fork": write_unflushed_and_fork,
    "much": write_much,
    "odd-text": write_odd_text,
    "warning": warn,
    "read": read,
    "trace": trace,
    "debugger": debug,
    "exec": execute,
    "subprocess": call_subprocess,
}

if __name__ == "__main__":
    ENDINGS[sys.argv[1]]()
