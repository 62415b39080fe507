"""An ideal pool in simulated time: what the contract's section 3 comes to if nothing took any time but the service.

A discrete-event simulation of a multi-server priority queue with a bounded line, eviction, rejection, a timeout for
waiting, and customers who have a deadline or go away. Written from the contract; it must not know `trioproxy`. Load is
declared as data: a `Workload` is a pool and streams of customers, and with a seed it becomes a list of arrivals.

What happens in the same instant happens in this order: slots come free, in the order of their starts; whoever has
waited too long leaves, in the order of arrival; newcomers arrive, in their order.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

Interval = tuple[float, float]
"""From when to when."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What is shared: `slots` run, `places` wait."""

    slots: int
    places: int
    queue_timeout: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One customer."""

    at: float
    priority: int
    service_seconds: float
    deadline_seconds: float = math.inf
    """The customer's own limit on everything, from its arrival."""
    patience_seconds: float = math.inf
    """When it goes away, from its arrival, waiting or being served."""


class Step(NamedTuple):
    """Something that happens to a customer."""

    at: float
    customer: int
    """Which of the arrivals."""
    what: str
    """`queued`, `started`, or how it ended: `completed`, or the contract's code."""


class _Rank(IntEnum):
    """What comes first of what happens in the same instant."""

    SLOT_FREE = 0
    LEAVES = 1
    ARRIVES = 2


class _Planned(NamedTuple):
    """What is going to happen, unless the customer is somewhere else by then."""

    at: float
    rank: _Rank
    turn: int
    customer: int
    what: str


def simulate(pool: Pool, arrivals: Sequence[Arrival]) -> list[Step]:
    """Everything that happens until the last customer is gone. The arrivals must be in order of time."""
    return _Simulation(pool, arrivals).run()


class _Simulation:
    """The agenda of planned events, and where every customer is."""

    def __init__(self, pool: Pool, arrivals: Sequence[Arrival]) -> None:
        self._pool = pool
        self._arrivals = arrivals
        self._steps: list[Step] = []
        self._free = pool.slots
        self._starts = 0
        self._waiting: set[int] = set()
        # Both heaps also hold customers who no longer wait: they are skipped when they come to the top.
        self._most_urgent: list[tuple[int, int]] = []
        self._least_urgent: list[tuple[int, int]] = []
        self._agenda = [
            _Planned(arrival.at, _Rank.ARRIVES, number, number, "arrives") for number, arrival in enumerate(arrivals)
        ]
        heapq.heapify(self._agenda)

    def run(self) -> list[Step]:
        """Let it all happen."""
        while self._agenda:
            at, rank, _, customer, what = heapq.heappop(self._agenda)
            if rank is _Rank.ARRIVES:
                self._arrive(customer, at)
            elif rank is _Rank.SLOT_FREE:
                self._steps.append(Step(at, customer, what))
                self._free += 1
                self._serve_the_next(at)
            elif customer in self._waiting:
                self._waiting.remove(customer)
                self._steps.append(Step(at, customer, what))
        return self._steps

    def _arrive(self, customer: int, at: float) -> None:
        if self._free:
            self._start(customer, at)
            return
        if len(self._waiting) >= self._pool.places:
            victim = self._victim_of(self._arrivals[customer].priority)
            if victim is None:
                self._steps.append(Step(at, customer, "queue_full"))
                return
            self._waiting.remove(victim)
            self._steps.append(Step(at, victim, "evicted"))
        self._queue(customer, at)

    def _victim_of(self, priority: int) -> int | None:
        """Who makes room for a newcomer of that priority: the youngest of the least urgent, if less urgent."""
        while self._least_urgent:
            least, minus_number = self._least_urgent[0]
            if -minus_number in self._waiting:
                return -minus_number if least < priority else None
            heapq.heappop(self._least_urgent)
        return None

    def _queue(self, customer: int, at: float) -> None:
        arrival = self._arrivals[customer]
        self._steps.append(Step(at, customer, "queued"))
        self._waiting.add(customer)
        heapq.heappush(self._most_urgent, (-arrival.priority, customer))
        heapq.heappush(self._least_urgent, (arrival.priority, -customer))
        leaves = [
            (at + arrival.deadline_seconds, "deadline_exceeded"),
            (at + self._pool.queue_timeout, "queue_timeout"),
            (at + arrival.patience_seconds, "cancelled"),
        ]
        then, what = min(leaves, key=lambda pair: pair[0])
        if then < math.inf:
            heapq.heappush(self._agenda, _Planned(then, _Rank.LEAVES, customer, customer, what))

    def _serve_the_next(self, at: float) -> None:
        while self._most_urgent:
            _, customer = heapq.heappop(self._most_urgent)
            if customer in self._waiting:
                self._waiting.remove(customer)
                self._start(customer, at)
                return

    def _start(self, customer: int, at: float) -> None:
        arrival = self._arrivals[customer]
        self._steps.append(Step(at, customer, "started"))
        self._free -= 1
        self._starts += 1
        ends = [
            (at + arrival.service_seconds, "completed"),
            (arrival.at + arrival.deadline_seconds, "deadline_exceeded"),
            (arrival.at + arrival.patience_seconds, "cancelled"),
        ]
        then, what = min(ends, key=lambda pair: pair[0])
        heapq.heappush(self._agenda, _Planned(then, _Rank.SLOT_FREE, self._starts, customer, what))


