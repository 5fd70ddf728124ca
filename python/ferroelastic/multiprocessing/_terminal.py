"""Gives the terminal of the agent to one worker (``--interactive-rank``).

Each worker leads its own session, and a terminal can control only one session. The worker therefore gets a pseudo-terminal and is its
foreground process group. The agent copies between the pseudo-terminal and the real terminal, as ``srun --pty`` does. The agent stays in
the foreground process group of the real terminal, so Ctrl-C and Ctrl-Z reach the agent.
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

NO_TERMINAL = "standard input is not a terminal; start ferrorun in a terminal and do not redirect standard input"
"""Error message for an interactive rank without a terminal."""

_CHUNK = 4096
_CLOSE_TIMEOUT_S = 0.5
_HANGUP = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Terminal:
    """A pseudo-terminal that connects one worker with the terminal on standard input of this process.

    Standard output and standard error of the worker use the pseudo-terminal if those of this process are terminals.

    Raises:
        ValueError: standard input is not a terminal.
        OSError: the limit of pseudo-terminals or of open descriptors is reached.

    Attributes:
        path: path of the worker's end.
        descriptors: standard streams of the worker that use the pseudo-terminal.
    """

    def __init__(self) -> None:
        import pty

        if not os.isatty(0):
            raise ValueError(NO_TERMINAL)
        self.descriptors = [0, *(descriptor for descriptor in (1, 2) if os.isatty(descriptor))]
        # Prefer standard error or standard output, because standard input may be read-only.
        self._output_fd = self.descriptors[-1]
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            # The agent keeps the worker's end open. Otherwise the master end reports a hangup until the worker opens it.
            self._master_fd, self._slave_fd = pty.openpty()
        except OSError:
            os.close(self._wake_fd)
            raise
        os.set_blocking(self._master_fd, False)
        self.path = os.ttyname(self._slave_fd)
        self._saved_mode: list[Any] | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._end_mark = b""
        self._thread = threading.Thread(target=self._copy, name="ferro-terminal", daemon=True)

    def command(self, argv: Sequence[str]) -> tuple[str, ...]:
        """Return the arguments of a program that takes the pseudo-terminal as its controlling terminal and executes ``argv``."""
        descriptors = ",".join(map(str, self.descriptors))
        return (sys.executable, "-I", "-S", _on_terminal.__file__, self.path, descriptors, *argv)

    def start(self) -> None:
        """Start to copy between the two terminals."""
        import termios

        self._saved_mode = termios.tcgetattr(0)
        mode = list(self._saved_mode)
        # The real terminal converts line ends, also for the other ranks.
        mode[1] &= ~termios.OPOST
        termios.tcsetattr(self._slave_fd, termios.TCSANOW, mode)
        self._set_raw_mode()
        if threading.current_thread() is threading.main_thread():
            self._install_handler(signal.SIGWINCH, self._copy_size)
            # The shell has changed the terminal mode while this process was stopped.
            self._install_handler(signal.SIGCONT, self._set_raw_mode)
        self._thread.start()

    def close(self) -> None:
        """Write the worker's remaining output and restore the mode of the terminal. Idempotent."""
        if self._master_fd < 0:
            return
        for number, previous in self._previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous_handlers.clear()
        if self._thread.ident is not None:
            # A terminal keeps the order of its bytes: once the mark is read, all earlier output has been read.
            self._end_mark = b"\0" + os.urandom(16).hex().encode() + b"\0"
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join(_CLOSE_TIMEOUT_S)
        self._restore_mode()
        if self._thread.is_alive():
            logger.warning(
                "the terminal accepted no output for %g s: the last output of the interactive rank is lost",
                _CLOSE_TIMEOUT_S,
            )
            return  # the thread runs until the process ends and still uses the descriptors
        for descriptor in (self._master_fd, self._slave_fd, self._wake_fd):
            os.close(descriptor)
        self._master_fd = -1

    # ---- the real terminal

    def _set_raw_mode(self) -> None:
        """Pass every key to the worker, except the keys that send a signal. In the background, tcsetattr stops this process (SIGTTOU)."""
        import termios

        if self._saved_mode is None:
            return
        mode = list(self._saved_mode)
        mode[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP)
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ECHONL | termios.IEXTEN)
        # A read must not block if another process has read the input first.
        mode[6] = list(mode[6])
        mode[6][termios.VMIN] = mode[6][termios.VTIME] = 0
        with suppress(termios.error):  # a hangup
            termios.tcsetattr(0, termios.TCSANOW, mode)
        self._copy_size()

    def _restore_mode(self) -> None:
        import termios

        previous, self._saved_mode = self._saved_mode, None
        try:
            in_background = os.tcgetpgrp(0) != os.getpgrp()
        except OSError:  # not the controlling terminal: there is no background
            in_background = False
        # In the background the shell owns the mode of the terminal.
        if previous is not None and not in_background:
            with suppress(termios.error):  # a hangup
                termios.tcsetattr(0, termios.TCSANOW, previous)

    def _copy_size(self) -> None:
        import fcntl
        import termios

        with suppress(OSError):  # a hangup
            fcntl.ioctl(self._master_fd, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))

    def _install_handler(self, number: int, action: Callable[[], None]) -> None:
        previous = signal.getsignal(number)

        def handle(signum: int, frame: Any) -> None:
            action()
            if callable(previous):
                previous(signum, frame)

        self._previous_handlers[number] = signal.signal(number, handle)

    # ---- the thread that copies

    def _copy(self) -> None:
        # Unblock only the signals that stop a background reader or writer.
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - {signal.SIGTTIN, signal.SIGTTOU})
        pending = b""
        has_input = True
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        while not self._end_mark:
            poller.register(self._master_fd, select.POLLIN | (select.POLLOUT if pending else 0))
            if has_input and not pending:
                poller.register(0, select.POLLIN)
            else:
                with suppress(KeyError):
                    poller.unregister(0)
            events = dict(poller.poll())
            if events.get(self._master_fd, 0) & select.POLLIN:
                self._write_output(self._read_master())
            if events.get(0, 0) & select.POLLIN:
                try:
                    pending = os.read(0, _CHUNK)
                except OSError:  # a hangup, or a process in an orphaned background group
                    has_input = False
            elif events.get(0, 0) & _HANGUP:
                has_input = False
            if pending:
                with suppress(BlockingIOError):
                    pending = pending[os.write(self._master_fd, pending) :]
        self._write_output(self._drain_master())

    def _read_master(self) -> bytes:
        try:
            return os.read(self._master_fd, _CHUNK)
        except OSError:  # no data
            return b""

    def _drain_master(self) -> bytes:
        """Return the unread output of the worker, which has ended."""
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

    def _write_output(self, output: bytes) -> None:
        while output:
            try:
                output = output[os.write(self._output_fd, output) :]
            except BlockingIOError:  # noqa: PERF203 - the loop waits for room
                poller = select.poll()
                poller.register(self._output_fd, select.POLLOUT)
                poller.poll()
            except OSError:  # a hangup
                return
