"""``ferroelastic.install()``: programs that call torch's launcher use the agent of this package, until ``uninstall()``."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance import stubs, workers
from tests.conformance.implementations import OURS, TORCH, Implementation

import ferroelastic
from ferroelastic import _install

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.uses_torch, pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")]
torchs = Implementation(TORCH)

_CLASSES = (
    "ElasticAgent",
    "LocalElasticAgent",
    "RunResult",
    "SimpleElasticAgent",
    "Worker",
    "WorkerGroup",
    "WorkerSpec",
    "WorkerState",
)
_LAUNCHER = ("elastic_launch", "launch_agent")
NAMES: dict[str, tuple[str, ...]] = {
    "multiprocessing": ("start_processes",),
    "agent.server": _CLASSES,
    "agent.server.api": _CLASSES,
    "agent.server.local_elastic_agent": (*_CLASSES, "start_processes"),
    "launcher": _LAUNCHER,
    "launcher.api": (*_LAUNCHER, *_CLASSES),
    "run": ("elastic_launch", "main", "run"),
    "launch": ("run",),
}
"""Names that are replaced, by module. Some versions of torch do not have all of them in all of these modules."""


@pytest.fixture
def impl() -> Implementation:
    return Implementation(OURS)


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    _install._state.reported.clear()
    yield
    _install._withdraw()


def values() -> dict[str, object]:
    """The objects of all names of torch that are replaced."""
    return {
        f"{path}.{name}": vars(torchs(path))[name]
        for path, names in NAMES.items()
        for name in names
        if name in vars(torchs(path))
    }


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "ferroelastic"]


def test_each_name_is_ours_until_it_is_torchs_own_again() -> None:
    before = values()
    assert len(before) > 25
    ferroelastic.install()
    for name, value in values().items():
        assert value.__module__.startswith("ferroelastic."), name
    ferroelastic.uninstall()
    assert values() == before
    assert all(value is before[name] for name, value in values().items())


def test_modules_and_their_specs_stay_torchs() -> None:
    modules = {path: (torchs(path), torchs(path).__spec__, torchs(path).__loader__) for path in NAMES}
    ferroelastic.install()
    assert {path: (torchs(path), torchs(path).__spec__, torchs(path).__loader__) for path in NAMES} == modules


def test_a_second_call_changes_nothing() -> None:
    before = values()
    ferroelastic.install()
    ours, finders = values(), list(sys.meta_path)
    ferroelastic.install()
    assert (values(), sys.meta_path) == (ours, finders)
    ferroelastic.uninstall()
    assert values() == before
    assert _install._finder not in sys.meta_path


def test_uninstall_alone_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    before = values()
    with caplog.at_level(logging.WARNING):
        ferroelastic.uninstall()
    assert values() == before
    assert warnings(caplog) == ["uninstall() has no effect: install() was not called, or uninstall() was called before"]


def test_a_name_that_the_program_has_replaced_stays_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    module = torchs("launcher.api")
    theirs = module.launch_agent
    own = object()
    ferroelastic.install()
    module.launch_agent = own
    try:
        ferroelastic.install()
        with caplog.at_level(logging.WARNING):
            ferroelastic.uninstall()
        assert module.launch_agent is own
    finally:
        module.launch_agent = theirs
    assert warnings(caplog) == [
        "uninstall() does not change torch.distributed.launcher.api.launch_agent: the program has replaced it after install()"
    ]


def test_a_name_that_torch_lacks_is_skipped_and_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torchs("launcher.api"), "launch_agent")
    with caplog.at_level(logging.WARNING):
        ferroelastic.install()
        ferroelastic.uninstall()
        ferroelastic.install()
    assert torchs("launcher.api").elastic_launch.__module__ == "ferroelastic.launcher.api"
    assert warnings(caplog) == [
        "install() skips torch.distributed.launcher.api.launch_agent, which this version of torch does not have"
    ]


def test_another_object_of_the_same_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = object()
    monkeypatch.setattr(torchs("launcher"), "launch_agent", own)
    ferroelastic.install()
    assert torchs("launcher").launch_agent is own


@pytest.mark.parametrize("path", sorted(NAMES))
def test_a_reload_replaces_the_new_names_too(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in NAMES:
        for name, value in list(vars(torchs(other)).items()):
            monkeypatch.setattr(torchs(other), name, value)  # the objects of this test run, once it is over
    ferroelastic.install()
    importlib.reload(torchs(path))
    for name, value in values().items():
        assert value.__module__.startswith("ferroelastic."), name
    ferroelastic.uninstall()
    for name, value in values().items():
        assert value.__module__.startswith("torch."), name
        for base in getattr(value, "__mro__", ()):
            assert not base.__module__.startswith("ferroelastic."), name


def test_threads_that_install_at_the_same_time_install_once() -> None:
    before = values()
    barrier = threading.Barrier(8)
    seen: list[bool] = []

    def install() -> None:
        barrier.wait()
        ferroelastic.install()
        seen.append(all(value.__module__.startswith("ferroelastic.") for value in values().values()))

    threads = [threading.Thread(target=install) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8
    assert sys.meta_path.count(_install._finder) == 1
    ferroelastic.uninstall()
    assert values() == before


def test_objects_are_instances_of_torchs_own_classes(store: Any) -> None:
    original = torchs("agent.server.api")
    spec_class, agent_class = original.WorkerSpec, original.ElasticAgent
    local_class = torchs("agent.server.local_elastic_agent").LocalElasticAgent
    ferroelastic.install()
    spec = original.WorkerSpec("trainer", 1, stubs.rendezvous(torchs, store), entrypoint="true")
    agent = torchs("agent.server.local_elastic_agent").LocalElasticAgent(spec, None)
    assert isinstance(spec, spec_class)
    assert isinstance(agent, agent_class)
    assert isinstance(agent, local_class)


def test_a_running_agent_of_torch_is_reported(caplog: pytest.LogCaptureFixture, store: Any, tmp_path: Path) -> None:
    agent_class = torchs("agent.server.local_elastic_agent").LocalElasticAgent

    class Installing(agent_class):  # type: ignore[misc,valid-type]  # any class
        def _monitor_workers(self, worker_group: Any) -> Any:
            ferroelastic.install()
            return super()._monitor_workers(worker_group)

    spec = torchs.agent.WorkerSpec(
        "trainer",
        2,
        stubs.rendezvous(torchs, store),
        entrypoint="/bin/sh",
        args=("-c", "exit 0"),
        monitor_interval=0.02,
    )
    agent = Installing(spec, torchs.mp.DefaultLogsSpecs(str(tmp_path)), exit_barrier_timeout=5)
    with caplog.at_level(logging.WARNING):
        result = agent.run()
    assert not result.is_failed()
    assert warnings(caplog) == [
        "install() does not change an agent of torch that runs already; it takes effect for later ones"
    ]


def test_a_subclass_of_torchs_agent_runs_under_ours(store: Any, tmp_path: Path) -> None:
    ferroelastic.install()
    agent_class = torchs("agent.server.local_elastic_agent").LocalElasticAgent

    class Derived(agent_class):  # type: ignore[misc,valid-type]  # any class
        starts = 0

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            self.starts += 1
            spec = worker_group.spec
            self._pcontext = torchs.mp.start_processes(
                name=spec.role,
                entrypoint=spec.entrypoint,
                args=dict.fromkeys(range(2), spec.args),
                envs={rank: {"RANK": str(rank)} for rank in range(2)},
                logs_specs=self._logs_specs,
            )
            return dict(self._pcontext.pids())

    spec = torchs.agent.WorkerSpec(
        "trainer", 2, stubs.rendezvous(torchs, store), entrypoint="/bin/sh", args=("-c", "exit 3"), max_restarts=1
    )
    agent = Derived(spec, torchs.mp.DefaultLogsSpecs(str(tmp_path)), exit_barrier_timeout=5)
    result = agent.run()
    assert (agent.starts, {failure.exitcode for failure in result.failures.values()}) == (2, {3})
    assert agent._pcontext.native_group is not None


@pytest.mark.parametrize("script", ["exit 0", "exit 3"])
def test_a_subclass_of_torchs_context_works_under_our_agent(store: Any, tmp_path: Path, script: str) -> None:
    ferroelastic.install()
    agent_class = torchs("agent.server.local_elastic_agent").LocalElasticAgent

    class Context(torchs("multiprocessing.api").SubprocessContext):  # type: ignore[misc]  # any class
        closed = 0

        def _close(self, *arguments: Any, **named: Any) -> None:
            self.closed += 1
            super()._close(*arguments, **named)

    class Derived(agent_class):  # type: ignore[misc,valid-type]  # any class
        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            spec = worker_group.spec
            ranks = range(2)
            self._pcontext = Context(
                name=spec.role,
                entrypoint=spec.entrypoint,
                args=dict.fromkeys(ranks, spec.args),
                envs={rank: {"RANK": str(rank)} for rank in ranks},
                logs_specs=self._logs_specs,
            )
            self._pcontext.start()
            return dict(self._pcontext.pids())

    spec = torchs.agent.WorkerSpec(
        "trainer", 2, stubs.rendezvous(torchs, store), entrypoint="/bin/sh", args=("-c", script), max_restarts=0
    )
    agent = Derived(spec, torchs.mp.DefaultLogsSpecs(str(tmp_path)), exit_barrier_timeout=5)
    result = agent.run()
    assert result.is_failed() == (script != "exit 0")
    exit_codes = {failure.exitcode for failure in result.failures.values()}
    # torch's context also lists a peer that it has stopped.
    assert exit_codes <= {3, -signal.SIGTERM}
    assert (3 in exit_codes) == result.is_failed()
    assert agent._pcontext.closed > 0


def test_torchruns_functions_run_our_agent(tmp_path: Path) -> None:
    ferroelastic.install()
    script = tmp_path / "script.sh"
    threads = tmp_path / "threads"
    script.write_text(f"cat /proc/$PPID/task/*/comm > {threads}\nexit 3\n")
    command = ["--standalone", "--no-python", "/bin/sh", str(script)]
    run = torchs("run")
    launches: list[Any] = [lambda: run.main(command), lambda: run.run(run.parse_args(command))]
    for launch in launches:
        with pytest.raises(torchs("multiprocessing.errors").ChildFailedError) as caught:
            launch()
        assert caught.value.get_first_failure()[1].exitcode == 3
        assert "ferro-sup" in threads.read_text().split()
        threads.unlink()


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
@pytest.mark.parametrize("is_asked", [False, True])
def test_workers_inherit_the_installation_only_on_request(start_method: str, *, is_asked: bool) -> None:
    ferroelastic.install(workers=is_asked)
    launcher = torchs("launcher.api")
    config = launcher.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="the-run",
        start_method=start_method,
    )
    assert launcher.elastic_launch(config, workers.is_installed)() == dict.fromkeys(range(2), is_asked)


def test_a_program_of_a_worker_inherits_the_hook_on_request(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nprint(any('ferroelastic' in type(one).__module__ for one in sys.meta_path), file=open({str(tmp_path / 'out')!r}, 'w'))\n"
    )
    for is_asked in (False, True):
        ferroelastic.install(workers=is_asked)
        torchs("run").main(["--standalone", str(script)])
        assert (tmp_path / "out").read_text() == f"{is_asked}\n"
    assert "FERROELASTIC_EXEC" not in os.environ
