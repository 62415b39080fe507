"""First come, first served, on paper: what recorded arrivals would have waited in a queue without priorities.

Pure: no clock, no randomness. This module must not know the proxy; it is told who came when and for how long.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple


class Arrival(NamedTuple):
    """One request: when it asks for a slot, and for how many seconds it holds it."""

    at: float
    hold_seconds: float


class Fate(Enum):
    """What becomes of an arrival."""

    SERVED = auto()
    """It got a slot."""
    REJECTED = auto()
    """All places were taken."""
    TIMED_OUT = auto()
    """It waited as long as one may."""
    WAITING = auto()
    """It still waited when the record ends."""


class Replayed(NamedTuple):
    """An arrival's fate; `wait_seconds` is how long it waited, until it got a slot or until it did not."""

    fate: Fate
    wait_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the queue is like."""

    slots: int
    places: int
    queue_timeout: float = math.inf
    """Seconds."""
    until: float = math.inf
    """When the record ends, not before the last arrival: nobody starts after that."""


def first_come_first_served(arrivals: Sequence[Arrival], rules: Rules) -> list[Replayed]:
    """The fate of each arrival, in the order given, which must be that of time.

    A slot that comes free goes to whoever has waited longest; a newcomer that finds all slots and places taken is
    rejected; nobody is evicted. What ends in the moment of an arrival ends before it.
    """
    fates: list[Replayed] = [Replayed(Fate.REJECTED, 0.0)] * len(arrivals)
    free = rules.slots
    ends: list[float] = []
    waiting: deque[int] = deque()

    def start(index: int, now: float) -> None:
        nonlocal free
        free -= 1
        heapq.heappush(ends, now + arrivals[index].hold_seconds)
        fates[index] = Replayed(Fate.SERVED, now - arrivals[index].at)

    def time_out(now: float) -> None:
        while waiting and arrivals[waiting[0]].at + rules.queue_timeout <= now:
            fates[waiting.popleft()] = Replayed(Fate.TIMED_OUT, rules.queue_timeout)

    def advance(now: float) -> None:
        nonlocal free
        while ends and ends[0] <= now:
            end = heapq.heappop(ends)
            free += 1
            time_out(end)
            if waiting:
                start(waiting.popleft(), end)
        time_out(now)

    for index, arrival in enumerate(arrivals):
        advance(arrival.at)
        if free:
            start(index, arrival.at)
        elif len(waiting) < rules.places:
            waiting.append(index)
    advance(rules.until)
    for index in waiting:
        fates[index] = Replayed(Fate.WAITING, rules.until - arrivals[index].at)
    return fates
