"""One instance of every class that programs meet, made by either implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.support.torch_versions import has

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.implementations import Implementation


class Store:
    """Stands for a store; nothing of it is used."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store)

    __hash__ = None  # type: ignore[assignment]  # compared by value


def failure(impl: Implementation) -> Any:
    return impl.errors.ProcessFailure(0, 1, -9, "")


def spec(impl: Implementation) -> Any:
    return impl.agent.WorkerSpec("role", 1, None, entrypoint="/bin/true")


def agent(impl: Implementation) -> Any:
    module = impl("agent.server.local_elastic_agent")
    return module.LocalElasticAgent(spec(impl), impl.mp.DefaultLogsSpecs("/dev/null"))


def context(impl: Implementation, name: str, *more: Any) -> Any:
    specs = impl.mp.DefaultLogsSpecs("/dev/null")
    return getattr(impl.mp, name)("x", "/bin/true", {0: ()}, {0: {}}, *more, specs)


def handler(impl: Implementation) -> Any:
    module = impl("multiprocessing.subprocess_handler")
    numa_options = (None,) if has("numa") else ()
    made = module.SubprocessHandler("/bin/true", (), {}, "", "", 0, *numa_options)
    made.proc.wait()
    return made


def launch_config(impl: Implementation) -> Any:
    return impl.launcher.api.LaunchConfig(1, 1, 1, logs_specs=impl.mp.DefaultLogsSpecs("/dev/null"))


def event(impl: Implementation) -> Any:
    return impl("events").Event("x", impl("events").EventSource.AGENT, metadata={"a": 1})


def rdzv_event(impl: Implementation) -> Any:
    return impl("events").RdzvEvent("n", "r", "m", "h", 1, impl("events").NodeState.INIT)


def store_info(impl: Implementation) -> Any:
    return impl.rendezvous.RendezvousStoreInfo("host", 1)


def _make(path: str, name: str, *arguments: Any) -> Callable[[Implementation], Any]:
    return lambda impl: getattr(impl(path), name)(*arguments)


# Where the class is -> how to make one.
SAMPLES: dict[str, Callable[[Implementation], Any]] = {
    "agent.server.api:Worker": _make("agent.server", "Worker", 0),
    "agent.server.api:WorkerGroup": lambda impl: impl.agent.WorkerGroup(spec(impl)),
    "agent.server.api:WorkerSpec": spec,
    "agent.server.api:RunResult": lambda impl: impl.agent.RunResult(
        impl.agent.WorkerState.FAILED, failures={0: failure(impl)}
    ),
    "agent.server.api:_RoleInstanceInfo": _make("agent.server.api", "_RoleInstanceInfo", "r", 0, 1),
    "agent.server.local_elastic_agent:LocalElasticAgent": agent,
    "agent.server.health_check_server:HealthCheckServer": _make(
        "agent.server.health_check_server", "HealthCheckServer", int, 1, 2
    ),
    "events.api:Event": event,
    "events.api:RdzvEvent": rdzv_event,
    "launcher.api:LaunchConfig": launch_config,
    "launcher.api:elastic_launch": lambda impl: impl.launcher.api.elastic_launch(launch_config(impl), "/bin/true"),
    "metrics.api:ConsoleMetricHandler": _make("metrics", "ConsoleMetricHandler"),
    "metrics.api:MetricData": _make("metrics", "MetricData", 1.5, "g", "n", 2),
    "metrics.api:MetricStream": _make("metrics.api", "MetricStream", "g", None),
    "metrics.api:MetricsConfig": _make("metrics", "MetricsConfig"),
    "multiprocessing.api:DefaultLogsSpecs": _make("multiprocessing", "DefaultLogsSpecs", "/dev/null"),
    "multiprocessing.api:LogsDest": _make("multiprocessing", "LogsDest", {0: "out"}),
    "multiprocessing.api:MultiprocessContext": lambda impl: context(impl, "MultiprocessContext", "spawn"),
    "multiprocessing.api:RunProcsResult": lambda impl: impl.mp.RunProcsResult(failures={0: failure(impl)}),
    "multiprocessing.api:SignalException": _make("multiprocessing", "SignalException", "told to end", 15),
    "multiprocessing.api:SubprocessContext": lambda impl: context(impl, "SubprocessContext"),
    "multiprocessing.errors:ChildFailedError": lambda impl: impl.errors.ChildFailedError("x", {0: failure(impl)}),
    "multiprocessing.errors:ProcessFailure": failure,
    "multiprocessing.errors.error_handler:ErrorHandler": _make("multiprocessing.errors", "ErrorHandler"),
    "multiprocessing.subprocess_handler.subprocess_handler:SubprocessHandler": handler,
    "multiprocessing.tail_log:TailLog": _make("multiprocessing.tail_log", "TailLog", "x", {}, None),
    "rendezvous.api:RendezvousClosedError": _make("rendezvous", "RendezvousClosedError", "closed"),
    "rendezvous.api:RendezvousConnectionError": _make("rendezvous", "RendezvousConnectionError", "lost"),
    "rendezvous.api:RendezvousError": _make("rendezvous", "RendezvousError", "failed", 5),
    "rendezvous.api:RendezvousGracefulExitError": _make("rendezvous", "RendezvousGracefulExitError", "not needed"),
    "rendezvous.api:RendezvousHandlerRegistry": _make("rendezvous", "RendezvousHandlerRegistry"),
    "rendezvous.api:RendezvousInfo": lambda impl: impl.rendezvous.RendezvousInfo(Store(), 0, 1, store_info(impl)),
    "rendezvous.api:RendezvousParameters": _make("rendezvous", "RendezvousParameters", "b", "e", "r", 1, 1),
    "rendezvous.api:RendezvousStateError": _make("rendezvous", "RendezvousStateError", "corrupt"),
    "rendezvous.api:RendezvousStoreInfo": store_info,
    "rendezvous.api:RendezvousTimeoutError": _make("rendezvous", "RendezvousTimeoutError", "late"),
    "timer.api:TimerRequest": _make("timer", "TimerRequest", 1, "scope", 2.5),
    "timer.file_based_local_timer:FileTimerClient": _make("timer", "FileTimerClient", "/nowhere"),
    "timer.file_based_local_timer:FileTimerRequest": _make("timer", "FileTimerRequest", 1, "scope", 2.5, 9),
    "timer.local_timer:LocalTimerClient": _make("timer", "LocalTimerClient", None),
    "timer.local_timer:LocalTimerServer": _make("timer", "LocalTimerServer", None),
    "timer.local_timer:MultiprocessingRequestQueue": _make("timer.local_timer", "MultiprocessingRequestQueue", None),
}
if has("numa"):
    SAMPLES["numa.binding:NumaOptions"] = lambda impl: impl("numa.binding").NumaOptions(
        impl("numa.binding").AffinityMode.NODE
    )
