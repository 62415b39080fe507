"""Draws `house.svg`: a request's way through the proxy. `python docs/pictures/house.py` writes it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

PICTURE: Final = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 860, 300


class Box(NamedTuple):
    """A part: its corner, its size, its name and what it does."""

    x: int
    y: int
    width: int
    name: str
    does: tuple[str, ...]
    fill: str = "#eef2f7"

    def svg(self) -> str:
        """As SVG."""
        middle = self.x + self.width // 2
        height = 34 + 16 * len(self.does)
        lines = [f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{height}" rx="8" fill="{self.fill}"/>']
        lines.append(f'<text x="{middle}" y="{self.y + 21}" class="name">{self.name}</text>')
        lines += [f'<text x="{middle}" y="{self.y + 40 + 16 * n}">{text}</text>' for n, text in enumerate(self.does)]
        return "\n".join(lines)


BOXES: Final = (
    Box(10, 100, 110, "client", ("any SDK",), "#ffffff"),
    Box(160, 100, 150, "server.py", ("guard, Hypercorn's", "parts, connection")),
    Box(350, 100, 170, "relay.py", ("slot, then upstream,", "then each piece")),
    Box(560, 100, 140, "upstream.py", ("one call, its", "timeouts")),
    Box(740, 100, 110, "model", ("vLLM, OpenAI",), "#ffffff"),
    Box(160, 10, 150, "request.py", ("route, priority,", "deadline")),
    Box(350, 10, 170, "scheduler/core.py", ("who runs, waits,", "is evicted; pure"), "#dbe9d8"),
    Box(350, 210, 170, "events", ("frozen facts of a", "request's life")),
    Box(560, 210, 140, "observe/", ("metrics, log,", "whatever listens"), "#f5e6d3"),
)

ARROWS: Final = (
    (120, 130, 160, 130),
    (310, 130, 350, 130),
    (520, 130, 560, 130),
    (700, 130, 740, 130),
    (235, 100, 235, 76),
    (435, 100, 435, 76),
    (435, 166, 435, 210),
    (520, 240, 560, 240),
)

STYLE: Final = (
    "text{font:13px sans-serif;text-anchor:middle;fill:#333}.name{font-weight:bold}"
    "rect{stroke:#556;stroke-width:1}line{stroke:#556;stroke-width:1.5;marker-end:url(#tip)}"
)


def draw() -> str:
    """The picture."""
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f'<style>{STYLE}</style><defs>{tip}<path d="M0 0L8 4L0 8z" fill="#556"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" style="stroke:none;fill:#fcfcfc"/>',
        *(f'<line x1="{a}" y1="{b}" x2="{c}" y2="{d}"/>' for a, b, c, d in ARROWS),
        *(box.svg() for box in BOXES),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw())
