"""How Sphinx makes the site: `nox -s docs`. Nothing is fetched while it is built, nor when it is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import trioproxy

project = "trioproxy"
author = "The trioproxy authors"
project_copyright = author
release = version = trioproxy.__version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["tests"]
nitpicky = True

# Anchors as GitHub makes them, so that the same links work in both places.
myst_heading_anchors = 4

html_theme = "furo"
html_title = "trioproxy"
html_copy_source = False
html_show_sphinx = False

DOCS = Path(__file__).parent
_LINK_UP = re.compile(r"\]\((\.\./[^)#]+\.md)(#[^)]*)?\)")
_PART = re.compile(r"^- \*\*(.+?)\*\*:(.*\n(?:  .*\n)*)", re.MULTILINE)
_LINK_DOWN = re.compile(r"\]\(([a-z][^)#]*)\.md\)")


class Application(Protocol):
    """What is used of `sphinx.application.Sphinx`, so that types are checked without it."""

    def connect(self, event: str, callback: Callable[..., None]) -> int: ...


def setup(app: Application) -> None:
    """Called by Sphinx."""
    app.connect("source-read", make_contents)
    app.connect("source-read", hand_out_pages_beside)


def make_contents(_: Application, page: str, source: list[str]) -> None:
    """The site's contents are what `index.md` links to, in its parts and its order."""
    if page == "index":
        for name, links in _PART.findall(source[0]):
            pages = "\n".join(_LINK_DOWN.findall(links))
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {name}\n\n{pages}\n```\n"


def hand_out_pages_beside(_: Application, page: str, source: list[str]) -> None:
    """Links to Markdown outside of this folder, which is no page of the site, hand the file itself to the reader.

    Whether their anchors exist is for `tests/test_links.py` to say.
    """

    def replace(found: re.Match[str]) -> str:
        target = (DOCS / page).parent / found[1]
        return found[0] if target.resolve().is_relative_to(DOCS) else f"](<path:{found[1]}>)"

    source[0] = _LINK_UP.sub(replace, source[0])
