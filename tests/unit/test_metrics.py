from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from ferroelastic import metrics
from ferroelastic.metrics import api
from ferroelastic.metrics.api import MetricData, MetricHandler, _get_metric_name, getStream, prof

if TYPE_CHECKING:
    from collections.abc import Iterator


class Collector(MetricHandler):
    def __init__(self) -> None:
        self.data: dict[str, MetricData] = {}

    def emit(self, metric_data: MetricData) -> None:
        self.data[metric_data.name] = metric_data


@pytest.fixture
def collector() -> Iterator[Collector]:
    with mock.patch.dict(api._metrics_map, {"torchelastic": Collector()}):
        collector = api._metrics_map["torchelastic"]
        assert isinstance(collector, Collector)
        yield collector


class Base(abc.ABC):
    @abc.abstractmethod
    def work(self) -> int: ...


class Derived(Base):
    @prof
    def work(self) -> int:
        return 3

    @prof(group="torchelastic")
    def fail(self) -> None:
        raise RuntimeError


def function() -> None: ...


def test_names_are_of_the_class_or_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function, "__module__", "package.module")
    assert _get_metric_name(function) == "module.function"
    assert _get_metric_name(Derived().work) == "Derived.work"


def test_prof_publishes_success_and_duration(collector: Collector) -> None:
    assert Derived().work() == 3
    assert set(collector.data) == {"Derived.work.success", "Derived.work.duration.ms"}
    assert collector.data["Derived.work.success"].value == 1
    assert collector.data["Derived.work.success"].group_name == "torchelastic"


def test_prof_publishes_failure_and_duration(collector: Collector) -> None:
    with pytest.raises(RuntimeError):
        Derived().fail()
    assert set(collector.data) == {"Derived.fail.failure", "Derived.fail.duration.ms"}


def test_prof_keeps_the_functions_name() -> None:
    assert Derived.work.__qualname__ == "Derived.work"


def test_groups_have_handlers_of_their_own(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    default, other = Collector(), Collector()
    monkeypatch.setattr(api, "_default_metrics_handler", api._unconfigured)
    monkeypatch.setattr(api, "_metrics_map", {**api._metrics_map})
    metrics.configure(default)
    metrics.configure(other, "other")
    metrics.put_metric("one", 1)
    metrics.put_metric("two", 2, "other")
    metrics.put_metric("three", 3, "third")
    assert [list(each.data) for each in (collector, other, default)] == [["one"], ["two"], ["three"]]


def test_nothing_configured_means_nothing_printed(capsys: pytest.CaptureFixture[str]) -> None:
    metrics.put_metric("name", 1, "nobody's group")
    metrics.initialize_metrics(metrics.MetricsConfig())
    assert capsys.readouterr().out == ""


def test_the_console_handler_prints(capsys: pytest.CaptureFixture[str]) -> None:
    metrics.ConsoleMetricHandler().emit(MetricData(1.5, "group", "name", 3))
    assert capsys.readouterr().out == "[1.5][group]: name=3\n"


def test_the_old_names_warn(collector: Collector) -> None:
    with pytest.warns(FutureWarning, match="prof"):
        decorate = metrics.profile("torchelastic")
    assert decorate(lambda: 5)() == 5
    assert set(collector.data) == {"<lambda>.success", "<lambda>.duration.ms"}
    with pytest.warns(FutureWarning, match="put_metric"):
        metrics.publish_metric("torchelastic", "name", 1)
    assert collector.data["name"].value == 1


def test_a_handler_configured_through_torch_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torch.distributed.elastic.metrics.api")
    default, special = Collector(), Collector()
    monkeypatch.setattr(theirs, "_default_metrics_handler", default)
    monkeypatch.setattr(theirs, "_metrics_map", {"special": special})
    assert getStream("torchelastic").handler is default
    assert getStream("special").handler is special
    assert isinstance(special, theirs.MetricHandler)

    monkeypatch.setattr(api, "_default_metrics_handler", ours := Collector())
    assert getStream("special").handler is ours


def test_config_has_a_dictionary_of_its_own() -> None:
    first: Any = metrics.MetricsConfig().params
    first["key"] = "value"
    assert metrics.MetricsConfig().params == {}
    assert metrics.MetricsConfig({"a": "b"}).params == {"a": "b"}
