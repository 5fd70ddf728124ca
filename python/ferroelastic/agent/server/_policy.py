"""The restart policy of a job: its settings, and the hook for policies of a program. Not in torch.

The settings apply to the whole job and must be the same on all nodes, except ``progress_file``. The native rendezvous decides once for all
nodes. With other rendezvous handlers each agent decides for its node.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from ferroelastic._checks import check_type
from ferroelastic.utils import _threads
from ferroelastic.utils.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NO_RESTART_EXIT_CODE", "FailedRound", "RestartPolicy", "RestartSettings"]

logger = get_logger(__name__)

T = TypeVar("T")

NO_RESTART_EXIT_CODE = 97
"""Exit code of a worker that prevents a restart.

Shells use 126 to 165 and 255, ``sysexits.h`` 64 to 78, Python 1, 2 and 120, ``timeout`` and ``xargs`` 123 to 125, Rust 101. Codes below 128
are permanent failures for schedulers that distinguish.
"""

_HOOK_TIMEOUT_S = 5.0
_MAX_DELAY_S = 365 * 24 * 3600.0
_MAX_TEXT = 200


@dataclass(frozen=True)
class RestartSettings:
    """Settings of the restart policy. Each field has the name and the values of an option of ``ferrorun``.

    All fields except ``progress_file`` must be equal on all nodes of a job.

    Args:
        restart_backoff: delay in seconds of the restart after the second failure in a row right after the start. Each further failure
            doubles it. 0 for no delay.
        restart_backoff_max: the longest delay in seconds.
        healthy_window: seconds after which a round gives all restarts back. 0 means never.
        restart_rate: maximum number of restarts within a period, as ``"RESTARTS/SECONDS"``, or ``"none"``.
        fatal_exit_codes: exit codes, ranges and names of signals that end the job, separated by commas.
        fatal_causes: kinds and causes of failures that end the job, separated by commas.
        min_uptime: minimum uptime in seconds. A failure ends the job while no round has run for this time or made progress.
        restarts_without_progress: limit of restarts without progress in between; ``None`` for no limit.
        progress_file: pattern of the files whose change is progress; ``None`` for no files.
        on_node_failure: reaction to a node that leaves or is lost: ``"restart"``, ``"wait"`` or ``"exit"``.
        early_exit_timeout: seconds for which other workers may run on after a worker has ended with exit code 0. Then the round has
            failed. 0 means no limit.

    Raises:
        ValueError: a value is not valid.
    """

    restart_backoff: float = 0.25
    restart_backoff_max: float = 5.0
    healthy_window: float = 0.0
    restart_rate: str = "none"
    fatal_exit_codes: str = "none"
    fatal_causes: str = "stuck"
    min_uptime: float = 0.0
    restarts_without_progress: int | None = None
    progress_file: str | None = None
    on_node_failure: str = "restart"
    early_exit_timeout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        from ferroelastic._rust import RestartPolicy as NativePolicy

        NativePolicy(self.options(0), "")

    def options(self, max_restarts: float) -> dict[str, str]:
        """Return all settings by the name of their option, for the native module and for the other nodes.

        Args:
            max_restarts: maximum number of restarts.
        """
        idle = self.restarts_without_progress
        return {
            "--max-restarts": _number(max_restarts) if math.isfinite(max_restarts) else "none",
            "--restart-backoff": _number(self.restart_backoff),
            "--restart-backoff-max": _number(self.restart_backoff_max),
            "--healthy-window": _number(self.healthy_window),
            "--restart-rate": self.restart_rate,
            "--fatal-exit-codes": self.fatal_exit_codes,
            "--fatal-causes": self.fatal_causes,
            "--min-uptime": _number(self.min_uptime),
            "--restarts-without-progress": "none" if idle is None else _number(idle),
            "--on-node-failure": self.on_node_failure,
            "--early-exit-timeout": _number(self.early_exit_timeout),
        }


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12g}"


@dataclass(frozen=True)
class FailedRound:
    """A failure, as a restart policy sees it.

    Args:
        text: description of the failure.
        exit_code: exit code of the worker that failed first, or minus the signal that ended it. ``None`` if no worker has ended.
        causes: the kind of the failure and its known causes.
        rank: global rank of the worker that failed first; ``None`` without one.
        uptime_s: seconds since the workers were started.
        restarts: number of former restarts that count against the limit.
        max_restarts: maximum number of restarts.
        has_progressed: whether the workers of this node have made progress since their start.
    """

    text: str
    exit_code: int | None
    causes: tuple[str, ...]
    rank: int | None
    uptime_s: float
    restarts: int
    max_restarts: int
    has_progressed: bool


class RestartPolicy(Protocol):
    """A program's own restart policy, for :class:`ferroelastic.agent.server.WorkerSpec` and :class:`ferroelastic.launcher.LaunchConfig`."""

    def decide(self, failure: FailedRound) -> str | float | None:
        """Decide on a failure of a worker of this node.

        The agent calls this in a thread and waits up to 5 seconds. If it raises, takes longer or returns another value, the agent logs a
        warning and applies the settings.

        Args:
            failure: the failure.

        Returns:
            ``None`` to apply the settings, a number for the delay of the restart in seconds, or the reason for the end of the job, as text.
            With a delay the limits of the settings still apply.
        """


