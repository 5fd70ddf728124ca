from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from ferroelastic.control_plane import worker_main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.delenv("TORCH_WORKER_SERVER_SOCKET", raising=False)
    return path


def test_an_error_of_the_body_is_recorded(error_file: Path) -> None:
    @worker_main()
    def main() -> None:
        raise ValueError("reason")

    with pytest.raises(ValueError, match="reason"):
        main()
    assert json.loads(error_file.read_text())["message"]["message"] == "ValueError: reason"


def test_success_records_nothing(error_file: Path) -> None:
    with worker_main():
        pass
    assert not error_file.exists()


def test_the_server_lives_as_long_as_the_body(error_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_WORKER_SERVER_SOCKET", "/some/socket")
    with mock.patch("ferroelastic._torch.start_worker_server") as start:
        with worker_main():
            start.assert_called_once_with("/some/socket")
            start.return_value.shutdown.assert_not_called()
        start.return_value.shutdown.assert_called_once_with()
    assert not error_file.exists()


def test_torchs_handlers_are_served(error_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "socket"
    monkeypatch.setenv("TORCH_WORKER_SERVER_SOCKET", str(path))
    with worker_main(), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"POST /handler/ping HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        assert client.recv(1024).split()[1] == b"200"
    assert not error_file.exists()
