"""Sphinx reads its settings here. ``just docs`` builds the pages."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.fspath(ROOT))

project = "ferroelastic"
author = "the ferroelastic developers"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx gives the name
version = release = re.findall(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docs.generated"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

# Headings get the anchors that GitHub gives them, and a link to a missing anchor is a warning.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"ferroelastic {release}"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
html_last_updated_fmt = None

# Shell sessions show output too, which no lexer knows.
suppress_warnings = ["misc.highlighting_failure"]
