"""Giving the terminal of the agent to one worker (``--interactive-rank``).

Each worker leads a session of its own, and a session can only have a terminal that no other session has. So the worker gets a
pseudo-terminal, of which it is the foreground process group, and the agent copies between the two, as ``srun --pty`` does. The agent
stays the foreground process group of the real terminal: Ctrl-C and Ctrl-Z reach it as in any other job.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ferroelastic.multiprocessing import _on_terminal
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["NO_TERMINAL", "Terminal"]

logger = get_logger(__name__)

NO_TERMINAL = "standard input is no terminal; start ferrorun at one, without a redirection of standard input"
"""Why there is nothing to give, and the remedy."""

_CHUNK = 4096
_PATIENCE_S = 0.5
_HANGUP = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Terminal:
    """A pseudo-terminal through which one worker has the terminal on standard input of this process.

    Standard output and standard error of the worker are on it too where those of this process are terminals.

    Raises:
        ValueError: standard input is no terminal.
        OSError: there is no pseudo-terminal or no descriptor left.

    Attributes:
        path: the worker's end.
        descriptors: standard streams of the worker that it is for.
    """

    def __init__(self) -> None:
        import pty

        if not os.isatty(0):
            raise ValueError(NO_TERMINAL)
        self.descriptors = [0, *(descriptor for descriptor in (1, 2) if os.isatty(descriptor))]
        # The last one: standard error if it is a terminal, then standard output. Standard input may be open for reading only.
        self._output_fd = self.descriptors[-1]
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            # The agent keeps the worker's end open. Otherwise the other end reports a hangup until the worker opens it.
            self._master_fd, self._slave_fd = pty.openpty()
        except OSError:
            os.close(self._wake_fd)
            raise
        os.set_blocking(self._master_fd, False)
        self.path = os.ttyname(self._slave_fd)
        self._former: list[Any] | None = None
        self._former_handlers: dict[int, Any] = {}
        self._end_mark = b""
        self._thread = threading.Thread(target=self._copy, name="ferro-terminal", daemon=True)

    def command(self, argv: Sequence[str]) -> tuple[str, ...]:
        """Arguments of a program that takes the terminal and then executes ``argv``."""
        descriptors = ",".join(map(str, self.descriptors))
        return (sys.executable, "-I", "-S", _on_terminal.__file__, self.path, descriptors, *argv)

    def start(self) -> None:
        """Hand over what is typed from now on."""
        import termios

        self._former = termios.tcgetattr(0)
        mode = list(self._former)
        # Line ends are made by the real terminal, for all ranks.
        mode[1] &= ~termios.OPOST
        termios.tcsetattr(self._slave_fd, termios.TCSANOW, mode)
        self._take_over()
        if threading.current_thread() is threading.main_thread():
            self._handle(signal.SIGWINCH, self._copy_size)
            # The shell has set the terminal to its own liking while this process was stopped.
            self._handle(signal.SIGCONT, self._take_over)
        self._thread.start()

    def close(self) -> None:
        """Show what the worker has written last, and bring the terminal back to what it was. Safe to call again."""
        if self._master_fd < 0:
            return
        for number, former in self._former_handlers.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former_handlers.clear()
        if self._thread.ident is not None:
            # What is written to a terminal arrives in order, so everything before this mark has been read when it is.
            self._end_mark = b"\0" + os.urandom(16).hex().encode() + b"\0"
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join(_PATIENCE_S)
        self._give_back()
        if self._thread.is_alive():
            logger.warning(
                "The terminal has taken nothing for %g s; the last words of the interactive rank are lost", _PATIENCE_S
            )
            return  # it ends with the process, and needs its descriptors
        for descriptor in (self._master_fd, self._slave_fd, self._wake_fd):
            os.close(descriptor)
        self._master_fd = -1

    # ---- the real terminal

    def _take_over(self) -> None:
        """Let every key through, but for those that send a signal. In the background this stops the process, as for any program."""
        import termios

        if self._former is None:
            return
        mode = list(self._former)
        mode[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP)
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ECHONL | termios.IEXTEN)
        # A read never waits, whoever else may have taken what was there.
        mode[6] = list(mode[6])
        mode[6][termios.VMIN] = mode[6][termios.VTIME] = 0
        with suppress(termios.error):  # it has hung up
            termios.tcsetattr(0, termios.TCSANOW, mode)
        self._copy_size()

    def _give_back(self) -> None:
        import termios

        former, self._former = self._former, None
        try:
            in_background = os.tcgetpgrp(0) != os.getpgrp()
        except OSError:  # not the controlling terminal: there is no background
            in_background = False
        # In the background the terminal is as the shell wants it.
        if former is not None and not in_background:
            with suppress(termios.error):  # it has hung up
                termios.tcsetattr(0, termios.TCSANOW, former)

    def _copy_size(self) -> None:
        import fcntl
        import termios

        with suppress(OSError):  # it has hung up
            fcntl.ioctl(self._master_fd, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))

    def _handle(self, number: int, action: Callable[[], None]) -> None:
        former = signal.getsignal(number)

        def handle(signum: int, frame: Any) -> None:
            action()
            if callable(former):
                former(signum, frame)

        self._former_handlers[number] = signal.signal(number, handle)

    # ---- the thread that copies

    def _copy(self) -> None:
        # Only the signals that the terminal sends to a reader or writer in the background.
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - {signal.SIGTTIN, signal.SIGTTOU})
        typed = b""
        has_input = True
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        while not self._end_mark:
            poller.register(self._master_fd, select.POLLIN | (select.POLLOUT if typed else 0))
            if has_input and not typed:
                poller.register(0, select.POLLIN)
            else:
                with suppress(KeyError):
                    poller.unregister(0)
            events = dict(poller.poll())
            if events.get(self._master_fd, 0) & select.POLLIN:
                self._show(self._read_master())
            if events.get(0, 0) & select.POLLIN:
                try:
                    typed = os.read(0, _CHUNK)
                except OSError:  # it has hung up, or the process is in the background and cannot be stopped
                    has_input = False
            elif events.get(0, 0) & _HANGUP:
                has_input = False
            if typed:
                with suppress(BlockingIOError):
                    typed = typed[os.write(self._master_fd, typed) :]
        self._show(self._rest())

    def _read_master(self) -> bytes:
        try:
            return os.read(self._master_fd, _CHUNK)
        except OSError:  # nothing is there
            return b""

    def _rest(self) -> bytes:
        """What the worker has written and nobody has read yet; it has ended."""
        os.set_blocking(self._slave_fd, False)
        found = b""
        try:
            os.write(self._slave_fd, self._end_mark)
        except OSError:
            # Output was suspended, and the mark does not fit.
            while more := self._read_master():
                found += more
            return found
        poller = select.poll()
        poller.register(self._master_fd, select.POLLIN)
        while self._end_mark not in found:
            poller.poll()
            found += self._read_master()
        return found[: found.index(self._end_mark)]

    def _show(self, output: bytes) -> None:
        while output:
            try:
                output = output[os.write(self._output_fd, output) :]
            except BlockingIOError:  # noqa: PERF203 - it is what the loop is for
                poller = select.poll()
                poller.register(self._output_fd, select.POLLOUT)
                poller.poll()
            except OSError:  # it has hung up
                return
