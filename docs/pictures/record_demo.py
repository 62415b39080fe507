"""Records `trioproxy demo` as an animated picture: a real run, its pages by rich, one SVG that needs nothing else.

    python docs/pictures/record_demo.py

writes `demo.svg` beside this script. No fonts, scripts or other files are fetched by whoever looks at it; where
animations are not shown, or not wanted, the last page stands still.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import click
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from trioproxy.demo.lines import Stage
from trioproxy.demo.page import page
from trioproxy.demo.scenarios import DEFAULT, SCENARIOS
from trioproxy.demo.show import Options, run
from trioproxy.demo.watch import View

HERE: Final = Path(__file__).parent

COLUMNS: Final = 96
ROWS: Final = 25
CHARACTER_WIDTH: Final = 12.2
LINE_HEIGHT: Final = 24.4
"""Pixels, as in rich's SVG."""

MARGIN: Final = 16
BAR_HEIGHT: Final = 44
HOLD_FRAMES: Final = 6
"""For how many frames the last page stands before everything begins anew."""

DARK: Final = TerminalTheme(
    background=(13, 17, 23),
    foreground=(201, 209, 217),
    normal=[
        *((72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34)),
        *((88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)),
    ],
)

_PIECES: Final = "{styles}\0{matrix}"
_TEXT: Final = re.compile(
    r'<text class="(?P<style>[^"]+)" x="(?P<x>[^"]+)" y="[^"]+" textLength="(?P<length>[^"]+)" '
    r'clip-path="url\(#demo-line-(?P<line>\d+)\)">(?P<text>.*?)</text>'
)

Page = list[Text]


class Recorder:
    """An output of the demo that keeps its pages."""

    def __init__(self, interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self.pages: list[Page] = []
        self._stage: Stage | None = None

    def begin(self, stage: Stage) -> None:
        """Show the usual address and file, whatever this run has."""
        usual = Options()
        self._stage = replace(stage, addresses=(f"http://{usual.bind[0]}",), log_file=usual.log_file)

    def show(self, view: View) -> None:
        """Keep the page."""
        assert self._stage is not None
        self.pages.append(page(view, self._stage, COLUMNS, ROWS))

    def end(self) -> None:
        """Nothing to be put back."""


class Span(NamedTuple):
    """A row's content, and during which pages it is there: from `first` to before `last`."""

    row: int
    content: str
    first: int
    last: int


def picture(pages: list[Page], seconds_per_page: float) -> str:
    """The pages, one after the other and over again, as one SVG."""
    styles, rows = _drawn(pages)
    count = len(pages) + HOLD_FRAMES
    spans = [span for row in range(ROWS) for span in _spans(row, [page_rows[row] for page_rows in rows], count)]
    groups = "\n".join(_group(span, count) for span in spans if span.content)
    changing = sorted({(span.first, span.last) for span in spans if not _lasts(span, count)})
    keyframes = "\n".join(_keyframes(first, last, count, seconds_per_page * count) for first, last in changing)
    width, height = COLUMNS * CHARACTER_WIDTH + 2 * MARGIN, ROWS * LINE_HEIGHT + BAR_HEIGHT + MARGIN
    lights = "".join(
        f'<circle cx="{MARGIN + 8 + 22 * index}" cy="22" r="7" fill="{colour}"/>'
        for index, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="t">
<title id="t">trioproxy demo: critical requests hardly wait; the least urgent are evicted and rejected</title>
<style>
text {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 20px }}
.h {{ visibility: hidden }}
{styles}
{keyframes}
@media (prefers-reduced-motion: reduce) {{ g {{ animation: none !important }} }}
</style>
<rect width="100%" height="100%" rx="10" fill="#0d1117" stroke="#30363d"/>
{lights}
<text x="{width / 2:g}" y="28" text-anchor="middle" fill="#8b949e">trioproxy demo</text>
<g transform="translate({MARGIN} {BAR_HEIGHT})">
{groups}
</g>
</svg>
"""


def _drawn(pages: list[Page]) -> tuple[str, list[list[str]]]:
    """Every page's rows as SVG, drawn by rich as one long page, so that all of them share their styles."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    for drawn in pages:
        for row in range(ROWS):
            console.print(drawn[row] if row < len(drawn) else "", no_wrap=True, crop=True)
    styles, _, matrix = console.export_svg(theme=DARK, code_format=_PIECES, unique_id="demo").partition("\0")
    rows = [[""] * ROWS for _ in pages]
    for found in _TEXT.finditer(matrix):
        if not found["text"].replace("&#160;", ""):
            continue
        index, row = divmod(int(found["line"]), ROWS)
        style = found["style"].removeprefix("demo-")
        rows[index][row] += (
            f'<text class="{style}" x="{found["x"]}" textLength="{found["length"]}">{found["text"]}</text>'
        )
    return styles.replace("demo-", ""), rows


def _spans(row: int, contents: list[str], count: int) -> list[Span]:
    """A row's contents in time, equal ones that follow each other as one."""
    changes = [index for index, content in enumerate(contents) if not index or content != contents[index - 1]]
    return [Span(row, contents[first], first, last) for first, last in zip(changes, [*changes[1:], count], strict=True)]


def _lasts(span: Span, count: int) -> bool:
    return (span.first, span.last) == (0, count)


def _group(span: Span, count: int) -> str:
    moving = "" if _lasts(span, count) else f' class="k{span.first}-{span.last}{" h" if span.last < count else ""}"'
    return f'<g{moving} transform="translate(0 {(span.row + 0.82) * LINE_HEIGHT:.1f})">{span.content}</g>'


def _keyframes(first: int, last: int, count: int, seconds: float) -> str:
    name = f"k{first}-{last}"
    steps = ([(0, "hidden")] if first else []) + [(first, "visible")] + ([(last, "hidden")] if last < count else [])
    moments = " ".join(f"{100 * index / count:.3f}% {{ visibility: {state} }}" for index, state in steps)
    return f".{name} {{ animation: {name} {seconds:g}s step-end infinite }} @keyframes {name} {{ {moments} }}"


@click.command()
@click.option("--seconds", default=14.0, show_default=True, help="How long to record.")
@click.option("--per-second", default=2.0, show_default=True, help="Pages a second.")
@click.option("--scenario", type=click.Choice(tuple(SCENARIOS)), default=DEFAULT, show_default=True)
@click.option("--seed", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "demo.svg", help="[default: beside this script]")
def main(seconds: float, per_second: float, scenario: str, seed: int, out: Path) -> None:
    """Run the demo and write the picture of it."""
    recorder = Recorder(1 / per_second)
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            bind=("127.0.0.1:0",),
            log_file=Path(folder, "proxy.log"),
            duration=seconds,
            seed=seed,
            scenario=scenario,
        )
        if status := run(options, recorder):
            sys.exit(status)
    drawing = picture(recorder.pages, 1 / per_second)
    out.write_text(drawing, "utf-8")
    click.echo(f"{out}: {len(recorder.pages)} pages, {len(drawing.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
