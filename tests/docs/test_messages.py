"""The messages on the page of troubleshooting, and the names of the protocol, are those of the code."""

from __future__ import annotations

import ast
import re

import pytest
from tests.docs.pages import ROOT
from tests.docs.reads import sources_below

_FIELD = "…"
_PERCENT = re.compile(r"%[-+ 0#]*\d*(?:\.\d+)?[sdrgfi]")
_RUST_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)


def messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.+)`$", text, re.MULTILINE)


def _plain(text: str) -> str:
    return re.sub(f"{_FIELD}+", _FIELD, " ".join(text.split()))


def _python_templates(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(_PERCENT.sub(_FIELD, node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = [str(one.value) if isinstance(one, ast.Constant) else _FIELD for one in node.values]
            found.append("".join(parts))
    return found


def _rust_templates(text: str) -> list[str]:
    strings = [re.sub(r"\\\n\s*", "", one) for one in _RUST_STRING.findall(text)]
    return [re.sub(r"\{[^{}]*\}", _FIELD, one).replace('\\"', '"') for one in strings]


def templates() -> list[str]:
    """The texts of all messages, with ``…`` for each field."""
    found: list[str] = []
    for text in sources_below(ROOT / "python" / "ferroelastic", "*.py").values():
        found.extend(_python_templates(text))
    for folder in ("core", "python"):
        for text in sources_below(ROOT / "rust" / folder / "src", "*.rs").values():
            found.extend(_rust_templates(text))
    return [_plain(one) for one in found]


_TEMPLATES = templates()


@pytest.mark.parametrize("message", messages())
def test_a_message_is_in_the_code(message: str) -> None:
    assert any(_plain(message) in template for template in _TEMPLATES), message


@pytest.mark.parametrize("enum", ["AgentMessage", "HostMessage"])
def test_the_messages_of_the_protocol_are_listed(enum: str) -> None:
    (source,) = (ROOT / "rust" / "core" / "src").rglob("message.rs")
    body = re.search(rf"pub enum {enum} \{{\n(.*?)^\}}", source.read_text(), re.DOTALL | re.MULTILINE)
    assert body
    variants = re.findall(r"^    ([A-Z]\w+)", body[1], re.MULTILINE)
    page = (ROOT / "docs" / "engineering" / "rendezvous.md").read_text()
    assert variants
    assert [name for name in variants if f"| `{name}` |" not in page] == []
