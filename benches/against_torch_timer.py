"""Compares the watchdog with torch's: the same requests, and the interval of torch's agent for both servers.

    just bench-timer               # all figures
    just bench-timer --only kill

Every outcome is checked before its time counts. Prints a Markdown table: median and range of both sides, and their ratio.
"""

from __future__ import annotations

import importlib
import logging
import os
import select
import signal
import tempfile
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

from side_by_side import compare

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

MODULES = {"torch": "torch.distributed.elastic.timer", "ferroelastic": "ferroelastic.timer"}
AGENTS_INTERVAL_S = 0.1
PAIRS = 2000
REQUESTS = 50_000


def timer_of(side: str) -> Any:
    return importlib.import_module(MODULES[side])


def fork(body: Callable[[], object]) -> int:
    """Run ``body`` in a forked child and return its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    return pid


class Server:
    """A timer server in its own process, as in an agent. Its process also starts the workers, because it signals only descendants."""

    def __init__(self, side: str, folder: str) -> None:
        self.side = side
        self.path = f"{folder}/pipe"
        theirs, self._ask = os.pipe()
        self._answer, to_us = os.pipe()
        self._pid = fork(lambda: self._serve(theirs, to_us))
        os.close(theirs)
        os.close(to_us)
        self._answers = os.fdopen(self._answer)
        assert self._answers.readline() == "serving\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ask)
        self._answers.close()
        os.waitpid(self._pid, 0)

    def ask(self, question: bytes) -> str:
        """Send a command to the server's process and return its answer, or the answer of its worker."""
        os.write(self._ask, question)
        answer = self._answers.readline()
        assert answer.strip(), f"{self.side}: no answer to {question!r}"
        return answer

    def wait_for_requests(self, expected: int) -> None:
        """Wait until the server has handled the expected number of requests. None may be lost."""
        deadline = time.monotonic() + 30
        while (received := int(self.ask(b"?"))) < expected:
            assert time.monotonic() < deadline, f"{self.side}: {received} requests of {expected} after 30 s"
            time.sleep(0.001)
        assert received == expected, f"{self.side}: {received} requests instead of {expected}"

    def _serve(self, questions: int, answers: int) -> None:
        os.close(self._ask)
        timer = timer_of(self.side)
        server = timer.FileTimerServer(self.path, "bench", max_interval=AGENTS_INTERVAL_S)
        server.start()
        client = timer.FileTimerClient(self.path)
        # torch's server starts to check its timers when the first client has connected.
        client.acquire("far", time.time() + 1000)
        client.release("far")
        os.write(answers, b"serving\n")
        while question := os.read(questions, 1):
            if question == b"?":
                answer = str(server._request_count)  # noqa: SLF001 - both have it for tests
            elif question == b"k":
                worker = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
                deadline = time.time() + 0.25
                request = timer.FileTimerRequest(worker, "bench", deadline, signal.SIGKILL)
                client._send_request(request)  # noqa: SLF001 - for another process, which both can
                answer = f"{worker} {deadline}"
            else:
                body = work_of_client if question == b"c" else work_of_writer
                fork(partial(self._work, body, timer, answers))
                continue
            os.write(answers, answer.encode() + b"\n")
        server.stop()

    def _work(self, body: Callable[[Any, str], str], timer: Any, answers: int) -> None:
        answer = ""
        try:
            answer = body(timer, self.path)
        finally:  # also after a failure, because the parent waits for an answer
            os.write(answers, answer.encode() + b"\n")


def work_of_client(timer: Any, path: str) -> str:
    """Measure each pair of requests in a worker. Return the microseconds."""
    client = timer.FileTimerClient(path)
    samples = []
    for _ in range(PAIRS):
        deadline = time.time() + 1000
        began = time.perf_counter_ns()
        client.acquire("train.py#42", deadline)
        client.release("train.py#42")
        samples.append((time.perf_counter_ns() - began) / 1e3)
        if len(samples) % 100 == 0:
            time.sleep(1.5 * AGENTS_INTERVAL_S)  # the server must empty its pipe
    return " ".join(f"{sample:.2f}" for sample in samples)


def work_of_writer(_: Any, path: str) -> str:
    """Write the same lines for both servers. Return the start time."""
    request = timer_of("torch").FileTimerRequest
    pair = [request(os.getpid(), "bench", time.time() + 1000, 9), request(os.getpid(), "bench", -1, 0)]
    text = "".join(line.to_json() + "\n" for line in pair).encode()
    pipe = os.open(path, os.O_WRONLY)
    began = time.monotonic()
    for _ in range(REQUESTS // 2):
        os.write(pipe, text)
    return str(began)


def measure_kill(side: str) -> dict[str, list[float]]:
    """Return the milliseconds from a worker's deadline to its end, seen by a third process. torch's server ends too."""
    with tempfile.TemporaryDirectory() as folder, Server(side, folder) as server:
        worker, deadline = server.ask(b"k").split()
        pidfd = os.pidfd_open(int(worker))
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        assert ended.poll(10_000), f"{side}: worker {worker} still runs after 10 s"
        late_s = time.time() - float(deadline)
        os.close(pidfd)
    assert late_s > 0, f"{side}: {-late_s} s too early"
    return {"deadline to worker gone, ms": [late_s * 1e3]}


def measure_client(side: str) -> dict[str, list[float]]:
    """Return the microseconds that a worker spends on one timer."""
    with tempfile.TemporaryDirectory() as folder, Server(side, folder) as server:
        samples = [float(sample) for sample in server.ask(b"c").split()]
        server.wait_for_requests(2 + 2 * PAIRS)
    return {"acquire and release, in the worker, us": samples}


def measure_served(side: str) -> dict[str, list[float]]:
    """Return the requests per second, from the first write until the last request was handled."""
    with tempfile.TemporaryDirectory() as folder, Server(side, folder) as server:
        began = float(server.ask(b"w"))
        server.wait_for_requests(2 + REQUESTS)
        rate = REQUESTS / (time.monotonic() - began)
    return {"requests served per second": [rate]}


def main() -> None:
    logging.disable(logging.CRITICAL)
    for side in MODULES:
        timer_of(side)
    measurements = {"kill": (measure_kill, 30), "client": (measure_client, 3), "served": (measure_served, 5)}
    compare(("torch", "ferroelastic"), measurements, __doc__ or "")


if __name__ == "__main__":
    main()