# What can be read off the steps.


def waits(arrivals: Sequence[Arrival], steps: Iterable[Step]) -> dict[int, float]:
    """How long everyone who was started had waited."""
    return {step.customer: step.at - arrivals[step.customer].at for step in steps if step.what == "started"}


def intervals(steps: Iterable[Step]) -> tuple[list[Interval], list[Interval]]:
    """When customers were served, and when they waited."""
    since: dict[int, Step] = {}
    served: list[Interval] = []
    waited: list[Interval] = []
    for step in steps:
        before = since.pop(step.customer, None)
        if before is not None:
            (waited if before.what == "queued" else served).append((before.at, step.at))
        if step.what in {"queued", "started"}:
            since[step.customer] = step
    return served, waited


def busy_share(served: Iterable[Interval], waited: Iterable[Interval], slots: int) -> float:
    """Of the time during which anybody waited, weighted: the share of the slots in which somebody was served."""
    changes = [change for begin, end in served for change in ((begin, 1, 0), (end, -1, 0))]
    changes += [change for begin, end in waited for change in ((begin, 0, 1), (end, 0, -1))]
    serving = waiting = 0
    before = busy_seconds = seconds = 0.0
    for at, served_change, waiting_change in sorted(changes):
        if waiting:
            seconds += at - before
            busy_seconds += serving * (at - before)
        before = at
        serving += served_change
        waiting += waiting_change
    return busy_seconds / (slots * seconds) if seconds else 1.0


# Load, declared.


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Customers of one kind, who come independently of each other (a Poisson process) or in bursts that do."""

    load: float
    """What they ask for, as a share of the pool's capacity."""
    priorities: tuple[int, ...] = (50,)
    """Each customer's is one of these, all equally likely."""
    service: Literal["exponential", "uniform", "constant"] = "exponential"
    """How service times are distributed around their mean."""
    service_seconds: float = 1.0
    """The mean service time."""
    burst: int = 1
    """How many come in the same instant."""
    deadline_seconds: float = math.inf
    """The mean of the customers' own deadlines, which are distributed exponentially."""
    patience_seconds: float = math.inf
    """The mean time until they go away, distributed exponentially."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A pool and who comes to it."""

    name: str
    pool: Pool
    streams: tuple[Stream, ...]
    seconds: float
    """For how long they come."""
    grid_seconds: float = 0.0
    """If not 0, all times are whole multiples of it, so that as much as possible happens in the same instant."""

    def arrivals(self, seed: int) -> list[Arrival]:
        """Who comes when, in order of time; always the same with the same seed."""
        dice = random.Random(f"{self.name} {seed}")
        arrivals = [arrival for stream in self.streams for arrival in self._of_stream(stream, dice)]
        return sorted(arrivals, key=lambda arrival: arrival.at)

    def _of_stream(self, stream: Stream, dice: random.Random) -> Iterable[Arrival]:
        bursts_per_second = stream.load * self.pool.slots / stream.service_seconds / stream.burst
        at = dice.expovariate(bursts_per_second)
        while at < self.seconds:
            for _ in range(stream.burst):
                yield Arrival(
                    at=self._on_grid(at),
                    priority=dice.choice(stream.priorities),
                    service_seconds=self._on_grid(_service_seconds(stream, dice)),
                    deadline_seconds=self._on_grid(_exponential(stream.deadline_seconds, dice)),
                    patience_seconds=self._on_grid(_exponential(stream.patience_seconds, dice)),
                )
            at += dice.expovariate(bursts_per_second)

    def _on_grid(self, seconds: float) -> float:
        if not self.grid_seconds or seconds == math.inf:
            return seconds
        return math.ceil(seconds / self.grid_seconds) * self.grid_seconds


def _exponential(mean: float, dice: random.Random) -> float:
    return math.inf if mean == math.inf else dice.expovariate(1 / mean)


def _service_seconds(stream: Stream, dice: random.Random) -> float:
    match stream.service:
        case "exponential":
            return _exponential(stream.service_seconds, dice)
        case "uniform":
            return dice.uniform(0.5, 1.5) * stream.service_seconds
        case "constant":
            return stream.service_seconds


URGENT = 90
BACKGROUND = 10


def urgent_at_half_of_capacity(pool: Pool, service_seconds: float, seconds: float) -> Workload:
    """Twice of what can be served, a quarter of it urgent: the urgent alone would leave half of the pool idle."""
    return Workload(
        name="urgent at half of capacity",
        pool=pool,
        streams=(
            Stream(load=0.5, priorities=(URGENT,), service="uniform", service_seconds=service_seconds),
            Stream(load=1.5, priorities=(BACKGROUND,), service="uniform", service_seconds=service_seconds),
        ),
        seconds=seconds,
    )
