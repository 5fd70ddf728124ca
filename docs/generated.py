"""Directives for the parts of the pages that are made from the code: options, environment variables, differences to torch."""

from __future__ import annotations

import os
import re
from argparse import OPTIONAL, SUPPRESS, Action
from typing import TYPE_CHECKING, Any

from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from docutils.nodes import Node
    from sphinx.application import Sphinx

__all__ = ["PAGES", "SECTIONS", "differences", "missing_names", "options", "setup", "variables", "worker_variables"]

SECTIONS: dict[str, str] = {
    "nnodes": "Size of the job",
    "rdzv_backend": "Rendezvous",
    "max_restarts": "Agent",
    "module": "The program of the workers",
    "log_dir": "Output and logs",
    "node_rank": "Static rendezvous",
    "logs_specs": "Plug-ins, devices and signals",
    "exec": "Other programs",
    "training_script": "Script",
}
"""Headings of the command line reference, by the first option below each."""


def options() -> Iterator[str]:
    """Markdown for the options of the parser."""
    for action in _actions():
        if action.dest in SECTIONS:
            yield f"## {SECTIONS[action.dest]}"
        yield from _option(action)


def _actions() -> list[Action]:
    from ferroelastic._arguments import get_args_parser

    # The parser takes its defaults from the environment.
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PET_")}
    try:
        parser = get_args_parser()
    finally:
        os.environ.update(kept)
    return [action for action in parser._actions if action.dest != "help"]  # noqa: SLF001 - argparse has no list of its own


def _option(action: Action) -> Iterator[str]:
    from ferroelastic.argparse_util import check_env, env

    names = [name for name in action.option_strings if "_" not in name] or [action.dest]
    takes_value = action.nargs != 0 and bool(action.option_strings)
    value = f" {action.dest.upper()}" if takes_value and action.choices is None else ""
    if action.nargs == OPTIONAL:
        value = f"[={action.metavar}]"
    if action.choices is not None:
        value = " {" + ",".join(map(str, action.choices)) + "}"
    yield f"### `{', '.join(names)}{value}`"
    text = _plain(action.help or "")
    notes = []
    if takes_value and action.default not in (None, "", [], SUPPRESS):
        default = ",".join(action.default) if isinstance(action.default, list) else action.default
        notes.append(f"Default: `{default}`.")
    if isinstance(action, env | check_env):
        notes.append(f"Variable: `PET_{action.dest.upper()}`.")
    others = [name for name in action.option_strings if "_" in name]
    if others:
        notes.append(f"Also spelled `{', '.join(others)}`.")
    yield text
    if notes:
        yield "\n".join(notes)


def variables() -> Iterator[str]:
    """Markdown for the environment variables that the programs of this package read."""
    from docs.variables import GROUPS, VARIABLES

    for group, title in GROUPS.items():
        yield f"## {title}"
        rows = [(f"`{one.name}`", one.meaning, one.default) for one in VARIABLES if one.group == group]
        yield _table(("variable", "effect", "unset"), rows)


def worker_variables() -> Iterator[str]:
    """Markdown for the environment variables that workers are given."""
    from docs.variables import WORKER_VARIABLES

    yield _table(("variable", "value"), [(f"`{name}`", value) for name, value in WORKER_VARIABLES])


def differences() -> Iterator[str]:
    """Markdown for the intended differences to torch."""
    from tests.conformance.differences import DIFFERENCES

    rows = [(_plain(one.of), _plain(one.torch), _plain(one.ours), _plain(one.why)) for one in DIFFERENCES.values()]
    yield _table(("name", "torch 2.13", "ferroelastic", "reason"), rows)


def missing_names() -> Iterator[str]:
    """Markdown for the names of torch's modules that this package lacks."""
    from tests.conformance.differences import ABSENT

    yield _table(("name", "reason"), [(f"`{name}`", _plain(why)) for name, why in ABSENT.items()])


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, with options as code."""
    for character in "\\*_<[$":
        text = text.replace(character, f"\\{character}")
    return re.sub(r"(?<![\w`-])--?[a-z][a-z-]*(?:=[\w:]+)?", lambda option: f"`{option[0]}`", text)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


_PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "options": options,
    "variables": variables,
    "worker-variables": worker_variables,
    "differences": differences,
    "missing-names": missing_names,
}


class Generated(SphinxDirective):
    """Puts one of the parts into a page."""

    required_arguments = 1

    def run(self) -> list[Node]:
        """Return the part, parsed as the page itself is."""
        text = "\n\n".join(_PARTS[self.arguments[0]]())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


PAGES: dict[str, str] = {
    "ARCHITECTURE.md": "/engineering/architecture.md",
    "CHANGELOG.md": "/changelog.md",
    "CONTRIBUTING.md": "/engineering/contributing.md",
    "SECURITY.md": "/security.md",
}
"""Files of the root folder that pages include, and their pages."""


def _link_to_pages(_app: Sphinx, _path: object, _document: str, content: list[str]) -> None:
    """Make the links of an included file of the root folder point to pages."""
    text = content[0].replace("](docs/", "](/")
    for name, page in PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    content[0] = text


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive with Sphinx."""
    app.add_directive("generated", Generated)
    app.connect("include-read", _link_to_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
