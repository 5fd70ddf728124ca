from __future__ import annotations

import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from ferroelastic import _torch
from ferroelastic.rendezvous import RendezvousParameters, _torch_handlers

if TYPE_CHECKING:
    from collections.abc import Iterator

torch = pytest.importorskip("torch")


@pytest.fixture
def gpus() -> Any:
    with (
        mock.patch("torch.cuda.is_available", return_value=True) as available,
        mock.patch("torch.cuda.device_count", return_value=3),
        mock.patch("torch.xpu.is_available", available),
        mock.patch("torch.xpu.device_count", return_value=2),
    ):
        yield available


def test_devices_are_counted(gpus: mock.Mock) -> None:
    assert _torch.cuda_device_count() == 3
    assert _torch.xpu_device_count() == 2
    gpus.return_value = False
    assert _torch.cuda_device_count() == 0
    assert _torch.xpu_device_count() == 0


def test_accelerators_are_counted(gpus: mock.Mock) -> None:
    accelerator = mock.Mock()
    accelerator.is_available.return_value = True
    accelerator.current_accelerator.return_value.type = "npu"
    accelerator.device_count.return_value = 5
    with mock.patch.object(torch, "accelerator", accelerator):
        assert _torch.accelerator_count() == ("npu", 5)
        accelerator.is_available.return_value = False
        assert _torch.accelerator_count() == ("cpu", 0)
    with mock.patch.object(torch, "accelerator"):
        del torch.accelerator  # as before torch 2.7
        assert _torch.accelerator_count() == ("cuda", 3)
        gpus.return_value = False
        assert _torch.accelerator_count() == ("cpu", 0)


def test_a_private_backend_is_counted() -> None:
    name = torch._C._get_privateuse1_backend_name()
    assert _torch.custom_device_count("somebody's") is None
    backend = mock.Mock()
    backend.device_count.return_value = 4
    with mock.patch.object(torch, name, backend, create=True):
        assert _torch.custom_device_count(name) == 4
        backend.is_available.return_value = False
        assert _torch.custom_device_count(name) == 0
    assert _torch.custom_device_count(name) == 0


def test_a_plug_in_of_torch_gets_torchs_parameters() -> None:
    theirs = pytest.importorskip("torch.distributed.elastic.rendezvous")
    handler = mock.Mock(get_backend=lambda: "plug-in")
    creator = mock.Mock(return_value=handler)
    with mock.patch.dict(theirs.rendezvous_handler_registry._registry, {"plug-in": creator}):
        ours = RendezvousParameters("plug-in", "host:1", "run", 1, 2, "here", key="value")
        assert _torch_handlers.create_handler(ours) is handler
    (given,) = creator.call_args.args
    assert isinstance(given, theirs.RendezvousParameters)
    assert vars(given) == vars(ours)


def test_an_unknown_backend_is_torchs_error() -> None:
    with pytest.raises(ValueError, match="'nobody's' is not registered"):
        _torch_handlers.create_handler(RendezvousParameters("nobody's", "", "run", 1, 1))


def test_a_module_that_torch_lacks_is_not_taken_for_torch() -> None:
    with (
        mock.patch("importlib.import_module", side_effect=ModuleNotFoundError("no etcd", name="etcd")),
        pytest.raises(ModuleNotFoundError, match="no etcd"),
    ):
        _torch_handlers.create_handler(RendezvousParameters("etcd", "", "run", 1, 1))


@pytest.fixture
def without_a_cached_version() -> Iterator[None]:
    _torch.installed_version.cache_clear()
    yield
    _torch.installed_version.cache_clear()


@pytest.mark.usefixtures("without_a_cached_version")
@pytest.mark.parametrize(
    ("text", "version", "is_older"),
    [
        ("2.15.0+cu132", (2, 15), False),
        ("2.9.1", (2, 9), True),
        ("2.16.0a0+gitd0f2af8", (2, 16), False),
        ("3.0.0.dev20270101", (3, 0), False),
        ("unknown", None, False),
    ],
)
def test_the_version_is_read(text: str, version: tuple[int, int] | None, is_older: bool) -> None:
    with mock.patch.object(torch, "__version__", text):
        assert _torch.installed_version() == version
        assert _torch.is_older_than(2, 15) == is_older


@pytest.mark.usefixtures("without_a_cached_version")
def test_the_version_is_read_without_an_import() -> None:
    with mock.patch.dict(sys.modules), mock.patch("importlib.metadata.version", return_value="2.9.0") as version:
        del sys.modules["torch"]
        assert _torch.installed_version() == (2, 9)
        assert "torch" not in sys.modules
    version.assert_called_once_with("torch")


@pytest.mark.usefixtures("without_a_cached_version")
def test_without_torch_the_package_behaves_as_with_the_newest() -> None:
    missing = importlib.metadata.PackageNotFoundError
    with mock.patch.dict(sys.modules), mock.patch("importlib.metadata.version", side_effect=missing):
        del sys.modules["torch"]
        assert _torch.installed_version() is None
        assert not _torch.is_older_than(99, 0)
