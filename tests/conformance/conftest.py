"""The same test bodies on torch's implementation and on ours."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs
from tests.conformance.implementations import OURS, TORCH, Implementation
from tests.support.leaks import HANDLED_SIGNALS, children, descriptors
from tests.support.torch_versions import CHANGES, has
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# find_spec, because nothing here may import torch before the first of these tests runs.
_IS_COMPLETE = importlib.util.find_spec("torch") and importlib.util.find_spec("ferroelastic._rust")
# The tests of warm workers compare with Python, not with torch.
collect_ignore_glob = [] if _IS_COMPLETE else ["test_[!w]*.py", "test_w[!a]*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "uses_torch: torch's implementation is at work, which leaves threads and files behind"
    )
    config.addinivalue_line(
        "markers",
        "needs(change): the test needs this entry of torch_versions.CHANGES, which older versions of torch lack",
    )
    config.addinivalue_line(
        "markers", "defect(reason): ours does not do yet what torch does; whoever mends it strikes this"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run these tests last: from the first of them on torch is loaded, and the others are to run without it."""
    here = Path(__file__).parent
    items.sort(key=lambda item: here in item.path.parents)
    for item in items:
        implementation = item.callspec.params.get("impl") if hasattr(item, "callspec") else None
        defect = item.get_closest_marker("defect")
        if defect is not None and implementation in {OURS, None}:
            item.add_marker(pytest.mark.xfail(strict=True, reason=defect.args[0]))
        for needed in item.iter_markers("needs"):
            (change,) = needed.args
            one = CHANGES[change]
            if not has(change) and (implementation != OURS or one.is_followed):
                item.add_marker(pytest.mark.skip(reason=f"since torch {one.since}: {one.of}: {one.text}"))
        if implementation == TORCH:
            item.add_marker("uses_torch")
            # torch closes the log files of a program only if it had to stop the program.
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"))


@pytest.fixture(scope="session", autouse=True)
def _torch_is_loaded() -> Iterator[None]:
    if not _IS_COMPLETE:
        yield
        return
    # Ours makes its objects instances of torch's classes where those are loaded. Here they always are.
    for path in ("run", "launcher", "agent.server", "multiprocessing", "control_plane", "rendezvous.registry"):
        Implementation(TORCH)(path)
    import torch.distributed

    # libuv's pipe for signals is made once per process, by the first store.
    torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # The check for leaks collects garbage after every test. Without this it would look at all of torch each time.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", params=[OURS, TORCH])
def impl(request: pytest.FixtureRequest, _torch_is_loaded: None) -> Implementation:
    """One of the two implementations."""
    return Implementation(request.param)


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold our implementation to the rules of all tests, and torch's to those that it keeps."""
    uses_torch = request.node.get_closest_marker("uses_torch") is not None
    if not uses_torch:
        request.getfixturevalue("_nothing_left_behind")
        yield
        return
    # torch leaves threads (of its rendezvous and its log tailers), semaphores of its result queues and the files of both
    # behind until they are garbage, or for good. Processes it must not leave: they would disturb the tests that follow.
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    before, descriptors_before = children(), descriptors()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if descriptors().keys() - descriptors_before.keys():
        gc.collect()  # here, where its warnings of unclosed files are expected
    assert eventually(lambda: not children().keys() - before.keys()), f"left behind: {children()}"


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Give each test the environment of a process that no agent has started; launchers change it for good."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC_", "TORCH_ELASTIC_", "PET_")) or name in {"LOGLEVEL", "CUDA_VISIBLE_DEVICES"}:
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _own_error_data() -> Iterator[None]:
    """Undo what failures leave in the dictionary that torch's share ("no-shared-default")."""
    yield
    if _IS_COMPLETE:
        Implementation(TORCH).errors._EMPTY_ERROR_DATA.pop("errorTraits", None)


@pytest.fixture
def store() -> Any:
    """A store of torch within this process."""
    import torch.distributed

    return torch.distributed.HashStore()


