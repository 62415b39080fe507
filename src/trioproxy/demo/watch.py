"""What the demo knows of the proxy: a listener that keeps count of its events and hands out frozen views.

Pure: no clock (times come with the events and as `now`), no I/O. This module must not know how it is shown, nor how
the scheduler decides.
"""

from __future__ import annotations

import math
from array import array
from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from trioproxy import errors
from trioproxy.demo.scenarios import SIMULATED
from trioproxy.errors import Status
from trioproxy.events import Ended, Event, PassedThrough, Queued, ScheduledRequest, Started
from trioproxy.priority import LEVELS

MOST_URGENT_FIRST: Final = LEVELS[::-1]

HAPPENINGS_MAX: Final = 2000
"""How many happenings are kept; older ones are forgotten."""

RECORDS_MAX: Final = 100_000
"""How many arrivals are recorded, hours of them; later ones are counted only."""

YOU: Final = "you"
"""The name of whoever is not one of the simulated clients."""

EVICTED: Final = "evicted"
REJECTED: Final = "rejected"
TIMED_OUT: Final = "timed out"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
OVERTOOK: Final = "overtook"
YOURS: Final = "yours"

WHY: Final[Mapping[str, str]] = MappingProxyType(
    {
        EVICTED: "queue full: made room",
        REJECTED: "queue full, none lower",
        TIMED_OUT: "the limit was reached",
        FAILED: "its slot is free again",
        CANCELLED: "left or stopped reading",
        OVERTOOK: "to the next free slot",
        YOURS: "sent by hand",
    }
)
"""Why each kind of thing happens, in few words."""

_UPSTREAM_DID: Final[Mapping[str, str]] = MappingProxyType(
    {
        errors.UPSTREAM_REFUSED.code: "the upstream's error",
        errors.UPSTREAM_BROKE_OFF.code: "the upstream broke off",
    }
)


class Waits:
    """Seconds that requests waited, in order, of however many."""

    def __init__(self) -> None:
        self._sorted = array("d")

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, seconds: float) -> None:
        """One more."""
        insort(self._sorted, seconds)

    def percentile(self, share: float) -> float:
        """The smallest that at least `share` of them (0 to 1) do not exceed; NaN if there are none."""
        if not self._sorted:
            return math.nan
        return self._sorted[max(math.ceil(share * len(self._sorted)), 1) - 1]


@dataclass(slots=True)
class Record:
    """What became of one arrival so far; times are on the clock of the events."""

    level: str
    at: float
    """When it asked for a slot."""
    waited: float | None = None
    """Seconds in the queue, whatever ended it, 0 if it got a slot at once; None if it still waits or was rejected."""
    started: float | None = None
    ended: float | None = None
    status: Status | None = None


