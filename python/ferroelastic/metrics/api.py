"""Mirror of ``torch.distributed.elastic.metrics.api``.

Intended differences: without a handler of this module, the handler configured in torch's module is used. :func:`prof` measures
durations with the monotonic clock.
"""

from __future__ import annotations

import abc
import time
import warnings
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, overload

from ferroelastic._compat import TorchVirtual, torch_module

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ConsoleMetricHandler",
    "MetricData",
    "MetricHandler",
    "MetricStream",
    "MetricsConfig",
    "NullMetricHandler",
    "configure",
    "getStream",
    "get_elapsed_time_ms",
    "initialize_metrics",
    "prof",
    "profile",
    "publish_metric",
    "put_metric",
]

P = ParamSpec("P")
R = TypeVar("R")


class MetricData(NamedTuple):
    """One data point."""

    timestamp: float
    """Seconds since the epoch."""
    group_name: str
    name: str
    value: int


class MetricsConfig:
    """Parameters for :func:`initialize_metrics`. Mirrors ``torch.distributed.elastic.metrics.MetricsConfig``.

    Args:
        params: the parameters, by name.
    """

    __slots__ = ["params"]

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = {} if params is None else params


class MetricHandler(TorchVirtual, abc.ABC):
    """Destination of data points. Mirrors ``torch.distributed.elastic.metrics.MetricHandler``."""

    @abc.abstractmethod
    def emit(self, metric_data: MetricData) -> None:
        """Emit one data point."""


class ConsoleMetricHandler(MetricHandler):
    """Prints data points to standard output."""

    def emit(self, metric_data: MetricData) -> None:
        """Print one data point."""
        print(  # noqa: T201 - its purpose
            f"[{metric_data.timestamp}][{metric_data.group_name}]: {metric_data.name}={metric_data.value}"
        )


class NullMetricHandler(MetricHandler):
    """Discards data points."""

    def emit(self, metric_data: MetricData) -> None:
        """Do nothing."""


class MetricStream:
    """A group of metrics with its handler.

    Args:
        group_name: name of the group.
        handler: destination of the data points.
    """

    def __init__(self, group_name: str, handler: MetricHandler) -> None:
        self.group_name = group_name
        self.handler = handler

    def add_value(self, metric_name: str, metric_value: int) -> None:
        """Emit one data point with the current time."""
        self.handler.emit(MetricData(time.time(), self.group_name, metric_name, metric_value))


_metrics_map: dict[str, MetricHandler] = {}
_default_metrics_handler: MetricHandler = NullMetricHandler()
_unconfigured = _default_metrics_handler


def initialize_metrics(cfg: MetricsConfig | None = None) -> None:
    """Do nothing. Deployments may replace this hook. Mirrors ``torch.distributed.elastic.metrics.initialize_metrics``.

    Args:
        cfg: parameters for a replacement.
    """


def configure(handler: MetricHandler, group: str | None = None) -> None:
    """Set the handler of a group. Mirrors ``torch.distributed.elastic.metrics.configure``.

    Args:
        handler: destination of the data points.
        group: name of the group. ``None`` sets the handler of all groups without their own handler.
    """
    global _default_metrics_handler  # noqa: PLW0603 - process-wide, as torch's
    if group is None:
        _default_metrics_handler = handler
    else:
        _metrics_map[group] = handler


def getStream(group: str) -> MetricStream:  # noqa: N802 - torch's name
    """Return the stream of a group."""
    handler = _metrics_map.get(group)
    if handler is None:
        handler = _default_metrics_handler
        if handler is _unconfigured:
            torch_api = torch_module(__name__)
            default = getattr(torch_api, "_default_metrics_handler", handler)
            handler = getattr(torch_api, "_metrics_map", {}).get(group, default)
    return MetricStream(group, handler)


def _get_metric_name(fn: Callable[..., Any]) -> str:
    qualname = fn.__qualname__
    module = fn.__module__
    if "." in qualname or not module:
        return qualname
    return f"{module.rpartition('.')[2]}.{qualname}"


@overload
def prof(fn: Callable[P, R], group: str = ...) -> Callable[P, R]: ...
@overload
def prof(fn: None = None, group: str = ...) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def prof(fn: Callable[P, R] | None = None, group: str = "torchelastic") -> Any:
    """Decorate a function to publish its outcome and duration. Mirrors ``torch.distributed.elastic.metrics.prof``.

    The metrics are ``<name>.success`` or ``<name>.failure`` (value 1) and ``<name>.duration.ms``. ``<name>`` is
    ``Class.method`` or ``module.function``.

    Args:
        fn: the function.
        group: group of the metrics.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            key = _get_metric_name(function)
            start = time.monotonic()
            try:
                result = function(*args, **kwargs)
                put_metric(f"{key}.success", 1, group)
            except Exception:
                put_metric(f"{key}.failure", 1, group)
                raise
            finally:
                put_metric(f"{key}.duration.ms", int((time.monotonic() - start) * 1000), group)
            return result

        return wrapper

    return wrap(fn) if fn else wrap


def profile(group: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to publish its outcome and duration. Deprecated: use :func:`prof`.

    Args:
        group: group of the metrics.
    """
    warnings.warn("Deprecated, use `@prof` instead", FutureWarning, stacklevel=2)

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            # torch also passes its default group None.
            stream = getStream(group)  # type: ignore[arg-type]
            start = time.time()
            try:
                result = function(*args, **kwargs)
                stream.add_value(f"{function.__name__}.success", 1)
            except Exception:
                stream.add_value(f"{function.__name__}.failure", 1)
                raise
            finally:
                stream.add_value(f"{function.__name__}.duration.ms", get_elapsed_time_ms(start))
            return result

        return wrapper

    return wrap


def put_metric(metric_name: str, metric_value: int, metric_group: str = "torchelastic") -> None:
    """Publish a data point.

    Args:
        metric_name: name of the metric.
        metric_value: value of the metric.
        metric_group: group of the metric.
    """
    getStream(metric_group).add_value(metric_name, metric_value)


def publish_metric(metric_group: str, metric_name: str, metric_value: int) -> None:
    """Publish a data point. Deprecated: use :func:`put_metric`."""
    warnings.warn(
        "Deprecated, use `put_metric(metric_group)(metric_name, metric_value)` instead", FutureWarning, stacklevel=2
    )
    getStream(metric_group).add_value(metric_name, metric_value)


def get_elapsed_time_ms(start_time_in_seconds: float) -> int:
    """Return the milliseconds since ``start_time_in_seconds`` (seconds since the epoch, as returned by ``time.time()``)."""
    return int((time.time() - start_time_in_seconds) * 1000)
