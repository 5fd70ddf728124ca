"""The messages on the page of troubleshooting, and the names of the protocol, are those of the code."""

from __future__ import annotations

import ast
import re

import pytest
from tests.docs.pages import ROOT
from tests.docs.reads import sources_below

_FIELD = "…"
_REASONS = ("ColdError", "Refusal")
_PERCENT = re.compile(r"%[-+ 0#]*\d*(?:\.\d+)?[sdrgfi]")
_RUST_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)


def messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.+)`$", text, re.MULTILINE)


def reasons() -> list[str]:
    """The first column of the tables of cold starts."""
    text = (ROOT / "docs" / "warm.md").read_text(encoding="utf-8")
    section = text.partition("## Reasons for a cold start")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)


def _plain(text: str) -> str:
    return re.sub(f"{_FIELD}+", _FIELD, " ".join(text.split()))


def _python_templates(text: str) -> list[str]:
    return [template for node in ast.walk(ast.parse(text)) if (template := _template(node)) is not None]


def _template(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _PERCENT.sub(_FIELD, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(one.value) if isinstance(one, ast.Constant) else _FIELD for one in node.values)
    return None


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


@pytest.mark.parametrize("message", [*messages(), *reasons()])
def test_a_message_is_in_the_code(message: str) -> None:
    assert any(_plain(message) in template for template in _TEMPLATES), message


def raised_reasons() -> list[str]:
    """The texts of cold starts in the code, with ``…`` for each field."""
    found = []
    for text in sources_below(ROOT / "python" / "ferroelastic" / "_warm", "*.py").values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _REASONS:
                text_of = node.args[0]
                texts = [text_of.body, text_of.orelse] if isinstance(text_of, ast.IfExp) else [text_of]
                found += [template for one in texts if (template := _template(one)) is not None]
    engine = ROOT / "rust" / "core" / "src" / "engine"
    pools = "".join((engine / name).read_text(encoding="utf-8") for name in ("pool.rs", "pools.rs"))
    found += _rust_templates("\n".join(re.findall(r"let reason = format!\((.+)\);", pools)))
    return [_plain(one) for one in found]


def test_each_reason_of_a_cold_start_is_listed() -> None:
    raised = raised_reasons()
    assert len(raised) > 25
    listed = reasons()
    assert [reason for reason in raised if reason not in listed] == []


@pytest.mark.parametrize(
    ("enum", "source", "page"),
    [
        ("AgentMessage", "rendezvous/message.rs", "rendezvous.md"),
        ("HostMessage", "rendezvous/message.rs", "rendezvous.md"),
        ("Report", "warm/wire.rs", "warm-messages.md"),
    ],
)
def test_the_messages_of_a_protocol_are_listed(enum: str, source: str, page: str) -> None:
    code = (ROOT / "rust" / "core" / "src" / source).read_text()
    body = re.search(rf"pub enum {enum} \{{\n(.*?)^\}}", code, re.DOTALL | re.MULTILINE)
    assert body
    variants = re.findall(r"^    ([A-Z]\w+)", body[1], re.MULTILINE)
    text = (ROOT / "docs" / "engineering" / page).read_text()
    assert variants
    assert [name for name in variants if f"| `{name}` |" not in text] == []
