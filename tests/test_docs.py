"""The documentation does what it says, and says what the code does."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import make_reference
import pytest
import reference_words
import trio

from documents import DOCS, PROJECT, blocks, follow
from standins import STAND_INS, VARIABLES, serve
from trioproxy import config
from trioproxy.demo.show import Options
from trioproxy.observe.metrics import KEYS_MAX, OTHER_KEYS

HOW_TO = ("openai", "azure", "vllm", "llama-cpp", "ollama", "open-webui", "priorities", "keys", "reload", "tls")
PAGES = ["README.md", "docs/tutorial.md", *(f"docs/how-to/{name}.md" for name in HOW_TO)]
WITH_OTHER_CLIENTS = {"docs/how-to/langchain.md", "docs/how-to/litellm.md"}
"""Run by `nox -s clients`."""


@pytest.mark.parametrize("name", PAGES)
async def test_what_a_page_tells_to_do_works(name: str, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        replaced = {written: await nursery.start(serve, kind) for written, kind in STAND_INS.get(name, {}).items()}
        await trio.to_thread.run_sync(follow, PROJECT / name, tmp_path, replaced, VARIABLES)
        nursery.cancel_scope.cancel()
    for line in log_lines(tmp_path):
        assert line["event"] in reference_words.LOG_EVENTS
        assert line.keys() <= make_reference.log_keys().keys()


def log_lines(folder: Path) -> Iterator[dict[str, object]]:
    for file in folder.glob("logs/*.log"):
        yield from map(json.loads, file.read_text().splitlines())


def test_every_page_that_can_be_followed_is_followed() -> None:
    pages = (PROJECT / "README.md", *DOCS.rglob("*.md"))
    marked = {str(page.relative_to(PROJECT)) for page in pages if any(blocks(page.read_text()))}
    assert marked - WITH_OTHER_CLIENTS == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_no_page_looks_for_its_lines_in_the_demos_log(name: str) -> None:
    demos = str(Options().log_file)
    lines = [block.line for block in blocks((PROJECT / name).read_text()) if demos in block.text]
    assert lines == [], f"whoever has run `trioproxy demo` in this folder finds its lines there: {lines}"


@pytest.mark.parametrize("name", sorted(make_reference.PAGES))
def test_the_reference_says_what_the_code_says(name: str) -> None:
    written = make_reference.read(make_reference.FOLDER / name)
    assert written == make_reference.PAGES[name](), "out of date: run `nox -s docs`, or python docs/make_reference.py"


def test_the_whole_file_of_the_reference_is_the_defaults(tmp_path: Path) -> None:
    (_, rest) = make_reference.settings_page().split("```yaml\n")
    file = tmp_path / "whole.yaml"
    file.write_text(rest.partition("```")[0])
    assert config.load(file, {}) == config.Settings()


def test_what_the_reference_lacks_words_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(reference_words.LOG_EVENTS, "listening")
    with pytest.raises(SystemExit, match="listening"):
        make_reference.logs_page()
    monkeypatch.delitem(reference_words.MEANINGS, "queue_full")
    with pytest.raises(SystemExit, match="queue_full"):
        make_reference.errors_page()


def test_how_many_keys_have_series_of_their_own_is_said() -> None:
    text = " ".join((DOCS / "how-to" / "keys.md").read_text().split())
    assert f"Of more than {KEYS_MAX} keys, those beyond share one label, `{OTHER_KEYS}`" in text


def test_the_picture_is_what_its_script_draws() -> None:
    script = DOCS / "pictures" / "house.py"
    assert runpy.run_path(str(script))["draw"]() == script.with_suffix(".svg").read_text()
