"""Charts of what the benchmarks have found: SVG files in `docs/pictures`, drawn from the files in `bench/results`.

    python bench/charts.py

Horizontal bars in groups, each with its value and range in figures behind it and its mark as a dashed line. A card of
its own colour, so that they can be read on light and dark pages.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from parts import OURS
from peer_rounds import RATE_CONNECTIONS, SERVICE_MS, STALL_MS, STREAMS
from peer_text import cell
from results import KEPT, Figure, Results, load

PICTURES: Final = Path(__file__).resolve().parents[1] / "docs" / "pictures"

WIDTH: Final = 780
LEFT: Final = 150
PLOT: Final = 400
ROW: Final = 22
BAR: Final = 14
HEAD: Final = 58
GROUP: Final = 30
FOOT: Final = 52

STYLE: Final = """
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328;
  paint-order: stroke; stroke: #ffffff; stroke-width: 3px }
.title { font-size: 16px; font-weight: 600 }
.unit, .foot, .tick { fill: #59636e }
.foot, .tick { font-size: 11px }
.group { font-weight: 600 }
.card { fill: #ffffff; stroke: #d1d9e0 }
.grid { stroke: #e6eaef }
.bar { fill: #9aa7b5 }
.ours { fill: #0969da }
.never { fill-opacity: 0.35 }
.range { stroke: #1f2328; stroke-opacity: 0.7 }
.mark { stroke: #cf222e; stroke-dasharray: 4 3 }
.marked { fill: #cf222e; font-size: 11px }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar."""

    label: str
    value: float | None
    """None: it never happened, and the bar is as long as can be."""
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that belong together."""

    title: str
    bars: tuple[Bar, ...]
    mark: float | None = None
    mark_text: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything that is to be seen."""

    title: str
    unit: str
    groups: tuple[Group, ...]
    foot: str
    log: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """Where a value is, from left to right."""

    low: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        """Pixels; what is beyond the ends is at the end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return LEFT + PLOT * math.log(value / self.low) / math.log(self.high / self.low)
        return LEFT + PLOT * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """The values to be written below."""
        if self.log:
            return [10.0**power for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]
        step = step_of(self.high - self.low)
        return [step * number for number in range(round(self.low / step), math.floor(self.high / step) + 1)]


def step_of(length: float) -> float:
    """A round number that goes some four to ten times into a length."""
    power = 10.0 ** math.floor(math.log10(length))
    return next(power * factor for factor in (0.2, 0.5, 1.0, 2.0) if length / (power * factor) <= 8)


def scale_of(chart: Chart) -> Scale:
    """A scale on which everything has its place."""
    bars = [bar for group in chart.groups for bar in group.bars]
    ends = [end for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None]
    ends += [group.mark for group in chart.groups if group.mark is not None]
    if chart.log:
        positive = [end for end in ends if end > 0] or [1.0]
        low = 10.0 ** math.floor(math.log10(min(positive)))
        return Scale(low, max(10.0 ** math.ceil(math.log10(max(positive))), 10 * low), log=True)
    high = max([*ends, 0.0]) or 1.0
    low = min([*ends, 0.0])
    return Scale(-step_of(high) * math.ceil(-low / step_of(high)), high, log=False)


def svg(chart: Chart) -> str:
    """The picture."""
    scale = scale_of(chart)
    body: list[str] = []
    y = float(HEAD)
    for group in chart.groups:
        body += _group(group, scale, y)
        y += GROUP + ROW * len(group.bars)
    grid = []
    for tick in scale.ticks():
        x = scale.x(tick)
        grid.append(f'<line class="grid" x1="{x:.1f}" y1="{HEAD}" x2="{x:.1f}" y2="{y + 4:.0f}"/>')
        grid.append(f'<text class="tick" x="{x:.1f}" y="{y + 18:.0f}" text-anchor="middle">{number(tick)}</text>')
    height = y + FOOT
    card = f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="8"/>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
            f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(chart.title)}">',
            f"<title>{escape(chart.title)}</title>",
            f"<style>{STYLE}</style>",
            card,
            f'<text class="title" x="16" y="26">{escape(chart.title)}</text>',
            f'<text class="unit" x="16" y="44">{escape(chart.unit)}{", logarithmic" if chart.log else ""}</text>',
            *grid,
            *body,
            f'<text class="foot" x="16" y="{y + 40:.0f}">{escape(chart.foot)}</text>',
            "</svg>\n",
        ]
    )


def _group(group: Group, scale: Scale, top: float) -> list[str]:
    """Title, bars and mark of one group."""
    drawn = [f'<text class="group" x="16" y="{top + 20:.0f}">{escape(group.title)}</text>']
    for line, bar in enumerate(group.bars):
        drawn += _bar(bar, scale, top + GROUP + ROW * line)
    if group.mark is not None:
        x, end = scale.x(group.mark), top + GROUP + ROW * len(group.bars)
        drawn.append(f'<line class="mark" x1="{x:.1f}" y1="{top + GROUP - 4:.0f}" x2="{x:.1f}" y2="{end:.0f}"/>')
        drawn.append(f'<text class="marked" x="{x + 4:.1f}" y="{top + 20:.0f}">{escape(group.mark_text)}</text>')
    return sorted(drawn, key=lambda each: each.startswith("<text"))  # nothing is drawn over a text


def _bar(bar: Bar, scale: Scale, top: float) -> list[str]:
    """Label, bar, range and value, in one row."""
    zero = LEFT if scale.log else scale.x(0)
    ends = sorted((zero, scale.x(scale.high if bar.value is None else bar.value)))
    classes = ["bar"] + ["ours"] * (bar.label == OURS) + ["never"] * (bar.value is None)
    middle = top + BAR / 2
    drawn = [
        f'<text x="{LEFT - 8}" y="{middle + 4:.0f}" text-anchor="end">{escape(bar.label)}</text>',
        f'<rect class="{" ".join(classes)}" x="{ends[0]:.1f}" y="{top:.0f}" width="{max(ends[1] - ends[0], 1):.1f}" '
        f'height="{BAR}"/>',
    ]
    right = ends[1]
    if bar.low is not None and bar.high is not None and bar.low < bar.high:
        right = max(right, scale.x(bar.high))
        drawn.append(
            f'<line class="range" x1="{scale.x(bar.low):.1f}" y1="{middle:.0f}" x2="{scale.x(bar.high):.1f}" '
            f'y2="{middle:.0f}"/>'
        )
    drawn.append(f'<text x="{right + 6:.1f}" y="{middle + 4:.0f}">{escape(bar.text)}</text>')
    return drawn


def number(value: float) -> str:
    """As short as it can be said."""
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:g}" if value == 0 else f"{value:.6g}"


def groups(figures: Sequence[Figure]) -> tuple[Group, ...]:
    """Figures by what they are about, with their marks."""
    made = []
    for what in dict.fromkeys(each.what for each in figures):
        own = [each for each in figures if each.what == what]
        bars = tuple(Bar(each.who, each.value, cell(each), each.low, each.high) for each in own)
        most = [each.at_most for each in own if each.at_most]  # at most 0 needs no line
        mark = most[0] if most else None
        made.append(Group(what, bars, mark, "" if mark is None else f"at most {mark:g}"))
    return tuple(made)


def chart(
    found: Results, title: str, unit: str, parts: Sequence[str], what: str = "", *, log: bool = False
) -> Chart | None:
    """A chart of some parts, each of its groups named by what it is about; None without figures."""
    several = len(parts) > 1
    made = [
        Group(part.partition(", ")[2], group.bars, group.mark, group.mark_text) if several and what else group
        for part in parts
        for group in groups(found.of(part, what))
    ]
    return Chart(title, unit, tuple(made), found.conditions.line(), log) if made else None


RATIO: Final = (
    "CPU, as a ratio to the obvious proxy's; its own is to that of the round before, and so the machine's noise"
)
URGENT_PARTS: Final = ("urgent, the upstream queues", "urgent, the upstream refuses")

CHARTS: Final[dict[str, tuple[str, Callable[[Results], Chart | None]]]] = {
    "bench-cpu": (
        "relay",
        lambda found: chart(found, "What relaying costs", RATIO, ["cpu"]),
    ),
    "bench-memory": (
        "waiting",
        lambda found: chart(found, "What a waiting request needs", "KB of memory for each", ["memory"]),
    ),
    "bench-peers-cpu": (
        "peers",
        lambda found: chart(
            found, "CPU for the same work", "as a ratio to the obvious proxy's, less is better", ["cpu"], log=True
        ),
    ),
    "bench-peers-time": (
        "peers",
        lambda found: chart(
            found,
            "What is added to an answer's time",
            f"ms beyond the upstream's own {SERVICE_MS}, one request at a time, less is better",
            ["latency", "first token"],
        ),
    ),
    "bench-peers-rate": (
        "peers",
        lambda found: chart(
            found,
            "Requests a second on one core",
            f"upstream of {SERVICE_MS} ms, {RATE_CONNECTIONS} connections, more is better; "
            "“no proxy” is as much as the bench can ask for",
            ["rate"],
        ),
    ),
    "bench-peers-streams": (
        "peers",
        lambda found: chart(
            found,
            "Streams without a stall",
            f"% of {STREAMS} streams at once that never stood still for {STALL_MS} ms, more is better",
            ["streams"],
        ),
    ),
    "bench-urgent-refused": (
        "peers",
        lambda found: chart(
            found,
            "Urgent requests refused, the background being twice of what can be served",
            "% of the urgent requests, less is better",
            URGENT_PARTS,
            "refused",
        ),
    ),
    "bench-urgent-wait": (
        "peers",
        lambda found: chart(
            found,
            "How long urgent requests wait, the background being twice of what can be served",
            "seconds, before an upstream that serves in the order of arrival, less is better",
            URGENT_PARTS[:1],
            "mean wait",
            log=True,
        ),
    ),
    "bench-reclaim": (
        "peers",
        lambda found: chart(
            found,
            "How soon a slot is free again when its client has left",
            "ms from the client's leaving to the end of its upstream call, less is better",
            ["reclaim"],
            log=True,
        ),
    ),
}
"""By the picture's name: which results it is drawn from, and how."""


def draw(kept: Path = KEPT, pictures: Path = PICTURES) -> list[Path]:
    """Draw all for which there are results; the files written."""
    written = []
    for name, (source, made_of) in CHARTS.items():
        file = kept / f"{source}.json"
        if file.exists() and (made := made_of(load(file))) is not None:
            picture = pictures / f"{name}.svg"
            picture.write_text(svg(made), "utf-8")
            written.append(picture)
    return written


def main() -> None:
    """Draw, and say what."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    for picture in draw():
        print(picture.relative_to(PICTURES.parents[1]))


if __name__ == "__main__":
    main()
