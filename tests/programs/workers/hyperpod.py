"""HyperPod's launcher, and the requests that the controller of its cluster sends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from work import FOLDER, free_port


def request(port: int, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """Send a request to the server of the agent; a body makes it a POST."""
    data = None if body is None else json.dumps(body).encode()
    message = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(message, timeout=10) as answer:
        text = answer.read()
    return json.loads(text) if text else {}


def main() -> int:
    """Start the agent, tell it to run, and return its exit code."""
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "hyperpodrun"),
        f"--server-port={port}",
        "--server-host=127.0.0.1",
        "--shutdown-signal=SIGTERM",
        "--server-shutdown-timeout=5",
        "--nnodes=1",
        "--nproc-per-node=2",
        f"--rdzv-conf=resource_config_dir={FOLDER}",
        str(Path(__file__).parent / "plain.py"),
    ]
    agent = subprocess.Popen(command, env={**os.environ, "NNODES": "1"})
    signal.signal(signal.SIGTERM, lambda *_: agent.terminate())
    is_running = False
    while agent.poll() is None:
        time.sleep(0.2)
        try:
            state = request(port, "status")
            if state.get("status") == "ready" and not is_running:
                rendezvous = {"rank": 0, "nnodes": 1, "master_addr": "127.0.0.1", "master_port": free_port()}
                request(port, "start", {**rendezvous, "faultCount": 0})
                is_running = True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            continue
        print(state, flush=True)
    return agent.returncode


if __name__ == "__main__":
    sys.exit(main())
