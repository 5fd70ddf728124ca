"""Finds the Python exception, or the dump of a fatal signal, in the last output of a worker.

The text is arbitrary output of a program. All patterns are linear in its length.
"""

from __future__ import annotations

import re

from ferroelastic._failure.model import ExceptionReport
from ferroelastic._failure.text import head_and_tail, shortened

__all__ = ["find_exception", "find_fatal_dump", "without_rank"]

_HEADER = "Traceback (most recent call last):"
_GROUP_HEADER = "  + Exception Group Traceback (most recent call last):"
_LINKS = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
# Tracebacks that the interpreter prints although the process goes on.
_NOT_FATAL = ("Exception ignored in", "Exception in thread ", "Exception ignored on ", "--- Logging error ---")
# torch.distributed prefixes each line of an uncaught exception.
_RANK = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
_TYPE = re.compile(r"^([^\W\d]\w*(?:\.[^\W\d]\w*|\.<locals>)*)(?:: (.*)|:)?$")
_SYNTAX_ERRORS = ("SyntaxError", "IndentationError", "TabError")
_SYNTAX_FILE = re.compile(r'^  File ".*", line \d+$')
# First lines of other output after the message of an exception.
_NEXT_OUTPUT = re.compile(
    r"^(?:\[rank\d+\]|\[[WEIF]\d|[WEIF]\d{4} |terminate called|Fatal Python error|Exception ignored|Exception in thread"
    r"|\S+:\d+: \w*Warning|\d{4}-\d\d-\d\d[ T]|\[W |Traceback \(most|Process \S+:$|  \+ Exception Group)"
)
_FATAL = re.compile(r"^Fatal Python error: ", re.MULTILINE)
_DUMP_LINE = re.compile(
    r"^(?:Fatal Python error: .*|Python runtime state: .*|Current thread .*|Thread 0x.*|Stack \(most recent.*"
    r"|  File .*|  \.\.\.|  <.*|  Garbage-collecting|Extension modules: .*|Current thread's C stack.*|  Binary file .*|  Cannot .*|)$"
)
_MAX_MESSAGE_LINES = 20
_MAX_MESSAGE = 2000
_MAX_MESSAGE_LINE = 600
_MAX_TRACEBACK = 16_000
_MAX_DUMP_LINES = 80
_SOURCE_LINES = 4
_UNCAUGHT = 1  # exit code of an interpreter with an uncaught exception


def without_rank(text: str) -> str:
    """Return text without the prefix that ``torch.distributed`` adds to each line of an exception."""
    return _RANK.sub("", text)


def find_exception(text: str, exit_code: int | None) -> ExceptionReport | None:
    """Return the uncaught exception at the end of a worker's standard error; ``None`` if there is none.

    Python ends with code 1 after an uncaught exception. With another code, a traceback counts only if it is the last output: the worker may
    have logged it long before.

    Args:
        text: last part of the output, clean.
        exit_code: exit code of the worker; ``None`` if a signal ended it.
    """
    lines = without_rank(text).rstrip().split("\n")
    for start, kind in _starts(lines):
        named = {"plain": _name_of_plain, "group": _name_of_group, "syntax": _name_of_syntax}[kind](lines, start)
        if named is None:
            continue
        end = _end_of_group(lines, start) if kind == "group" else _end_of_message(lines, named)
        last = end if kind == "group" else named + 1
        if exit_code == _UNCAUGHT or last == len(lines):
            return _report(lines, start, named, end)
    return None


def _starts(lines: list[str]) -> list[tuple[int, str]]:
    """Return the first lines of the tracebacks that may have ended the process, the last one first."""
    found = []
    for index in range(len(lines) - 1, -1, -1):
        line = lines[index]
        before = lines[index - 1] if index else ""
        if line == _HEADER and not before.startswith(_NOT_FATAL):
            found.append((index, "plain"))
        elif line == _GROUP_HEADER:
            found.append((index, "group"))
        elif _SYNTAX_FILE.match(line) and not before.startswith(("  ", _HEADER)):
            found.append((index, "syntax"))
    return found


def _name_of_plain(lines: list[str], start: int) -> int | None:
    """Return the index of the line that names the exception of a traceback; ``None`` without such a line."""
    index = start + 1
    while index < len(lines) and (lines[index].startswith("  ") or lines[index] == ""):
        index += 1
    return index if index < len(lines) and _TYPE.match(lines[index]) else None


def _name_of_group(lines: list[str], start: int) -> int | None:
    return next((index for index in range(start, _end_of_group(lines, start)) if _group_name(lines[index])), None)


def _name_of_syntax(lines: list[str], start: int) -> int | None:
    for index in range(start + 1, min(start + 1 + _SOURCE_LINES, len(lines))):
        if lines[index].startswith(_SYNTAX_ERRORS):
            return index
        if not lines[index].startswith("    "):
            break
    return None


def _end_of_message(lines: list[str], named: int) -> int:
    """Return the index after the last line of a message that begins on the line ``named``."""
    index = named + 1
    count = 1
    while index < len(lines) and count < _MAX_MESSAGE_LINES and not _NEXT_OUTPUT.match(lines[index]):
        if lines[index] == "" and (index + 1 == len(lines) or lines[index + 1] in _LINKS):
            break
        # The message of torch's DataLoader contains the traceback of its process.
        count += not lines[index].startswith("  ")
        index += 1
    return index


def _end_of_group(lines: list[str], start: int) -> int:
    index = start + 1
    while index < len(lines) and lines[index].lstrip().startswith(("|", "+")):
        index += 1
    return index


def _report(lines: list[str], start: int, named: int, end: int) -> ExceptionReport:
    group = _group_name(lines[named])
    name, message = _split(group or "\n".join(lines[named:end]))
    traceback = "\n".join(lines[_first_of_chain(lines, start) : end])
    return ExceptionReport(
        type=shortened(name, 200),
        message=head_and_tail(
            "\n".join(shortened(line, _MAX_MESSAGE_LINE) for line in message.split("\n")), _MAX_MESSAGE
        ),
        traceback=head_and_tail(traceback, _MAX_TRACEBACK),
        source="stderr",
    )


def _group_name(line: str) -> str:
    """Return the text of the line that names an exception group, ``""`` for other lines."""
    text = line[4:] if line.startswith("  | ") else ""
    return text if _TYPE.match(text) and not text.startswith(" ") else ""


def _split(named: str) -> tuple[str, str]:
    first, newline, rest = named.partition("\n")
    match = _TYPE.match(first)
    if match is None:
        return "", named
    return match[1], f"{match[2] or ''}{newline}{rest}".strip()


def _first_of_chain(lines: list[str], start: int) -> int:
    """Return the first line of the chain of exceptions that ends with the traceback at ``start``."""
    while True:
        above = start - 1
        while above >= 0 and lines[above] == "":
            above -= 1
        if above < 0 or lines[above] not in _LINKS:
            return start
        earlier = next((at for at, _ in _starts(lines[:above])), None)
        if earlier is None:
            return start
        start = earlier


def find_fatal_dump(text: str) -> str | None:
    """Return faulthandler's dump of a fatal signal: the last one in the text; ``None`` if there is none.

    Args:
        text: last part of the output, clean.
    """
    found = list(_FATAL.finditer(text))
    if not found:
        return None
    kept: list[str] = []
    for line in text[found[-1].start() :].split("\n"):
        if not _DUMP_LINE.match(line) or len(kept) == _MAX_DUMP_LINES:
            break
        kept.append(line)
    return "\n".join(kept).rstrip()
