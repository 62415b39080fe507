"""What the demo says at its end: what happened, by level, and what first come, first served would have made of it.

It is printed on the terminal that the live page was on: no line is wider than an ordinary one's 80 columns.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Final

from trioproxy.demo.replay import Arrival, Fate, Replayed, Rules, first_come_first_served
from trioproxy.demo.scenarios import Scenario
from trioproxy.demo.watch import MOST_URGENT_FIRST, RECORDS_MAX, Record, View, Waits, Watch
from trioproxy.errors import Status

_USUAL: Final = (Status.COMPLETED, Status.EVICTED, Status.REJECTED, Status.CANCELLED)
_REFUSED: Final = (Status.EVICTED, Status.REJECTED)

WIDTH: Final = 79
"""Columns at most; one more, and some terminals begin a new line by themselves."""


def summary(watch: Watch, scenario: Scenario) -> str:
    """All that the end says. The watch must have been closed."""
    assert watch.closed_at is not None
    view = watch.view(watch.closed_at)
    if not any(level.sent for level in view.levels):
        return f"{table(view)}\n\nNothing was sent: it ended too early."
    return f"{table(view)}\n\n{reading(view)}\n\n{comparison(watch.records, scenario, watch.closed_at)}"


def table(view: View) -> str:
    """All that happened, by level. The times in the queue are in the comparison."""
    statuses = [status for status in Status if status in _USUAL or view.total(status)]
    names = ["served" if status is Status.COMPLETED else status.value for status in statuses]
    rows: list[Sequence[object]] = [("level", "sent", *names, "open")]
    for level in view.levels:
        ends = (level.ended.get(status, 0) for status in statuses)
        rows.append((level.name, level.sent, *ends, level.queued + level.running))
    return "\n".join(_columns(rows))


def reading(view: View) -> str:
    """What the table says, in words."""
    urgent, others = view.levels[:2], view.levels[2:]
    first, last = view.levels[0], view.levels[-1]
    fates = []
    for level in (first, last):
        wait = "" if math.isnan(level.wait_p99) else f", waiting p99 {level.wait_p99:.2f} s"
        fates.append(f"{level.name}: {level.ended.get(Status.COMPLETED, 0)} of {level.sent} served{wait}")
    turned_away = [
        f"{sum(level.refused for level in levels) or 'none'} of the {sum(level.sent for level in levels)} "
        f"{', '.join(level.name for level in levels)} ones"
        for levels in (urgent, others)
    ]
    refused = any(level.refused for level in view.levels)
    told = "They were told when to come back, and each try counts as sent. " if refused else ""
    return _paragraphs(
        f"{'; '.join(fates)}.",
        f"Evicted or rejected: {'; '.join(turned_away)}.",
        f"{told}What runs is never interrupted: even the most urgent request waits until one of {len(view.slots)} "
        "slots comes free.",
    )


def comparison(records: Sequence[Record], scenario: Scenario, ended: float) -> str:
    """The waits of this run beside those that first come, first served would have given on the same arrivals."""
    rules = Rules(slots=scenario.slots, places=scenario.places, queue_timeout=scenario.queue_timeout, until=ended)
    replayed = first_come_first_served(arrivals(records), rules)
    rows: list[Sequence[object]] = [
        ("level", "asked", "p50", "p99", "max ms", "no slot", "", "p50", "p99", "max ms", "no slot")
    ]
    for level in MOST_URGENT_FIRST:
        of_level = [index for index, record in enumerate(records) if record.level == level]
        here, there = _here([records[index] for index in of_level]), _there([replayed[index] for index in of_level])
        rows.append((level, len(of_level), *here, "", *there))
    head, *lines = _columns(rows)
    middle = head.index("no slot") + len("no slot")
    over = f"{'by priority, as it was':>{middle}}{'first come, first served':>{len(head) - middle}}"
    limited = f" Only the first {RECORDS_MAX} arrivals are compared." if len(records) >= RECORDS_MAX else ""
    text = _paragraphs(
        _verdict(records, replayed),
        "On the right is a calculation: every try at the moment it came, as many slots and places, the same queue "
        "timeout, each holding its slot for as long as it really did, or, if it never had one, for the mean of its "
        "level. Refused clients would have come back at other moments than they did; that is not in it. Waits are "
        f"times in the queue, whatever ended them; no slot: evicted, rejected or timed out in the queue.{limited}",
    )
    compared = "\n".join((over, head, *lines))
    return f"The same arrivals, had the queue known no priorities:\n\n{compared}\n\n{text}"


def arrivals(records: Sequence[Record]) -> list[Arrival]:
    """The recorded arrivals, each with how long it held its slot.

    Where that is not known (it never had one, or still has it), with the mean of its level, or of all.
    """
    held: dict[str, list[float]] = {level: [] for level in MOST_URGENT_FIRST}
    for record in records:
        if record.started is not None and record.ended is not None:
            held[record.level].append(record.ended - record.started)
    everybody = [seconds for of_level in held.values() for seconds in of_level]
    mean = fmean(everybody) if everybody else 0.0
    means = {level: fmean(of_level) if of_level else mean for level, of_level in held.items()}
    return [
        Arrival(
            record.at,
            means[record.level] if record.started is None or record.ended is None else record.ended - record.started,
        )
        for record in records
    ]


def _verdict(records: Sequence[Record], replayed: Sequence[Replayed]) -> str:
    urgent = MOST_URGENT_FIRST[0]
    of_urgent = [index for index, record in enumerate(records) if record.level == urgent]
    here, there = _waits_here([records[index] for index in of_urgent]), _waits_there([replayed[i] for i in of_urgent])
    if not here or not there:
        return f"Too few {urgent} ones came to compare anything."
    refused = sum(replayed[index].fate is Fate.REJECTED for index in of_urgent)
    also = f", and {refused} of them would have been rejected" if refused else ""
    return (
        f"Half of the {urgent} ones waited up to {here.percentile(0.5):.2f} s (p99 {here.percentile(0.99):.2f} s); "
        f"first come, first served it would have been {there.percentile(0.5):.2f} s "
        f"(p99 {there.percentile(0.99):.2f} s){also}."
    )


def _here(records: Sequence[Record]) -> Sequence[object]:
    without = sum(
        record.status in _REFUSED or (record.status is Status.TIMEOUT and record.started is None) for record in records
    )
    return (*_three(_waits_here(records)), without)


def _there(replayed: Sequence[Replayed]) -> Sequence[object]:
    return (*_three(_waits_there(replayed)), sum(fate.fate in {Fate.REJECTED, Fate.TIMED_OUT} for fate in replayed))


def _waits_here(records: Iterable[Record]) -> Waits:
    waits = Waits()
    for record in records:
        if record.waited is not None:
            waits.add(record.waited)
    return waits


def _waits_there(replayed: Iterable[Replayed]) -> Waits:
    waits = Waits()
    for fate in replayed:
        if fate.fate in {Fate.SERVED, Fate.TIMED_OUT}:
            waits.add(fate.wait_seconds)
    return waits


def _three(waits: Waits) -> Sequence[object]:
    return [_milliseconds(waits.percentile(share)) for share in (0.5, 0.99, 1)]


def _milliseconds(seconds: float) -> object:
    return "-" if math.isnan(seconds) else round(1000 * seconds)


def _paragraphs(*texts: str) -> str:
    return "\n".join(textwrap.fill(text, WIDTH, break_on_hyphens=False) for text in texts)


def _columns(rows: Sequence[Sequence[object]]) -> list[str]:
    """A line for each row, the columns no wider than they must be, and closer to each other if there is no room."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else 1
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"{cell:>{width + gap}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in cells
    ]
