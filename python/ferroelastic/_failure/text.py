"""Text of other processes, made safe to show: bounded, without terminal escapes and control characters."""

from __future__ import annotations

import re

__all__ = ["clean", "head_and_tail", "last_lines", "shortened"]

_MAX_LINE = 500
# Sequences that move the cursor, set colours or change the title: CSI, OSC with its end, and the two-character escapes.
_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,1000}(?:\x07|\x1b\\)?|[ -/]*[0-~])|\x9b[0-?]*[ -/]*[@-~]"
)
# Control characters, and the marks that change the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str | bytes) -> str:
    r"""Return text that is safe to show on a terminal. Lines end with ``\n``; of a line with ``\r`` the last state remains."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    text = _ESCAPE.sub("", text.replace("\r\n", "\n"))
    if "\r" in text:
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def shortened(text: str, size: int) -> str:
    """Return the first ``size`` characters, with a mark if text was left out."""
    return text if len(text) <= size else f"{text[: max(size - 4, 0)]} ..."


def head_and_tail(text: str, size: int) -> str:
    """Return text of about ``size`` characters: its first lines, the number of lines left out, and its last lines."""
    if len(text) <= size:
        return text
    lines = text.split("\n")
    head: list[str] = []
    tail: list[str] = []
    room = size // 3
    while len(head) < len(lines) and room >= len(lines[len(head)]):
        room -= len(lines[len(head)]) + 1
        head.append(lines[len(head)])
    room = size - size // 3
    while len(head) + len(tail) < len(lines) and room >= len(lines[-1 - len(tail)]):
        room -= len(lines[-1 - len(tail)]) + 1
        tail.append(lines[-1 - len(tail)])
    omitted = len(lines) - len(head) - len(tail)
    return "\n".join([*head, f"  ... {omitted} lines left out ...", *reversed(tail)])


def last_lines(text: str, count: int) -> list[str]:
    """Return the last ``count`` lines that are not empty, each shortened."""
    lines = [line.rstrip() for line in text.split("\n")]
    return [shortened(line, _MAX_LINE) for line in lines if line][-count:]
