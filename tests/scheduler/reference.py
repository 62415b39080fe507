"""A second opinion on one pool: the contract's section 3 in the plainest form, slow, and obviously right.

Written from the contract alone, and for the shares of client keys from the README; it shares no line and no idea with
`trioproxy.scheduler`. All requests that there ever were stand in one list of dictionaries, which is searched and
sorted anew for every question. Times and numbers come from outside. Every method returns what happened, in order.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict


class Happening(NamedTuple):
    """Something that a watcher is told. Fields that do not belong to `what` are None."""

    what: Literal["queued", "started", "ended", "capacity"]
    name: str | None
    at: float
    ending: str | None = None
    """How it ended."""
    waited: float | None = None
    """Seconds in the queue; None for one that neither waited nor ran."""
    ran: bool | None = None
    """Whether what ended had a slot."""
    was_queued: bool | None = None
    """Whether what started had to wait."""
    permits: int | None = None
    max_queue: int | None = None


class Entry(TypedDict):
    """One request."""

    name: str
    key: str | None
    priority: int
    number: int
    """How many came before it."""
    state: Literal["queued", "running", "ended"]
    asked_at: float
    started_at: float
    start_number: int
    """How many started before it."""


class ReferencePool:
    """What a pool has to do."""

    def __init__(self, permits: int, max_queue: int) -> None:
        self.permits = permits
        self.shares: dict[str | None, tuple[int | None, int | None]] = {}
        """How many slots and places the requests of a key may have; None: as many as there are."""
        self.max_queue = max_queue
        self.accepting = True
        self.requests: list[Entry] = []
        self._starts = 0

    def queued(self) -> list[Entry]:
        """Who waits, in the order in which they are to start: priority, then arrival."""
        waiting = [entry for entry in self.requests if entry["state"] == "queued"]
        return sorted(waiting, key=lambda entry: (-entry["priority"], entry["number"]))

    def running(self) -> list[Entry]:
        """Who holds a slot, in the order of their starts."""
        holders = [entry for entry in self.requests if entry["state"] == "running"]
        return sorted(holders, key=lambda entry: entry["start_number"])

    def ended(self) -> list[Entry]:
        """Who is over and done with."""
        return [entry for entry in self.requests if entry["state"] == "ended"]

    def allowed(self, entry: Entry) -> bool:
        """Whether the entry's key leaves a slot for it."""
        slots, _ = self.shares.get(entry["key"], (None, None))
        return slots is None or slots > sum(other["key"] == entry["key"] for other in self.running())

    def startable(self) -> list[Entry]:
        """Who waits for nothing but a slot, in starting order."""
        return [entry for entry in self.queued() if self.allowed(entry)]

    def submit(self, name: str, priority: int, deadline: float, now: float, key: str | None = None) -> list[Happening]:
        """A newcomer asks for a slot."""
        entry = Entry(
            name=name,
            key=key,
            priority=priority,
            number=len(self.requests),
            state="ended",
            asked_at=now,
            started_at=now,
            start_number=-1,
        )
        self.requests.append(entry)
        queued = self.queued()
        if not self.accepting:
            return [self._refused(entry, now, "shutting_down")]
        if now >= deadline:
            return [self._refused(entry, now, "deadline_exceeded")]
        slot_is_free = len(self.running()) < self.permits
        if slot_is_free and self.allowed(entry):
            return [self._start(entry, now, was_queued=False)]
        _, places = self.shares.get(key, (None, None))
        own = [other for other in queued if other["key"] == key]
        if places is not None and len(own) >= places:
            crowd, room, refusal = own, places, "rate_limit_exceeded"
        else:
            crowd, room, refusal = queued, self.max_queue, "rate_limit_exceeded" if slot_is_free else "queue_full"
            if len(queued) < self.max_queue:
                return [self._queue(entry, now)]
        if room == 0 or priority <= min(other["priority"] for other in crowd):
            return [self._refused(entry, now, refusal)]
        least = min(other["priority"] for other in crowd)
        victim = [other for other in crowd if other["priority"] == least][-1]
        return [self._out_of_queue(victim, now, "evicted"), self._queue(entry, now)]

    def leave(self, name: str, ending: str, now: float) -> list[Happening]:
        """A waiting request is over: it took too long, or its client went away."""
        (entry,) = [entry for entry in self.queued() if entry["name"] == name]
        return [self._out_of_queue(entry, now, ending)]

    def finish(self, name: str, ending: str, now: float) -> list[Happening]:
        """A running request is over; whoever is first in the queue has its slot at once."""
        (entry,) = [entry for entry in self.running() if entry["name"] == name]
        entry["state"] = "ended"
        waited = entry["started_at"] - entry["asked_at"]
        return [Happening("ended", name, now, ending=ending, waited=waited, ran=True), *self._fill(now)]

    def resize(self, permits: int | None, max_queue: int | None, now: float) -> list[Happening]:
        """Other limits from now on: nobody loses a slot or a place, free slots are taken at once."""
        self.permits = self.permits if permits is None else permits
        self.max_queue = self.max_queue if max_queue is None else max_queue
        told = Happening("capacity", None, now, permits=self.permits, max_queue=self.max_queue)
        return [told, *self._fill(now)]

    def share(self, shares: dict[str | None, tuple[int | None, int | None]], now: float) -> list[Happening]:
        """Other limits of the keys from now on: nobody loses a slot or a place."""
        self.shares = shares
        return self._fill(now)

    def close(self) -> None:
        """No newcomers any more."""
        self.accepting = False

    def _fill(self, now: float) -> list[Happening]:
        happened = []
        while len(self.running()) < self.permits and self.startable():
            happened.append(self._start(self.startable()[0], now, was_queued=True))
        return happened

    def _start(self, entry: Entry, now: float, *, was_queued: bool) -> Happening:
        entry["state"] = "running"
        entry["started_at"] = now
        entry["start_number"] = self._starts
        self._starts += 1
        return Happening("started", entry["name"], now, waited=now - entry["asked_at"], was_queued=was_queued)

    @staticmethod
    def _queue(entry: Entry, now: float) -> Happening:
        entry["state"] = "queued"
        return Happening("queued", entry["name"], now)

    @staticmethod
    def _out_of_queue(entry: Entry, now: float, ending: str) -> Happening:
        entry["state"] = "ended"
        return Happening("ended", entry["name"], now, ending=ending, waited=now - entry["asked_at"], ran=False)

    @staticmethod
    def _refused(entry: Entry, now: float, ending: str) -> Happening:
        return Happening("ended", entry["name"], now, ending=ending, ran=False)
