"""The failure of a job as data, and its forms on the console."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ferroelastic._failure.advice import HELPERS_KILLED, SHM_FULL, advice_for
from ferroelastic._failure.box import render
from ferroelastic._failure.collect import exception_of
from ferroelastic._failure.error_file import MAX_BYTES, read_error_file
from ferroelastic._failure.model import (
    MAX_DETAIL_BYTES,
    Advice,
    ExceptionReport,
    Failure,
    FirstFailure,
    Job,
    Others,
    Restart,
    Sender,
    WatchdogReport,
    decode_detail,
    encode_detail,
    from_dict,
    to_dict,
    to_json,
)
from ferroelastic._failure.save import run_folder, save
from ferroelastic._failure.text import head_and_tail, last_lines, shortened
from ferroelastic.multiprocessing._stderr import end_of_file
from ferroelastic.multiprocessing.errors import ProcessFailure

TRACEBACK = (
    'Traceback (most recent call last):\n  File "train.py", line 3, in <module>\n    main()\nValueError: it is wrong'
)
FIRST = FirstFailure(
    time_ns=1_764_336_836_123_456_789,
    time="2025-11-28T13:33:56.123456+00:00",
    rank=3,
    local_rank=1,
    node_rank=1,
    host="node1",
    pid=4711,
    round=2,
    kind="exit",
    exit_code=1,
    exception=ExceptionReport("ValueError", "it is wrong", TRACEBACK, "stderr"),
    stderr=TRACEBACK.split("\n"),
)
FAILURE = Failure(
    job=Job("run", "train.py", "default", 1, 5),
    first=FIRST,
    advice=Advice("missing_module", "install it"),
    others=Others(2, 5, [4, 5]),
    restarts=[Restart(0, "rank 1 (pid 12) exited with code 1", 7)],
    decision="no restart is left (--max-restarts=1)",
    logs="/logs/run_1",
)


def killed(sender: Sender, **more: Any) -> Failure:
    first = replace(FIRST, kind="signal", exit_code=None, signal="SIGKILL", sender=sender, exception=None, stderr=[])
    return Failure(job=FAILURE.job, first=replace(first, **more))


# ---- the data


def test_json_there_and_back() -> None:
    assert from_dict(json.loads(to_json(FAILURE))) == FAILURE
    assert "\n" not in to_json(FAILURE)
    assert to_dict(FAILURE)["version"] == 1
    oom = killed(Sender("oom_killer", scope="host", limit_bytes=7))
    assert to_dict(oom)["first"]["sender"] == {"kind": "oom_killer", "scope": "host", "limit_bytes": 7}
    assert from_dict(to_dict(oom)) == oom


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "text",
        {"first": 3, "job": "x", "restarts": {"a": 1}, "others": [], "advice": 0},
        {"first": {"rank": "3", "time_ns": None, "kind": "bogus", "stderr": "text", "sender": {"kind": 5}, "host": 9}},
        {"first": {"stderr": [1, 2], "pid": True, "exception": {"type": {}}, "watchdog": []}, "restarts": [3, None]},
    ],
)
def test_what_is_no_failure_becomes_one_that_can_be_shown(data: object) -> None:
    failure = from_dict(data)
    for form in ("full", "short", "json"):
        assert render(failure, form)
    assert failure.first.kind == "agent"
    assert failure.first.rank is None


def test_what_travels_is_bounded() -> None:
    text = '\x00"\\é' * 100_000
    long = replace(
        FIRST,
        exception=ExceptionReport(text, text, "\n".join([text] * 3), "stderr"),
        watchdog=WatchdogReport(text, text),
        fatal_dump=text,
        core=text,
        xid=text,
        error_file_problem=text,
        reason=text,
        stderr=[text[:500]] * 20,
        signal="SIGKILL",
    )
    detail = encode_detail(long)
    assert 0 < len(detail.encode()) <= MAX_DETAIL_BYTES
    decoded = decode_detail(detail)
    assert decoded is not None
    assert (decoded.rank, decoded.pid) == (3, 4711)
    assert decode_detail(encode_detail(FIRST)) == FIRST


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"first": 1}', "[" * 100_000])
def test_what_is_no_detail(text: str) -> None:
    assert decode_detail(text) is None


# ---- the box


def test_the_box() -> None:
    assert render(FAILURE, "full", file="/logs/run_1/failure.json").split("\n") == [
        "=" * 60,
        "train.py FAILED: rank 3 exited with code 1",
        "-" * 60,
        "Root Cause (first observed failure):",
        "  time      : 2025-11-28T13:33:56.123456+00:00",
        "  host      : node1",
        "  rank      : 3 (local_rank: 1)",
        "  node      : 1, in round 2",
        "  exitcode  : 1 (pid: 4711)",
        "  exception : ValueError: it is wrong",
        "    Traceback (most recent call last):",
        '      File "train.py", line 3, in <module>',
        "        main()",
        "    ValueError: it is wrong",
        "  restarts  : 1",
        "    after round 0: rank 1 (pid 12) exited with code 1",
        "  others    : 2 failed by themselves (ranks 4, 5 in the same way), 5 stopped by the agent",
        "  decision  : no restart is left (--max-restarts=1)",
        "  job       : ends with exit code 1",
        "  logs      : /logs/run_1",
        "  report    : /logs/run_1/failure.json",
        "  advice    : install it",
        "=" * 60,
    ]


def test_the_short_form() -> None:
    assert render(FAILURE, "short").split("\n") == [
        "train.py FAILED: rank 3 exited with code 1",
        "2025-11-28T13:33:56.123456+00:00, host node1, pid 4711",
        "ValueError: it is wrong",
        "advice: install it",
        "logs: /logs/run_1",
    ]


def test_json_is_one_line() -> None:
    assert json.loads(render(FAILURE, "json")) == to_dict(FAILURE)


def test_colour_is_only_there_if_it_is_asked_for() -> None:
    assert "\x1b" not in render(FAILURE, "full")
    coloured = render(FAILURE, "full", has_colour=True)
    assert "\x1b[1;31mtrain.py FAILED" in coloured
    assert coloured.replace("\x1b[1;31m", "").replace("\x1b[1m", "").replace("\x1b[33m", "").replace(
        "\x1b[0m", ""
    ) == render(FAILURE, "full")


@pytest.mark.parametrize(
    ("sender", "text"),
    [
        (Sender("agent"), "sender    : the agent"),
        (Sender("unknown"), "sender    : unknown; not the agent, and the kernel has counted no OOM kill"),
        (Sender("process", pid=12, name="kill"), "sender    : process 12 (kill)"),
        (
            Sender("oom_killer", scope="cgroup", limit_bytes=1 << 31, peak_bytes=768 << 20),
            "sender    : the kernel's OOM killer: memory of the cgroup, limit 2.00 GiB, peak 768.0 MiB",
        ),
        (
            Sender("oom_killer", scope="host", limit_bytes=1 << 38, peak_bytes=5 << 30),
            "sender    : the kernel's OOM killer: memory of the host, limit 256.00 GiB, peak of the worker 5.00 GiB",
        ),
    ],
)
def test_the_sender_of_a_signal(sender: Sender, text: str) -> None:
    lines = render(killed(sender), "full").split("\n")
    assert f"  {text}" in lines
    assert "  exitcode  : -9 (pid: 4711) (SIGKILL)" in lines


def test_a_fault_has_no_other_sender() -> None:
    text = render(killed(Sender("unknown"), signal="SIGSEGV"), "full")
    assert "unknown; not the agent. The program raises this signal itself after a fault" in text


def test_lines_of_rare_causes() -> None:
    text = render(
        killed(
            Sender("unknown"),
            fatal_dump="Fatal Python error: Segmentation fault\n\nCurrent thread 0x1:",
            core="/cores/core.1",
            xid="NVRM: Xid (PCI:0000:65:00): 79",
            error_file_problem="/x/error.json: it is empty",
        ),
        "full",
    )
    assert "  core      : /cores/core.1\n" in text
    assert "  GPU       : NVRM: Xid (PCI:0000:65:00): 79\n" in text
    assert "  error file: cannot be used: /x/error.json: it is empty\n" in text
    assert "    Fatal Python error: Segmentation fault\n" in text


def test_an_expired_timer() -> None:
    watchdog = WatchdogReport("step", '  File "train.py", line 9 in step\n    wait()')
    text = render(killed(Sender("agent"), kind="watchdog", watchdog=watchdog, reason="timer 'step' expired"), "full")
    assert "train.py FAILED: rank 3 missed the deadline of its timer 'step'\n" in text
    assert "  reason    : timer 'step' expired\n" in text
    assert '      File "train.py", line 9 in step\n        wait()\n' in text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("lost_node", "FAILED: a node was lost"),
        ("stuck", "FAILED: rank 3 is stuck in the kernel"),
        ("early_exit", "FAILED: rank 3 ended early, while other workers ran on"),
        ("log_pattern", "FAILED: rank 3 wrote a line that fails the job"),
    ],
)
def test_other_kinds(kind: Any, text: str) -> None:
    shown = render(replace(FAILURE, first=replace(FIRST, kind=kind, reason="the reason")), "full")
    assert text in shown
    assert "  reason    : the reason" in shown


def test_output_of_a_worker_cannot_change_the_terminal() -> None:
    evil = "\x1b]0;title\x07\x1b[2Jx\r\ny"
    failure = replace(
        FAILURE,
        job=replace(FAILURE.job, name=evil),
        first=replace(FIRST, host=evil, reason=evil, exception=None, stderr=[evil], core=evil),
        logs=evil,
        decision=evil,
    )
    for form in ("full", "short"):
        text = render(failure, form)
        assert all(char == "\n" or char.isprintable() for char in text)


def test_a_long_traceback_is_cut_in_the_middle() -> None:
    exception = replace(FIRST.exception or ExceptionReport(), traceback="\n".join(map(str, range(500))))
    text = render(replace(FAILURE, first=replace(FIRST, exception=exception)), "full")
    assert "    ... 440 lines left out ...\n" in text
    assert "\n    0\n" in text
    assert "\n    499\n" in text


def test_texts() -> None:
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghi", 8) == "abcd ..."
    assert last_lines("a\n\n b \nc\n", 2) == [" b", "c"]
    text = head_and_tail("\n".join(f"line {n}" for n in range(1000)), 300)
    assert text.startswith("line 0\n")
    assert text.endswith("\nline 999")
    assert "lines left out" in text
    assert len(text) < 400


# ---- advice


def raised(kind: str, message: str) -> FirstFailure:
    return replace(FIRST, exception=ExceptionReport(kind, message, "", "stderr"))


@pytest.mark.parametrize(
    ("first", "cause"),
    [
        (raised("ModuleNotFoundError", "No module named 'apex'"), "missing_module"),
        (raised("OSError", "[Errno 98] Address already in use"), "port_in_use"),
        (
            raised(
                "torch.distributed.DistNetworkError",
                "The server socket has failed to listen on port: 29500, EADDRINUSE",
            ),
            "port_in_use",
        ),
        (raised("torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 MiB."), "cuda_out_of_memory"),
        (raised("OSError", "[Errno 28] No space left on device: '/dev/shm/psm_1'"), "shm_full"),
        (raised("RuntimeError", "unable to write to file </torch_12_34_0>: No space left on device (28)"), "shm_full"),
        (
            raised(
                "RuntimeError",
                "unable to allocate shared memory(shm) for file </torch_12_34_0>: No space left on device (28)",
            ),
            "shm_full",
        ),
        (replace(FIRST, exception=None, exit_code=None, signal="SIGBUS", reason=SHM_FULL), "shm_full"),
        (
            replace(
                FIRST,
                exception=None,
                stderr=[
                    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE, NumelIn=1)"
                ],
            ),
            "nccl_timeout",
        ),
        (replace(FIRST, exception=None, stderr=["/usr/bin/python3: No module named trainer"]), "missing_module"),
        (killed(Sender("oom_killer", scope="cgroup")).first, "oom_killer"),
        (
            replace(
                raised("RuntimeError", "DataLoader worker (pid 4712) is killed by signal: Killed. "),
                reason=f"{HELPERS_KILLED} 1 process of the workers' cgroup",
            ),
            "oom_killer",
        ),
    ],
)
def test_a_known_cause_has_one_line_of_advice(first: FirstFailure, cause: str) -> None:
    advice = advice_for(first)
    assert advice is not None
    assert advice.cause == cause
    assert "\n" not in advice.text


@pytest.mark.parametrize(
    "first",
    [
        FIRST,
        raised("ValueError", "Address already in use"),
        raised("RuntimeError", "DataLoader worker (pid 4712) is killed by signal: Killed. "),
        raised("OSError", "[Errno 28] No space left on device: '/data/x'"),
        raised("ImportError", "cannot import name 'x'"),
        raised("MyOutOfMemoryError", "CUDA out of memory"),
        replace(FIRST, exception=None, exit_code=None, signal="SIGBUS"),
        replace(FIRST, exception=None, exit_code=None, signal="SIGKILL", sender=Sender("unknown")),
    ],
)
def test_no_advice_without_a_certain_cause(first: FirstFailure) -> None:
    assert advice_for(first) is None


# ---- files


def test_error_files_that_cannot_be_used(tmp_path: Path) -> None:
    fifo, loop, big, broken = (str(tmp_path / name) for name in ("fifo", "loop", "big", "broken"))
    os.mkfifo(fifo)
    os.symlink(loop, loop)
    with open(big, "wb") as file:
        file.truncate(2 << 30)
    Path(broken).write_text('{"message": {"mess')
    empty = tmp_path / "empty"
    empty.touch()
    os.symlink("absent", tmp_path / "dangling")
    (tmp_path / "list").write_text("[1]")
    expected = {
        fifo: "it is not a regular file",
        str(tmp_path): "it is not a regular file",
        loop: "Too many levels of symbolic links",
        big: f"it has more than {MAX_BYTES} bytes",
        str(empty): "it is empty",
        str(tmp_path / "dangling"): "it is a link to a file that does not exist",
        str(tmp_path / "list"): "it has no message",
        "a\0b": "embedded null byte",
    }
    for path, reason in expected.items():
        assert read_error_file(path) == (None, reason)
    assert read_error_file(broken)[1].startswith("Unterminated string")
    for path in (str(tmp_path / "absent"), "", os.devnull):
        assert read_error_file(path) == (None, "")
    assert ProcessFailure(0, 7, 1, error_file=fifo).error_file_problem == f"{fifo}: it is not a regular file"


def test_an_error_file_with_a_text_explains_the_failure(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    path.write_text('{"message": "the licence is gone"}')
    failure = ProcessFailure(0, 7, 5, error_file=str(path))
    found = exception_of(failure, "")
    assert found is not None
    assert (found.message, found.source) == ("the licence is gone", "error_file")
    assert exception_of(ProcessFailure(0, 7, 5, error_file=str(tmp_path / "absent")), "") is None
    (tmp_path / "broken").write_text('{"message": {"mess')
    assert exception_of(ProcessFailure(0, 7, 5, error_file=str(tmp_path / "broken")), "") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of a file")
def test_an_error_file_of_a_third_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    path.write_text('{"message": "text"}')
    os.chown(path, 4711, 4711)
    assert read_error_file(str(path)) == ({"message": "text"}, "")  # root trusts all users
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert read_error_file(str(path)) == (None, "it belongs to another user (uid 4711)")


def test_the_end_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "stderr.log"
    path.write_bytes(b"a" * 100_000 + b"end")
    assert end_of_file(str(path)) == b"a" * 65_533 + b"end"
    os.mkfifo(tmp_path / "fifo")
    for other in ("", os.devnull, str(tmp_path), str(tmp_path / "fifo"), str(tmp_path / "absent")):
        assert end_of_file(other) == b""


class Specs:
    def __init__(self, folder: str) -> None:
        self._run_log_dir = folder


class Wrapping:
    def __init__(self, specs: Specs) -> None:
        self._specs = specs


def test_the_report_in_the_log_folder(tmp_path: Path) -> None:
    assert run_folder(Wrapping(Specs(str(tmp_path)))) == run_folder(Specs(str(tmp_path))) == str(tmp_path)
    assert run_folder(object()) is None
    save(FAILURE, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["failure.json"]
    assert from_dict(json.loads((tmp_path / "failure.json").read_text())) == FAILURE
    save(FAILURE, str(tmp_path / "absent"))
    save(FAILURE, None)
