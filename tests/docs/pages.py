"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

from ferroelastic._arguments import EXEC

__all__ = ["ROOT", "Block", "blocks", "commands", "ferrorun_arguments", "name_of", "pages", "slugs"]

ROOT = Path(__file__).resolve().parent.parent.parent
_IN_ROOT = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
_FENCE = re.compile(r"(?P<indent> *)```(?P<info>\S.*)?$")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
_SHELL_OPERATORS = re.compile(r"[|&;<>(){}]+")


class Block(NamedTuple):
    """A block of code."""

    page: Path
    line: int
    language: str
    caption: str
    text: str
    not_run: str
    """The reason not to run it; empty if it is run."""


def pages() -> list[Path]:
    """All pages, those of the root folder included."""
    return [*(ROOT / name for name in _IN_ROOT), *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = []
    lines = page.read_text(encoding="utf-8").splitlines()
    index = 0
    while index < len(lines):
        fence = _FENCE.match(lines[index])
        index += 1
        if fence is None:
            continue
        end = next(at for at in range(index, len(lines)) if lines[at].strip() == "```")
        body = textwrap.dedent("\n".join(lines[index:end])).splitlines()
        options = [line for line in body if re.match(r":[a-z-]+:", line)]
        before = _NOT_RUN.fullmatch(lines[index - 2].strip()) if index > 1 else None
        found.append(
            Block(
                page=page,
                line=index,
                language=(fence["info"] or "").removeprefix("{code-block}").strip(),
                caption=next((one.removeprefix(":caption: ") for one in options if one.startswith(":caption: ")), ""),
                text="\n".join(body[len(options) :]).strip("\n") + "\n",
                not_run=before[1] if before else "",
            )
        )
        index = end + 1
    return found


def commands(block: Block) -> tuple[list[str], list[str]]:
    """The commands of a shell session, and the lines of output that it shows."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    return [line[2:] for line in lines if line.startswith("$ ")], [line for line in lines if not line.startswith("$ ")]


def ferrorun_arguments(text: str) -> list[list[str]]:
    """The arguments of each call of ferrorun in a piece of shell."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r"\$\([^()]*\)", "1", text)
    found = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for start, word in enumerate(words):
            if word.rpartition("/")[2] != "ferrorun" or not "".join(words[start + 1 : start + 2]).startswith("-"):
                continue
            rest = words[start + 1 :]
            stop = next((at for at, one in enumerate(rest) if _SHELL_OPERATORS.fullmatch(one)), len(rest))
            if rest[0] != EXEC:  # another program, with its own options
                found.append(rest[:stop])
    return found


def slugs(page: Path) -> set[str]:
    """Anchors that GitHub and the built pages give to the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
