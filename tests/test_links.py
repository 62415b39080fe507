"""Every relative link and anchor of the Markdown that people read leads somewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

from documents import DOCS, PROJECT

FILES = [
    *(PROJECT / name for name in ("README.md", "CHANGELOG.md", "deploy/README.md", "observability/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
PARSER = MarkdownIt("commonmark").enable("table")


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub, and the site, give to a page's headings."""
    tokens = PARSER.parse(path.read_text())
    found: Counter[str] = Counter()
    names = set()
    for block, token in pairwise(tokens):
        if block.type == "heading_open":
            text = "".join(child.content for child in token.children or () if child.type in {"text", "code_inline"})
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
            found[slug] += 1
    return names


def targets(path: Path) -> Iterator[str]:
    """What a page's links and pictures lead to, other sites left out."""
    for block in PARSER.parse(path.read_text()):
        for token in block.children or ():
            target = token.attrGet("href") or token.attrGet("src")
            if target is not None and not re.match(r"[a-z]+:", str(target)):
                yield str(target)


def complaint(path: Path, target: str) -> str:
    """What is wrong with a link of that page; empty if nothing is."""
    place, _, anchor = target.partition("#")
    file = (path.parent / unquote(place)).resolve() if place else path
    if not file.is_relative_to(PROJECT) or not file.exists():
        return f"{target}: there is no such file"
    if anchor and (file.suffix != ".md" or unquote(anchor) not in anchors(file)):
        return f"{target}: there is no such heading"
    return ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert [found for target in targets(path) if (found := complaint(path, target))] == []


@pytest.mark.parametrize("target", ["nowhere.md", "tutorial.md#nothing", "#nothing", "../src/no.py", "/etc/passwd"])
def test_a_link_to_nowhere_is_found(target: str) -> None:
    assert complaint(DOCS / "index.md", target)


def test_links_are_seen() -> None:
    assert sum(1 for path in FILES for _ in targets(path)) > 100
    assert "2-an-upstream" in anchors(DOCS / "tutorial.md")
