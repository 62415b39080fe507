"""The demo as one live page: what it looks like at one moment, as styled lines.

Pure: a view in, lines out. This module must not know how they get onto a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from rich.text import Text

from trioproxy.demo.lines import Stage
from trioproxy.demo.watch import EVICTED, OVERTOOK, WHY, YOU, YOURS, Holder, Level, View, told_together
from trioproxy.errors import Status

LEVEL_STYLES: Final[Mapping[str, str]] = MappingProxyType(
    {"critical": "bold #e02f44", "high": "#ff9830", "normal": "#5794f2", "low": "#8ab8ff", "very_low": "#9fa7b3"}
)
"""The colours of the dashboard in `observability/`."""

GOOD: Final = "#73bf69"
BAD: Final = "#e02f44"
FAINT: Final = "#7b8087"
STRONG: Final = "bold"
KIND_STYLES: Final[Mapping[str, str]] = MappingProxyType({OVERTOOK: GOOD, YOURS: f"bold {GOOD}", EVICTED: "#ff9830"})

WIDE: Final = 100
"""Columns from which on there is room for more than the necessary."""

TALL: Final = 30
"""So many rows, likewise."""

TOGETHER_SECONDS: Final = 0.5
"""Equal happenings this close to each other share a line."""

WAIT_SCALE_SECONDS_MIN: Final = 1.0
"""What a full bar of waiting stands for at least, so that short waits look short."""

_HOW_TO_END: Final = "Ctrl-C ends"
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_OTHERS: Final = (Status.FAILED, Status.CANCELLED)


def page(view: View, stage: Stage, width: int, height: int) -> list[Text]:
    """At most `height` lines, none wider than `width` columns; what has no room is left out, the details first."""
    lines = [_title(view, stage, width), _verdict(view), *_table(view, width)]
    rest = height - len(lines)
    slots = [_heading("slots", width), *_slots(view, stage, width)]
    commands = [
        _heading("try in another terminal, and compare with X-Priority: very_low", width),
        *_commands(stage, height),
    ]
    if rest >= len(slots):
        lines += slots
        rest -= len(slots)
    happenings = rest - len(commands) if rest >= len(commands) + 3 else rest
    if happenings >= 2:
        lines += [_heading("what happened last", width), *_happenings(view, happenings - 1)]
    if happenings != rest:
        lines += commands
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def bar(share: float, width: int) -> str:
    """A horizontal bar that fills `share` (0 to 1) of `width` columns, in eighths of a column."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    whole, part = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[part] if part else "")).ljust(width)


def _title(view: View, stage: Stage, width: int) -> Text:
    scenario = stage.scenario
    speed = "" if scenario.speed == 1 else f" ×{scenario.speed:g}"
    title = Text.assemble(
        ("trioproxy demo", STRONG),
        (f"{view.seconds:5.0f} s  ", FAINT),
        (f"{scenario.name}{speed}: ", GOOD),
        scenario.about.partition(":")[0],
    )
    if (room := width - title.cell_len - len(_HOW_TO_END)) >= 2:
        title.append(" " * room + _HOW_TO_END, style=FAINT)
    return title


def _verdict(view: View) -> Text:
    """What is to be seen, in one sentence."""
    urgent, *others = view.levels
    refused, sent = sum(level.refused for level in others), sum(level.sent for level in others)
    if math.isnan(urgent.wait_max):
        return Text("The first requests are coming in.", style=FAINT)
    return Text.assemble(
        (urgent.name, LEVEL_STYLES[urgent.name]),
        " waits ",
        (f"≤ {urgent.wait_max:.2f} s", f"bold {GOOD}"),
        f", {urgent.refused or 'none'} refused.  ",
        ("The rest pays: " if refused else "The rest: ", STRONG),
        (f"{refused or 'none'} of {sent} refused", f"bold {BAD}" if refused else GOOD),
        ".",
    )


