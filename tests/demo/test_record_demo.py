"""The README's picture of the demo: the script that makes it, and the one that is there."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


def check(picture: Path) -> list[str]:
    """It is a self-contained SVG; returns the styles of its keyframes."""
    source = picture.read_text("utf-8")
    assert len(source.encode()) < 500_000
    root = ElementTree.fromstring(source)
    assert root.tag == f"{SVG}svg"
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "title", "style", "rect", "circle", "text", "g")
    }
    for element in root.iter():
        assert not [name for name in element.attrib if "href" in name or name.startswith("on")]
    assert not re.search(
        r"url\(|@import|@font-face|https?://(?!www\.w3\.org/2000/svg)", source.replace("127.0.0.1", "")
    )
    text = "".join(root.itertext()).replace("\N{NO-BREAK SPACE}", " ")
    for expected in ("critical waits", "very_low", "what happened last", "tail -f logs/proxy.log", "127.0.0.1:8080"):
        assert expected in text
    check_rows(root)
    return re.findall(r"@keyframes (\S+)", source)


def check_rows(root: ElementTree.Element) -> None:
    """At any time each row shows one thing at most, and in the end, where nothing moves, it shows what stands last."""
    spans: dict[str, list[tuple[int, int, bool]]] = {}
    for group in root.iter(f"{SVG}g"):
        if found := re.fullmatch(r"k(\d+)-(\d+)( h)?", group.get("class", "")):
            spans.setdefault(group.attrib["transform"], []).append((int(found[1]), int(found[2]), not found[3]))
    last = max(end for of_row in spans.values() for _, end, _ in of_row)
    assert len(spans) > 5
    for of_row in spans.values():
        assert all(one[1] <= other[0] for one, other in pairwise(of_row))
        assert [end == last for _, end, _ in of_row] == [visible for _, _, visible in of_row]


def test_the_picture_that_is_there() -> None:
    assert len(check(PICTURES / "demo.svg")) > 20


def test_the_script_makes_one(tmp_path: Path) -> None:
    out = tmp_path / "demo.svg"
    script = [
        sys.executable,
        str(PICTURES / "record_demo.py"),
        "--seconds",
        "2",
        "--per-second",
        "4",
        "--out",
        str(out),
    ]
    done = subprocess.run(script, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{out}: " in done.stdout
    assert len(check(out)) > 4


def test_a_foreign_reference_would_be_found(tmp_path: Path) -> None:
    source = (PICTURES / "demo.svg").read_text("utf-8")
    bad = tmp_path / "bad.svg"
    for reference in ("@font-face { src: url(x) }", "@import 'https://fonts.example/x.css';"):
        bad.write_text(source.replace("<style>", f"<style>{reference}", 1), "utf-8")
        with pytest.raises(AssertionError):
            check(bad)
