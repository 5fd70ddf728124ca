"""Makes a pseudo-terminal the controlling terminal of a worker.

Also a program that does this and then executes another program. For a fast start it imports nothing of this package.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["take_terminal"]


def take_terminal(path: str, descriptors: list[int]) -> None:
    """Make a terminal the controlling terminal of this process, and this process group its foreground process group.

    This process must lead a session without a controlling terminal.

    Args:
        path: path of the terminal.
        descriptors: standard streams to open on the terminal.

    Raises:
        OSError: the terminal cannot be opened.
    """
    # The first terminal that a session leader opens becomes its controlling terminal.
    terminal = os.open(path, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(terminal, descriptor)
    if terminal not in descriptors:
        os.close(terminal)


def _main() -> None:
    # Undo the interpreter's signal dispositions: ignored signals stay ignored across exec.
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    _, path, descriptors, *argv = sys.argv
    take_terminal(path, list(map(int, descriptors.split(","))))
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - the worker's program, as the engine would execute it
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201 - the only report of this failure
        os._exit(127)


if __name__ == "__main__":
    _main()