@pytest.fixture
def metric_log(impl: Implementation) -> Iterator[stubs.MetricLog]:
    """What is published while the test runs."""
    api = impl("metrics.api")
    default, by_group = api._default_metrics_handler, dict(api._metrics_map)
    recorder = stubs.metric_log(impl)
    api.configure(recorder)
    yield recorder
    api._default_metrics_handler = default
    api._metrics_map.clear()
    api._metrics_map.update(by_group)


@pytest.fixture
def event_log(impl: Implementation, request: pytest.FixtureRequest) -> Iterator[stubs.EventLog]:
    """A destination for events that keeps them: ``event_log.name``."""
    handlers, loggers = impl("events.handlers")._log_handlers, impl("events")._events_loggers
    log = stubs.EventLog(f"probe-{impl}-{request.node.name}")
    handlers[log.name] = log
    yield log
    del handlers[log.name]
    loggers.pop(log.name, None)
    logging.getLogger(f"torchelastic-events-{log.name}").removeHandler(log)


@pytest.fixture
def make_local_agent(impl: Implementation, store: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Build a ``LocalElasticAgent``.

    ``make_local_agent(entrypoint, arguments…, nproc=, agent=options of the agent, **fields of the specification)``.
    """
    agents: list[Any] = []

    def build(entrypoint: Any, *args: Any, nproc: int = 2, agent: dict[str, Any] | None = None, **fields: Any) -> Any:
        options = {"start_method": "fork", "exit_barrier_timeout": 60, **(agent or {})}
        std = impl.mp.Std
        specs = impl.mp.DefaultLogsSpecs(
            str(tmp_path / "logs"),
            std[options.pop("redirects", "NONE")],
            std[options.pop("tee", "NONE")],
            options.pop("local_ranks_filter", None),
        )
        handler = fields.pop("rdzv_handler", None) or stubs.rendezvous(impl, store)
        spec = stubs.spec(
            impl,
            handler,
            **{"local_world_size": nproc, "max_restarts": 0, "monitor_interval": 0.02} | fields,
            entrypoint=entrypoint,
            args=args,
        )
        module = impl("agent.server.local_elastic_agent")
        agents.append(module.LocalElasticAgent(spec, specs, **options))
        return agents[-1]

    yield build
    timeout = [5] if has("shutdown-timeout") or not impl.is_torch else []
    for one in agents:
        one._shutdown(signal.SIGKILL, *timeout)
        one._pcontext = None


@pytest.fixture
def start(impl: Implementation, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts one worker per tuple of arguments: ``start(entrypoint, arguments of rank 0, …)``."""
    contexts = []

    def build(entrypoint: Any, *args: tuple[Any, ...], **options: Any) -> Any:
        std = impl.mp.Std
        folder = options.pop("log_dir", str(tmp_path / "logs"))
        specs = impl.mp.DefaultLogsSpecs(
            folder,
            options.pop("redirects", std.NONE),
            options.pop("tee", std.NONE),
            options.pop("local_ranks_filter", None),
        )
        env = options.pop("env", {})
        contexts.append(
            impl.mp.start_processes(
                name=options.pop("name", "worker"),
                entrypoint=entrypoint,
                args=dict(enumerate(args)),
                envs={rank: {"RANK": str(rank), **env} for rank in range(len(args))},
                logs_specs=options.pop("logs_specs", specs),
                **({"start_method": "fork"} | options),
            )
        )
        return contexts[-1]

    yield build
    for context in contexts:
        context.close(signal.SIGKILL, 1)
    contexts.clear()  # pytest holds on to `build` while it looks for leaks


@pytest.fixture
def shell(start: Callable[..., Any]) -> Callable[..., Any]:
    """Starts one shell script per rank."""

    def build(*scripts: str, **options: Any) -> Any:
        return start("/bin/sh", *(("-c", script) for script in scripts), **options)

    return build