@dataclass(frozen=True, slots=True)
class Happening:
    """Something worth a line."""

    at: float
    """Seconds since the beginning."""
    kind: str
    """One of those in `WHY`."""
    level: str
    text: str
    """Of whom and how; equal ones may be told together."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of priority at one moment."""

    name: str
    queued: int
    running: int
    ended: Mapping[Status, int]
    wait_p50: float
    """Seconds in the queue, whatever ended it; NaN if there were none. So are the next two.

    Counted as in the metric `openai_proxy_queue_duration_seconds`: 0 for those that got a slot at once, nothing for
    rejected ones.
    """
    wait_p99: float
    wait_max: float

    @property
    def sent(self) -> int:
        """How many there have been; each try of a client counts."""
        return sum(self.ended.values()) + self.queued + self.running

    @property
    def refused(self) -> int:
        """How many were evicted or rejected."""
        return self.ended.get(Status.EVICTED, 0) + self.ended.get(Status.REJECTED, 0)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who is in a slot."""

    level: str
    who: str
    seconds: float
    """For how long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything at one moment."""

    seconds: float
    """Since the beginning."""
    slots: tuple[Holder | None, ...]
    places: int
    levels: tuple[Level, ...]
    """Most urgent first."""
    passed_through: int
    happenings: Sequence[Happening]
    """The latest ones, oldest first."""
    happened: int
    """How many there have been, those included that are forgotten."""

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return sum(holder is not None for holder in self.slots)

    @property
    def queued(self) -> int:
        """How many places are taken."""
        return sum(level.queued for level in self.levels)

    def total(self, status: Status) -> int:
        """How many requests ended like this."""
        return sum(level.ended.get(status, 0) for level in self.levels)

    def since(self, happened: int) -> Sequence[Happening]:
        """What happened after the first `happened` ones, as far as it is not forgotten."""
        new = min(self.happened - happened, len(self.happenings))
        return self.happenings[len(self.happenings) - new :]


@dataclass(slots=True)
class _Counts:
    queued: int = 0
    running: int = 0
    ended: Counter[Status] = field(default_factory=Counter)
    waits: Waits = field(default_factory=Waits)


class Watch:
    """A listener that keeps count of what happens, by level, and notes what is worth a line."""

    def __init__(self, slots: int, places: int) -> None:
        self.began = 0.0
        """When everything began, on the clock of the events."""
        self.records: list[Record] = []
        """The first `RECORDS_MAX` arrivals, in their order."""
        self.closed_at: float | None = None
        self._places = places
        self._levels = {level: _Counts() for level in MOST_URGENT_FIRST}
        self._waiting: dict[ScheduledRequest, None] = {}
        self._slots: list[tuple[ScheduledRequest, float] | None] = [None] * slots
        self._open: dict[ScheduledRequest, Record] = {}
        self._happenings: deque[Happening] = deque(maxlen=HAPPENINGS_MAX)
        self._happened = 0
        self._passed_through = 0
        self._evicted: str | None = None

    def __call__(self, event: Event) -> None:
        """Take notice of an event."""
        if self.closed_at is not None:
            return
        match event:
            case Queued():
                self._queued(event)
            case Started():
                self._started(event)
            case Ended():
                self._ended(event)
            case PassedThrough():
                self._passed_through += 1

    def close(self, now: float) -> None:
        """The show is over: take no notice of how it is cleared away."""
        self.closed_at = now

    def view(self, now: float) -> View:
        """Everything as it is now. Takes a bounded time."""
        return View(
            seconds=now - self.began,
            slots=tuple(
                taken and Holder(taken[0].priority_level, who(taken[0]), now - taken[1]) for taken in self._slots
            ),
            places=self._places,
            levels=tuple(_level(name, counts) for name, counts in self._levels.items()),
            passed_through=self._passed_through,
            happenings=tuple(self._happenings),
            happened=self._happened,
        )

    def _queued(self, event: Queued) -> None:
        level = event.request.priority_level
        self._waiting[event.request] = None
        self._levels[level].queued += 1
        self._record(event.request, event.at)
        # An eviction is told right before the queueing of the one that it made room for.
        if self._evicted is not None:
            self._note(event.at, EVICTED, self._evicted, f"{self._evicted} by {level}")
            self._evicted = None

    def _started(self, event: Started) -> None:
        level, counts = event.request.priority_level, self._levels[event.request.priority_level]
        counts.running += 1
        counts.waits.add(event.queue_seconds)
        self._slots[self._slots.index(None)] = (event.request, event.at)
        if (record := self._record(event.request, event.at)) is not None:
            record.started, record.waited = event.at, event.queue_seconds
        overtaken = 0
        if event.request in self._waiting:
            overtaken = list(self._waiting).index(event.request)
            del self._waiting[event.request]
            counts.queued -= 1
        if who(event.request) == YOU:
            past = f", past {_others(overtaken)}" if overtaken else ""
            self._note(event.at, YOURS, level, f"{level} got a slot after {event.queue_seconds:.2f} s{past}")
        elif overtaken and level == MOST_URGENT_FIRST[0]:
            text = f"{level} past {_others(overtaken)} in {event.queue_seconds:.2f} s"
            self._note(event.at, OVERTOOK, level, text)

    def _ended(self, event: Ended) -> None:
        level, counts, status = event.request.priority_level, self._counts_of(event.request), event.ending.status
        assert status is not None
        counts.ended[status] += 1
        if event.request in self._waiting:
            del self._waiting[event.request]
            counts.queued -= 1
            counts.waits.add(event.queue_seconds or 0.0)
            if event.request in self._open:
                self._open[event.request].waited = event.queue_seconds
        for index, taken in enumerate(self._slots):
            if taken is not None and taken[0] is event.request:
                self._slots[index] = None
                counts.running -= 1
        if (record := self._record(event.request, event.at)) is not None:
            record.ended, record.status = event.at, status
        self._open.pop(event.request, None)
        self._tell_end(event, level, status)

    def _tell_end(self, event: Ended, level: str, status: Status) -> None:
        match status:
            case Status.EVICTED:
                self._evicted = level
            case Status.TIMEOUT:
                self._note(event.at, TIMED_OUT, level, _timed_out(event, level))
            case Status.CANCELLED:
                name = who(event.request).rstrip("0123456789").rstrip(".")
                self._note(event.at, CANCELLED, level, f"{level} {name}, {'running' if event.started else 'waiting'}")
            case Status.REJECTED:
                self._note(event.at, REJECTED, level, level)
            case Status.FAILED:
                self._note(
                    event.at, FAILED, level, f"{level}: {_UPSTREAM_DID.get(event.ending.code, event.ending.code)}"
                )
        if who(event.request) == YOU:
            self._note(event.at, YOURS, level, f"{level} {status.value} after {event.total_seconds:.2f} s")

    def _counts_of(self, request: ScheduledRequest) -> _Counts:
        return self._levels[request.priority_level]

    def _record(self, request: ScheduledRequest, now: float) -> Record | None:
        record = self._open.get(request)
        if record is None and len(self.records) < RECORDS_MAX:
            record = self._open[request] = Record(request.priority_level, now)
            self.records.append(record)
        return record

    def _note(self, at: float, kind: str, level: str, text: str) -> None:
        self._happened += 1
        self._happenings.append(Happening(at - self.began, kind, level, text))


def who(request: ScheduledRequest) -> str:
    """The name of a simulated client's request; `YOU` for any other."""
    if not request.request_id.startswith(SIMULATED):
        return YOU
    return request.request_id.removeprefix(SIMULATED)


def told_together(happenings: Iterable[Happening], seconds: float) -> list[tuple[Happening, int]]:
    """Happenings in their order, equal ones that came within `seconds` as one, at the first one's place."""
    told: list[tuple[Happening, int]] = []
    places: dict[tuple[str, str], int] = {}
    for happening in happenings:
        key = (happening.kind, happening.text)
        place = places.get(key)
        if place is not None and happening.at - told[place][0].at <= seconds:
            told[place] = (told[place][0], told[place][1] + 1)
        else:
            places[key] = len(told)
            told.append((happening, 1))
    return told


def _others(count: int) -> str:
    return "1 other" if count == 1 else f"{count} others"


def _timed_out(event: Ended, level: str) -> str:
    if not event.started:
        return f"{level} waited {event.queue_seconds or 0:.1f} s"
    if event.ending is errors.UPSTREAM_TIMEOUT:
        return f"{level}: the upstream hung"
    return f"{level} after {event.total_seconds:.1f} s"


def _level(name: str, counts: _Counts) -> Level:
    return Level(
        name,
        counts.queued,
        counts.running,
        MappingProxyType(dict(counts.ended)),
        counts.waits.percentile(0.5),
        counts.waits.percentile(0.99),
        counts.waits.percentile(1),
    )
