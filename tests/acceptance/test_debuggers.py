"""A debugger on ``ferrorun`` follows into its workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.debug_adapter import PATIENCE_S, Session
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("ferroelastic._rust")
pytestmark = pytest.mark.engine

SCRIPT = """
import os, sys
rank = int(os.environ["RANK"])
answer = 40 + rank
open(f"{sys.argv[1]}/end of {rank}", "w").write(str(answer))
"""
LINE = 5


def adapters(folder: Path) -> list[int]:
    """Pids of the debug adapters that carry this test's variable."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            command = Path(f"/proc/{name}/cmdline").read_bytes()
            if b"debugpy" in command and str(folder).encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
    return found


@pytest.fixture
def debugged(tmp_path: Path) -> Iterator[Any]:
    """Starts ``ferrorun`` under debugpy, which waits for a client; gives the process and the adapter's address."""
    pytest.importorskip("debugpy", reason="debugpy is not installed: pip install debugpy")
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[bytes], tuple[str, int]]:
        endpoints = tmp_path / "endpoints.json"
        os.mkfifo(endpoints)
        env = {**os.environ, "DEBUGPY_ADAPTER_ENDPOINTS": str(endpoints), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-m", "debugpy", "--listen", "127.0.0.1:0", "--wait-for-client"]
        with open(tmp_path / "output", "wb") as output:
            process = subprocess.Popen([*command, *arguments], env=env, stdout=output, stderr=output)
        started.append(process)
        client = json.loads(endpoints.read_text())["client"]
        return process, (client["host"], client["port"])

    yield start
    for process in started:
        process.kill()
        process.wait()
    assert eventually(lambda: not adapters(tmp_path), PATIENCE_S), adapters(tmp_path)


def job(tmp_path: Path) -> tuple[Path, list[str]]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    return script, ["-m", "ferroelastic.run", "--nproc-per-node=2", "--standalone", str(script), str(tmp_path)]


def output(tmp_path: Path) -> str:
    return (tmp_path / "output").read_text()


def test_debugpy_stops_at_a_breakpoint_in_each_worker(tmp_path: Path, debugged: Any) -> None:
    script, arguments = job(tmp_path)
    process, address = debugged(*arguments)
    answers: list[int] = []
    with Session(address, {"justMyCode": False, "subProcess": True}) as launcher:
        followed = [launcher.event("debugpyAttach") for _ in range(2)]

        def debug(options: dict[str, Any]) -> None:
            place = options.pop("connect")
            with Session((place["host"], place["port"]), options, str(script), [LINE]) as worker:
                stop = worker.event("stopped")
                assert stop["reason"] == "breakpoint"
                trace = worker.answer_to(worker.ask("stackTrace", threadId=stop["threadId"]))
                frame = trace["stackFrames"][0]
                assert (frame["source"]["path"], frame["line"]) == (str(script), LINE)
                value = worker.answer_to(worker.ask("evaluate", expression="answer", frameId=frame["id"]))
                answers.append(int(value["result"]))
                worker.answer_to(worker.ask("continue", threadId=stop["threadId"]))
                worker.event("terminated")

        threads = [threading.Thread(target=debug, args=(options,)) for options in followed]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [40, 41], output(tmp_path)
        launcher.event("terminated")
    assert process.wait(PATIENCE_S) == 0, output(tmp_path)
    assert [(tmp_path / f"end of {rank}").read_text() for rank in range(2)] == ["40", "41"]


def test_debugpy_that_is_not_to_follow_leaves_the_workers_alone(tmp_path: Path, debugged: Any) -> None:
    _, arguments = job(tmp_path)
    process, address = debugged("--configure-subProcess", "False", *arguments)
    with Session(address, {"justMyCode": False, "subProcess": False}) as launcher:
        launcher.event("terminated")
        assert not any(event["event"] == "debugpyAttach" for event in launcher._events)
    assert process.wait(PATIENCE_S) == 0, output(tmp_path)
