"""Links between the files of the root folder and the pages lead somewhere. The build checks those between pages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from docs.generated import PAGES
from tests.docs.pages import ROOT, name_of, pages, slugs

if TYPE_CHECKING:
    from pathlib import Path

_LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in _LINK.findall(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in slugs(target)):
            broken.append(link)
    assert broken == []


def test_files_of_the_root_folder_are_pages() -> None:
    for name, page in PAGES.items():
        assert name in (ROOT / "docs" / page.lstrip("/")).read_text()
        assert (ROOT / name).exists()
