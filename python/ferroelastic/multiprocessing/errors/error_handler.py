"""Mirror of ``torch.distributed.elastic.multiprocessing.errors.error_handler``.

Intended differences:

* An error file is written under a temporary name and renamed, so a reader never sees an incomplete file.
* A failure to write the error file is a warning. It never replaces the recorded exception, even if warnings are errors.
* If formatting an exception fails, the available parts are written.
* The traceback is that of the recorded exception, not of the exception in flight.
* The file also has the time in nanoseconds (``timestamp_ns``).
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import Any

from ferroelastic._failure.error_file import read_json
from ferroelastic._text import describe_error, format_traceback, warn
from ferroelastic.utils.logging import get_logger

__all__ = ["ErrorHandler"]

logger = get_logger(__name__)


class ErrorHandler:
    """Writes exceptions as JSON to the file in the environment variable ``TORCHELASTIC_ERROR_FILE``.

    Mirrors ``torch.distributed.elastic.multiprocessing.errors.error_handler.ErrorHandler``. If the variable is not set, nothing is written.
    Subclasses may override each public method. ``record`` and :class:`ChildFailedError` call them.

    Attributes:
        _fn_name: qualified name of the decorated function, ``None`` if it is unknown. torch's subclasses read it.
    """

    _fn_name: str | None = None

    def set_entrypoint_fn_name(self, fn_name: str | None) -> None:
        """Store the name of the function that ``record`` decorates. Called before :meth:`initialize`.

        Args:
            fn_name: qualified name of the function; ``None`` for a callable without one.
        """
        self._fn_name = fn_name

    def _get_error_file_path(self) -> str | None:
        """Return the path of the error file; ``None`` writes no file."""
        return os.environ.get("TORCHELASTIC_ERROR_FILE")

    def initialize(self) -> None:
        """Enable ``faulthandler``, so fatal signals print a traceback. Call this before code that may fail."""
        import faulthandler

        try:
            faulthandler.enable(all_threads=True)
        except Exception as error:  # noqa: BLE001 - the program also runs without faulthandler
            warn(f"Unable to enable fault handler. {describe_error(error)}")

    def _write_error_file(self, file_path: str, error_msg: str) -> None:
        """Write ``error_msg`` to the file atomically if possible. A failure is a warning."""
        try:
            if not _replace_file(file_path, error_msg):
                with open(file_path, "w") as file:
                    file.write(error_msg)
        except (OSError, ValueError) as error:  # ValueError: the path is not valid
            warn(f"Unable to write error to file. {describe_error(error)}")

    def record_exception(self, e: BaseException) -> None:
        """Write an exception with its traceback to the error file.

        Args:
            e: the exception.
        """
        if self._fn_name:
            logger.debug("recording an exception of %s", self._fn_name)
        file_path = self._get_error_file_path()
        if not file_path:
            return
        now_ns = time.time_ns()
        data = {
            "message": {
                "message": describe_error(e),
                "extraInfo": {
                    "py_callstack": format_traceback(e),
                    "timestamp": str(now_ns // 1_000_000_000),
                    "timestamp_ns": str(now_ns),
                },
            }
        }
        self._write_error_file(file_path, json.dumps(data))

    def record_success(self) -> None:
        """Called when the decorated function has returned. Its exceptions are not recorded as exceptions of the function."""
        if self._fn_name:
            logger.debug("%s has returned", self._fn_name)

    def maybe_enrich_signal_failure_message(self, message: str, error_file: str) -> str:
        """Return the text for the report of a worker that a signal ended. Subclasses may add facts, such as a fault of its device.

        Args:
            message: the text without such facts.
            error_file: path of the worker's error file, ``"<N/A>"`` without one.
        """
        del error_file
        return message

    def override_error_code_in_rootcause_data(
        self,
        rootcause_error_file: str,
        rootcause_error: dict[str, Any],
        error_code: int = 0,
    ) -> None:
        """Add the exit code to the error data of a child. A process cannot know its own exit code when it writes the file.

        Args:
            rootcause_error_file: path of the child's error file, for messages.
            rootcause_error: error data, changed in place.
            error_code: exit code of the child.
        """
        message = rootcause_error.get("message")
        if message is None:
            logger.warning(
                "child error file (%s) does not have field `message`. \ncannot override error code: %s",
                rootcause_error_file,
                error_code,
            )
        elif isinstance(message, dict):
            message["errorCode"] = error_code
        else:
            logger.warning(
                "child error file (%s) has a new message format. \nskipping error code override", rootcause_error_file
            )

    def dump_error_file(self, rootcause_error_file: str, error_code: int = 0) -> None:
        """Copy the error file of a child to the error file of this process.

        A file that cannot be read is logged and not copied.

        Args:
            rootcause_error_file: path of the child's error file.
            error_code: exit code of the child; 0 if unknown.
        """
        try:
            rootcause_error = read_json(rootcause_error_file)
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("failed to copy the child error file %s: %s", rootcause_error_file, error)
            return
        if error_code and isinstance(rootcause_error, dict):
            self.override_error_code_in_rootcause_data(rootcause_error_file, rootcause_error, error_code)

        my_error_file = self._get_error_file_path()
        if not my_error_file:
            logger.error("no error file defined for parent, to copy child error file (%s)", rootcause_error_file)
            return
        self._rm(my_error_file)
        self._write_error_file(my_error_file, json.dumps(rootcause_error))
        logger.info("dumped error file to parent's %s", my_error_file)

    def _rm(self, my_error_file: str) -> None:
        """Log the content of an error file before it is overwritten.

        The file exists if a child has written to the parent's error file before it had its own.
        """
        try:
            with open(my_error_file) as file:
                original = file.read()
        except (OSError, ValueError):
            return
        if original:
            logger.warning("%s already exists and will be overwritten. Original contents:\n%s", my_error_file, original)


def _replace_file(path: str, text: str) -> bool:
    """Write a file under a temporary name and rename it; return ``False`` if ``path`` cannot be replaced.

    Devices, pipes and bind-mounted files (Kubernetes' ``/dev/termination-log``) cannot be replaced.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        return False
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w") as file:
            file.write(text)
        os.replace(temporary, target)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        return False
    return True