def _table(view: View, width: int) -> list[Text]:
    queue_width = view.places if width >= WIDE else view.places // 2
    others = any(view.total(status) for status in _OTHERS)
    head = (
        f"{'level':<9}{'queued':<{queue_width + 4}}{'run':>3}{'served':>7}{'evicted':>8}{'rejected':>9}{'timeout':>8}"
    )
    head += f"{'other':>6}" if others else ""  # failed, or its client left
    head += f"{'p50':>6}{'p99':>6}  "
    scale = max((level.wait_p99 for level in view.levels if not math.isnan(level.wait_p99)), default=0.0)
    scale = max(scale, WAIT_SCALE_SECONDS_MIN)
    bar_width = min(max(width - len(head), 0), 40)
    rows = [_row(level, view, queue_width, others, bar_width, scale) for level in view.levels]
    return [Text(f"{head}wait", style=FAINT), *rows]


def _row(level: Level, view: View, queue_width: int, others: bool, bar_width: int, scale: float) -> Text:
    style = LEVEL_STYLES[level.name]

    def count(number: int, width: int, some: str = "") -> tuple[str, str]:
        return f"{number or '·':>{width}}", (some if number else FAINT)

    row = Text.assemble(
        (f"{level.name:<9}", style),
        (bar(level.queued / max(view.places, 1), queue_width), style),
        count(level.queued, 3),
        " ",
        count(level.running, 3, STRONG),
        count(level.ended.get(Status.COMPLETED, 0), 7, GOOD),
        count(level.ended.get(Status.EVICTED, 0), 8, "#ff9830"),
        count(level.ended.get(Status.REJECTED, 0), 9, BAD),
        count(level.ended.get(Status.TIMEOUT, 0), 8, BAD),
    )
    if others:
        row.append_text(Text.assemble(count(sum(level.ended.get(status, 0) for status in _OTHERS), 6)))
    if math.isnan(level.wait_p50):
        row.append(f"{'-':>6}{'-':>6}", style=FAINT)
        return row
    row.append(f"{level.wait_p50:6.2f}")
    row.append(f"{level.wait_p99:6.2f}", style=STRONG)
    row.append(f"  {bar(level.wait_p99 / scale, bar_width)}", style=style)
    return row


def _heading(text: str, width: int) -> Text:
    return Text(f"── {text} ".ljust(width, "─"), style=FAINT)


def _slots(view: View, stage: Stage, width: int) -> list[Text]:
    usual, bar_width = stage.scenario.seconds_per_request, min(max(width - 52, 8), 48)
    return [_slot(number, holder, usual, bar_width) for number, holder in enumerate(view.slots, 1)]


def _slot(number: int, holder: Holder | None, usual_seconds: float, bar_width: int) -> Text:
    if holder is None:
        return Text(f"{number}  free", style=FAINT)
    style = LEVEL_STYLES[holder.level]
    filled = round(min(holder.seconds / usual_seconds, 1) * bar_width)
    long = holder.seconds > 1.5 * usual_seconds
    return Text.assemble(
        (f"{number}  ", FAINT),
        (f"{holder.level:<10}", style),
        (f"{holder.who:<22.22}", f"bold {GOOD}" if holder.who == YOU else ""),
        ("━" * filled, f"bold {BAD}" if long else style),
        ("─" * (bar_width - filled), FAINT),
        (f"{holder.seconds:7.2f} s", f"bold {BAD}" if long else ""),
    )


def _happenings(view: View, count: int) -> list[Text]:
    """The latest ones first, always as many lines as asked for, so that nothing below them moves."""
    told = told_together(view.happenings[-20 * count :], TOGETHER_SECONDS)[-count:][::-1]
    lines = []
    for happening, times in told:
        many = f"{times} × " if times > 1 else ""
        lines.append(
            Text.assemble(
                (f"{happening.at:6.1f}  ", FAINT),
                (f"{happening.kind:<10}", KIND_STYLES.get(happening.kind, BAD)),
                (f"{many + happening.text:<35}", LEVEL_STYLES[happening.level]),
                (f" {WHY[happening.kind]}", FAINT),
            )
        )
    return lines + [Text()] * (count - len(lines))


def _commands(stage: Stage, height: int) -> list[Text]:
    more = (stage.echo_command,) if height >= TALL else ()
    return [Text(line) for line in (*stage.commands, *more)]