def check_restart_policy(settings: Any, policy: Any) -> None:
    """Check the types of the settings and of a program's policy.

    Raises:
        TypeError: ``settings`` are no :class:`RestartSettings`, or ``policy`` has no method ``decide``.
    """
    check_type("restart_settings", settings, (RestartSettings, type(None)), "RestartSettings or None")
    if policy is not None and not callable(getattr(policy, "decide", None)):
        raise TypeError(f"restart_policy must have a method decide(), got {_text(policy)}")


class Verdict(NamedTuple):
    """The verdict of a program's policy."""

    final_reason: str | None = None
    delay_s: float | None = None


class TimedOut(Exception):  # noqa: N818 - an outcome
    """A call did not return in time."""


def call_with_timeout(function: Callable[[], T], name: str, timeout_s: float) -> T:
    """Call a function that may block, in a daemon thread.

    Args:
        function: the function.
        name: name of the thread.
        timeout_s: timeout in seconds.

    Returns:
        The value of the function.

    Raises:
        TimedOut: the function did not return in time. It keeps its thread.
        RuntimeError: the function raised an exception that is no :class:`Exception`, such as ``SystemExit``.
        Exception: the function raised it.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller
            errors.append(error)

    thread = threading.Thread(target=body, name=name, daemon=True)
    _threads.start(thread)
    thread.join(timeout_s)
    if results:
        return results[0]
    if not errors:
        raise TimedOut
    if isinstance(errors[0], Exception):
        raise errors[0]
    raise RuntimeError(f"{type(errors[0]).__name__} ended the call") from errors[0]


def ask(policy: RestartPolicy, failure: FailedRound, timeout_s: float = _HOOK_TIMEOUT_S) -> Verdict:
    """Ask a program's policy for its verdict. Without a valid verdict, log a warning; the settings apply.

    Args:
        policy: the policy.
        failure: the failure.
        timeout_s: timeout in seconds.
    """
    try:
        value: Any = call_with_timeout(lambda: policy.decide(failure), "ferro-policy", timeout_s)
    except TimedOut:
        logger.warning("the restart policy %s did not return within %g s: the settings apply", _text(policy), timeout_s)
        return Verdict()
    except Exception:
        logger.warning("the restart policy %s failed: the settings apply", _text(policy), exc_info=True)
        return Verdict()
    if value is None:
        return Verdict()
    if isinstance(value, str) and value.strip():
        reason = " ".join(value.split())
        return Verdict(final_reason=reason.encode("utf-8", "backslashreplace").decode())
    # A comparison with an integer of any size is exact, and one with NaN is false.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_DELAY_S:
        return Verdict(delay_s=float(value))
    logger.warning(
        "the restart policy %s returned %s, which is neither None, a delay of up to a year in seconds nor a reason: the settings apply",
        *(_text(policy), _text(value)),
    )
    return Verdict()


def _text(value: object) -> str:
    try:
        return repr(value)[:_MAX_TEXT]
    except Exception as error:  # noqa: BLE001 - of the program's own class
        return f"<{type(value).__name__} whose repr() raises {type(error).__name__}>"
