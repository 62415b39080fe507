"""The comparison with peers in words: for the terminal, and as a section of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from peer_rounds import (
    RATE_CONNECTIONS,
    RECLAIM_SECONDS_MAX,
    RECLAIMS,
    SERVICE_MS,
    STALL_MS,
    STREAM_EVENTS,
    STREAM_PACE_MS,
    STREAMS,
)
from peer_urgent import BACKGROUND_LOAD, POOL, SERVICE_SECONDS, URGENT_LOAD
from results import Figure, Results

_URGENT: Final = (
    f"background at {100 * BACKGROUND_LOAD:.0f}% and urgent requests at {100 * URGENT_LOAD:.0f}% of {POOL.slots} slots "
    f"of {SERVICE_SECONDS:g} s ± 50%"
)
PARTS: Final = {
    "cpu": "CPU of the serving process, in the obvious proxy's of the same round",
    "cpu, absolute": "the obvious proxy's own CPU, µs",
    "cpu, noise": "the obvious proxy's CPU in its own of the round before: the machine's noise",
    "cpu, gate": "LiteLLM's CPU in trioproxy's of the same round, at least 20; bare: without metrics and log",
    "latency": f"added to an answer that takes {SERVICE_MS} ms, one connection, ms",
    "latency, absolute": "without a proxy, ms",
    "first token": f"added to the time until a stream's first event, which takes {SERVICE_MS} ms, ms",
    "first token, absolute": "without a proxy, ms",
    "rate": f"requests a second against an upstream that takes {SERVICE_MS} ms, {RATE_CONNECTIONS} connections",
    "streams": (
        f"% of {STREAMS} streams at once ({STREAM_EVENTS} events, {STREAM_PACE_MS} ms apart) that never stood "
        f"still for more than {STALL_MS} ms"
    ),
    "reclaim": f"from a client's leaving to the end of its upstream call, {RECLAIMS} clients, ms",
    "urgent, the upstream queues": f"{_URGENT}; the upstream serves in the order of arrival",
    "urgent, the upstream refuses": f"{_URGENT}; the upstream refuses what is beyond its slots with a 429",
}
"""What each part's table is about."""

_NEVER: Final = {"reclaim": f"not within {RECLAIM_SECONDS_MAX:g} s"}


def short(value: float) -> str:
    """Three digits, and not more than are there."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(figure: Figure | None) -> str:
    """Median, range, verdict."""
    if figure is None:
        return ""
    never = _NEVER.get(figure.part, "none answered")
    said = never if figure.value is None else short(figure.value)
    if figure.value is not None and figure.low is not None:
        said += f" ({short(figure.low)}–{never if figure.high is None else short(figure.high)})"
    marked = figure.at_most is not None or figure.at_least is not None
    return f"{said} {'ok' if figure.good else 'MISSED'}" if marked else said


def heading(figure: Figure) -> str:
    """A column's: what it is, and in which unit if the table's title does not say it."""
    return f"{figure.what}, {figure.unit}" if figure.part.startswith("urgent") and figure.unit else figure.what


def table(figures: Sequence[Figure]) -> str:
    """Who in rows, what in columns."""
    columns = list(dict.fromkeys(heading(each) for each in figures))
    cells = {(each.who, heading(each)): each for each in figures}
    rows = [["", *columns]]
    rows += [
        [who, *(cell(cells.get((who, column))) for column in columns)] for who in dict.fromkeys(x.who for x in figures)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def who(found: Results) -> str:
    """The peers' versions, and who is missing."""
    took_part = ", ".join(f"{name} {version}" for name, version in found.versions.items()) or "none"
    missing = "; ".join(f"{name} ({why})" for name, why in found.left_out.items())
    return f"Peers: {took_part}." + (f" Left out: {missing}." if missing else "")


def tables(found: Results) -> list[str]:
    """Each part that was measured: its title and table."""
    return [f"{title}\n\n{table(found.of(part))}" for part, title in PARTS.items() if found.of(part)]


def text(found: Results) -> str:
    """For the terminal."""
    return "\n\n".join([found.conditions.paragraph() + who(found), *tables(found)])


def section(found: Results) -> str:
    """For the page."""
    blocks = [f"```text\n{each}\n```" for each in tables(found)]
    return "\n\n".join([f"{found.conditions.paragraph()}{who(found)}", *blocks])
