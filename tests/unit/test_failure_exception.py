"""The exception that is found in the last output of a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest

from ferroelastic._failure.exception import find_exception, find_fatal_dump
from ferroelastic._failure.text import clean

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = """Traceback (most recent call last):
  File "train.py", line 3, in <module>
    main()
ValueError: it is wrong"""


def run(folder: Path, script: str, *arguments: str) -> tuple[int, str]:
    path = folder / "train.py"
    path.write_text(textwrap.dedent(script))
    ended = subprocess.run([sys.executable, *arguments, path], capture_output=True, timeout=60, check=False)
    return ended.returncode, clean(ended.stderr)


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("raise ValueError('it is wrong')", "ValueError", "it is wrong"),
        ("raise ValueError", "ValueError", ""),
        ("raise ValueError('one\\ntwo\\n  three')", "ValueError", "one\ntwo\n  three"),
        ("import json; json.loads('{')", "json.decoder.JSONDecodeError", "Expecting property name"),
        ("class A:\n    class B(Exception): pass\nraise A.B('nested')", "A.B", "nested"),
        ("import absent_module", "ModuleNotFoundError", "No module named 'absent_module'"),
        ("def f(:\n    pass", "SyntaxError", "invalid syntax"),
        ("if True:\npass", "IndentationError", "expected an indented block"),
        ("exec('1 +')", "SyntaxError", "invalid syntax"),
        ("assert 1 == 2, 'no'", "AssertionError", "no"),
    ],
)
def test_what_an_interpreter_prints(tmp_path: Path, script: str, kind: str, message: str) -> None:
    code, text = run(tmp_path, script)
    found = find_exception(f"epoch 1\nepoch 2\n{text}", code)
    assert found is not None, text
    assert found.type == kind
    assert found.message.startswith(message)
    assert found.source == "stderr"
    assert found.traceback in text
    assert f"{kind}" in found.traceback.split("\n")[-1] or "\n" in message


def test_a_chain_is_shown_from_its_first_exception(tmp_path: Path) -> None:
    script = """
    try:
        try:
            {}["key"]
        except KeyError as error:
            raise OSError("middle") from error
    except OSError:
        raise ValueError("last")
    """
    code, text = run(tmp_path, script)
    found = find_exception("Traceback (most recent call last):\n  File\nOldError: earlier\nepoch 3\n" + text, code)
    assert found is not None
    assert (found.type, found.message) == ("ValueError", "last")
    assert found.traceback.count("Traceback (most recent call last):") == 3
    assert "OldError" not in found.traceback


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups need CPython 3.11")
def test_an_exception_group(tmp_path: Path) -> None:
    code, text = run(tmp_path, "raise ExceptionGroup('both', [ValueError('a'), TypeError('b')])")
    found = find_exception(text, code)
    assert found is not None
    assert (found.type, found.message) == ("ExceptionGroup", "both (2 sub-exceptions)")
    assert "ValueError: a" in found.traceback
    assert "TypeError: b" in found.traceback


def test_the_prefix_of_torch_distributed_is_removed() -> None:
    text = "\n".join(f"[rank12]: {line}" for line in PLAIN.split("\n"))
    noise = "\n[rank12]:[W1128 12:00:00 ProcessGroupNCCL.cpp:1250] Warning: destroy_process_group() was not called"
    found = find_exception(text + noise, 1)
    assert found is not None
    assert (found.type, found.message, found.traceback) == ("ValueError", "it is wrong", PLAIN)


@pytest.mark.parametrize(
    "after",
    [
        'Exception ignored in: <function f at 0x7f>\nTraceback (most recent call last):\n  File "x", line 1\nOSError: late',
        "/usr/lib/python3.11/tempfile.py:934: ResourceWarning: Implicitly cleaning up",
        "terminate called without an active exception",
    ],
)
def test_output_after_the_exception_is_no_part_of_it(after: str) -> None:
    found = find_exception(f"{PLAIN}\n{after}", 1)
    assert found is not None
    assert (found.type, found.message) == ("ValueError", "it is wrong")


def test_an_exception_in_a_thread_has_not_ended_the_process() -> None:
    assert find_exception(f"Exception in thread Thread-1:\n{PLAIN}", 1) is None


def test_with_another_exit_code_only_the_last_output_counts() -> None:
    assert find_exception(f"{PLAIN}\nTraceback handled, cleaning up\n\nleaving", 3) is None
    found = find_exception(f"it begins\n{PLAIN}\n", 3)
    assert found is not None
    assert found.type == "ValueError"


@pytest.mark.parametrize(
    "text", ["", "\n\n", "all is well", "Traceback (most recent call last):", PLAIN.rpartition("\n")[0]]
)
def test_no_exception(text: str) -> None:
    assert find_exception(text, 1) is None


def test_the_message_of_a_data_loader_is_complete() -> None:
    frames = "".join(f'  File "fetch.py", line {line}, in fetch\n    data = self.fetch()\n' for line in range(40))
    original = f"Original Traceback (most recent call last):\n{frames}RuntimeError: No space left on device (28)"
    text = f"Traceback (most recent call last):\n{frames}RuntimeError: Caught RuntimeError in DataLoader worker process 0.\n{original}"
    found = find_exception(f"{text}\n\n", 1)
    assert found is not None
    assert found.message.startswith("Caught RuntimeError in DataLoader worker process 0.")
    assert found.message.endswith("RuntimeError: No space left on device (28)")
    assert found.traceback == text


def test_an_exception_with_a_long_text_is_shortened() -> None:
    found = find_exception(PLAIN + "x" * 50_000, 1)
    assert found is not None
    assert len(found.message) <= 2000
    assert len(found.traceback) <= 17_000


@pytest.mark.parametrize(
    "text",
    [
        "Traceback (most recent call last):\n" * 3000,
        '  File "a", line 1\n' * 4000,
        "a" * 65_536,
        "\n" * 65_536,
        (PLAIN + "\n\nDuring handling of the above exception, another exception occurred:\n\n") * 400,
        "\x1b[" * 30_000,
        "\x1b]" * 30_000,
        "Fatal Python error: " * 3000,
    ],
)
def test_hostile_output_costs_little_time(text: str) -> None:
    start = time.process_time()
    cleaned = clean(text.encode())
    find_exception(cleaned, 1)
    find_exception(cleaned, 3)
    find_fatal_dump(cleaned)
    assert time.process_time() - start < 1


def test_the_dump_of_a_fatal_signal(tmp_path: Path) -> None:
    script = "import os, signal\ndef crash():\n    os.kill(os.getpid(), signal.SIGABRT)\ncrash()"
    code, text = run(tmp_path, script, "-X", "faulthandler")
    assert code == -6
    found = find_fatal_dump(f"epoch 1\n{text}\nagent of a child: done")
    assert found is not None
    assert found.startswith("Fatal Python error: Aborted\n")
    assert "line 3 in crash" in found
    assert "done" not in found
    assert find_fatal_dump("Aborted") is None


def test_clean_text_has_no_terminal_escapes() -> None:
    assert (
        clean(b"\x1b[31mred\x1b[0m \x1b]0;title\x07x\x9b\xff")
        == "red x\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    )
    assert clean("10%\r20%\r30%\nnext\r\n") == "30%\nnext\n"
    assert clean("a\x00b\u202ec") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    assert clean(os.fsdecode(b"\xff")) == "\N{REPLACEMENT CHARACTER}"
