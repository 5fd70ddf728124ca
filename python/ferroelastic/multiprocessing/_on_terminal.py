"""Taking a pseudo-terminal as the controlling terminal of a worker.

Also a program, which does so and then executes another one. It imports nothing of this package, so that it starts fast.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["take_terminal"]


def take_terminal(path: str, descriptors: list[int]) -> None:
    """Make a terminal the controlling one of this process, which must lead a session that has none.

    The process group of this process is the foreground process group of the terminal from then on.

    Args:
        path: the terminal.
        descriptors: standard streams to open on it.

    Raises:
        OSError: it cannot be opened.
    """
    # A leader of a session gets the first terminal that it opens.
    terminal = os.open(path, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(terminal, descriptor)
    if terminal not in descriptors:
        os.close(terminal)


def _main() -> None:
    # What the interpreter ignores or handles must not reach the program.
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    _, path, descriptors, *argv = sys.argv
    take_terminal(path, list(map(int, descriptors.split(","))))
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - the worker's program, as the engine would execute it
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201 - nobody else can tell
        os._exit(127)


if __name__ == "__main__":
    _main()
