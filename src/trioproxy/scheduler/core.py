"""The scheduler's decisions for one pool: who starts, who waits, who is evicted, who is turned away.

Pure: no trio, no clock (`now` is an argument, never read), no I/O, no logging. Each transition changes the state
completely before it returns, and returns what happened as events, in order. A request goes

    submit ──► started ──► finish            (a slot was free)
       │          ▲
       ├──► queued┴─────► leave              (its own deadline, the queue's timeout, its client)
       │       └────────► evicted            (by a more urgent newcomer)
       └──► rejected                         (no place in the queue, or none for its client key)

and calling a transition for a request that is not where it has to be is a programming error: `KeyError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from trioproxy import priority
from trioproxy.errors import (
    DEADLINE_EXCEEDED,
    EVICTED,
    QUEUE_FULL,
    RATE_LIMIT_EXCEEDED,
    SHUTTING_DOWN,
    Ending,
)
from trioproxy.events import CapacityChanged, Ended, Progress, Queued, ScheduledRequest, Started
from trioproxy.scheduler.limits import Limit, ReleaseRate, ReturnLine
from trioproxy.scheduler.queue import Queue, Share, ShareLimits

SchedulingEvent = Queued | Started | Ended | CapacityChanged


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All of the state of one pool at one moment."""

    pool: str
    accepting: bool
    """Whether new requests are taken."""
    permits: int
    """All slots."""
    max_queue: int
    running: tuple[tuple[ScheduledRequest, float], ...]
    """Who holds a slot, with the time of its start, longest first."""
    queued: tuple[tuple[ScheduledRequest, float], ...]
    """Who waits, with the time of its queueing, most urgent first."""

    @property
    def available_permits(self) -> int:
        """Free slots; 0 also while a lowered limit drains."""
        return max(self.permits - len(self.running), 0)

    @property
    def queued_by_level(self) -> dict[str, int]:
        """How many wait at each level; every level is there."""
        counts = dict.fromkeys(priority.LEVELS, 0)
        for request, _ in self.queued:
            counts[request.priority_level] += 1
        return counts


class ShareState(NamedTuple):
    """What requests of one client key have at one moment."""

    limits: ShareLimits
    running: int
    """Slots taken."""
    waiting: int
    """Places in the queue taken."""


class Core:
    """One pool: a limited number of slots and one bounded, ordered queue.

    Invariants, at every moment outside a transition: no more run than `limit.permits` says (while a lowered limit
    drains: no more are started); of a client key with limits no more run or wait than those say, draining likewise; if
    a slot is free, nothing is queued but what its key's limit forbids to start.
    """

    def __init__(
        self,
        limit: Limit,
        max_queue: int,
        shares: Mapping[str, ShareLimits] = MappingProxyType({}),
        *,
        pool: str = "default",
    ) -> None:
        self.pool = pool
        self._limit = limit
        self._max_queue = max_queue
        self._accepting = True
        self._queue = Queue()
        self._queue.set_limits(shares)
        self._running: dict[ScheduledRequest, tuple[float, float]] = {}  # started at, seconds waited before
        self._rate = ReleaseRate()
        self._returns = ReturnLine()

    @property
    def accepting(self) -> bool:
        """Whether newcomers are taken."""
        return self._accepting

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many hold a slot."""
        return len(self._running)

    @property
    def startable(self) -> bool:
        """Whether somebody waits whom no limit of a client key forbids to start."""
        return self._queue.first() is not None

    @property
    def max_queue(self) -> int:
        """How many may wait."""
        return self._max_queue

    def submit(self, request: ScheduledRequest, now: float) -> list[SchedulingEvent]:
        """A newcomer: started, queued (perhaps in another's place) or rejected, all of it at once.

        The last event is the newcomer's own.
        """
        if request in self._running or request in self._queue:
            raise KeyError(request)
        if not self._accepting:
            return [Ended(request, now, SHUTTING_DOWN, None, started=False)]
        if request.deadline <= now:
            return [Ended(request, now, DEADLINE_EXCEEDED, None, started=False)]
        share = self._queue.share_of(request)
        if self._has_free_slot and share.may_start:
            self._returns.dissolve()
            return [self._start(request, now, 0.0, was_queued=False)]
        events = self._make_room(request, share, now)
        if not events and not self._has_place(share):
            return [Ended(request, now, self._refusal(share), None, started=False)]
        self._queue.join(request, now)
        return [*events, Queued(request, now)]

    def leave(self, request: ScheduledRequest, now: float, ending: Ending) -> list[SchedulingEvent]:
        """A queued request ends without having started."""
        since = self._queue.leave(request)
        return [Ended(request, now, ending, now - since, started=False)]

    def finish(
        self, request: ScheduledRequest, now: float, ending: Ending, progress: Progress | None = None
    ) -> list[SchedulingEvent]:
        """A running request gives its slot back; the first in the queue has it in the same moment."""
        started_at, queue_seconds = self._running.pop(request)
        self._queue.share_of(request).running -= 1
        self._rate.released(now - started_at)
        self._limit.released(now - started_at, ending)
        return [Ended(request, now, ending, queue_seconds, started=True, progress=progress), *self._start_waiting(now)]

    def resize(
        self, now: float, max_queue: int | None = None, shares: Mapping[str, ShareLimits] | None = None
    ) -> list[SchedulingEvent]:
        """Take notice of a changed limit and set the queue's places; with `shares`, also what client keys may have.

        More slots start waiting requests at once. Fewer slots or places drain: nobody who has one loses it.
        ValueError, and nothing changed, if `max_queue` is negative.
        """
        if max_queue is not None:
            if max_queue < 0:
                raise ValueError(f"max_queue is {max_queue}: it cannot be negative")
            self._max_queue = max_queue
        if shares is not None:
            self._limit_shares(shares)
        return [CapacityChanged(self.pool, now, self._limit.permits, self._max_queue), *self._start_waiting(now)]

    def set_shares(self, now: float, limits: Mapping[str, ShareLimits]) -> list[SchedulingEvent]:
        """Limit the client keys named, and no others. Lower limits drain: nobody loses a slot or a place."""
        self._limit_shares(limits)
        return self._start_waiting(now)

    def close(self) -> None:
        """Turn newcomers away from now on; who runs or waits goes on."""
        self._accepting = False

    def retry_after(self, now: float, request: ScheduledRequest | None = None) -> float:
        """In how many seconds the one who was refused last is to come back.

        At least as long as it takes until what is queued now will have been started; for a `request` that its client
        key's limit of slots has kept from one, what is queued of that key.
        """
        if request is not None and (share := self._queue.share_of(request)).limits.max_concurrency is not None:
            return self._seconds_until(len(share.line) + 1, now, share.limits.max_concurrency)
        return max(self._seconds_until(len(self._queue) + 1, now), self._returns.seconds(now))

    def share(self, request: ScheduledRequest) -> ShareState:
        """What requests of the same client key have at this moment."""
        share = self._queue.share_of(request)
        return ShareState(share.limits, share.running, len(share.line))

    def snapshot(self) -> Snapshot:
        """All of the state, frozen. Takes time in proportion to the number of requests."""
        return Snapshot(
            pool=self.pool,
            accepting=self._accepting,
            permits=self._limit.permits,
            max_queue=self._max_queue,
            running=tuple((request, at) for request, (at, _) in self._running.items()),
            queued=tuple(self._queue),
        )

    def __repr__(self) -> str:
        return (
            f"<Core {self.pool!r}: {len(self._running)} of {self._limit.permits} slots taken, "
            f"{len(self._queue)} of {self._max_queue} places taken{'' if self._accepting else ', closed'}>"
        )

    @property
    def _has_free_slot(self) -> bool:
        return len(self._running) < self._limit.permits

    def _has_place(self, share: Share) -> bool:
        return len(self._queue) < self._max_queue and not share.is_full

    def _make_room(self, request: ScheduledRequest, share: Share, now: float) -> list[SchedulingEvent]:
        """Evict the least urgent for the newcomer, if it is more urgent: of its own key, if that has no place left."""
        if share.is_full:
            if share.limits.max_queue and share.line.lowest_priority() < request.priority:
                return self.leave(share.line.youngest_of_lowest(), now, EVICTED)
        elif len(self._queue) >= self._max_queue:
            self._returns.join(now, self._seconds_until(len(self._queue) + 1, now), self._seconds_until(1, now))
            if self._max_queue and self._queue.lowest_priority() < request.priority:
                return self.leave(self._queue.youngest_of_lowest(), now, EVICTED)
        return []

    def _limit_shares(self, limits: Mapping[str, ShareLimits]) -> None:
        self._queue.set_limits(limits)
        for request in self._running:
            self._queue.share_of(request).running += 1

    def _refusal(self, share: Share) -> Ending:
        """Why there is no place: because of the key alone if it has no place left, or if a slot is free for others."""
        return RATE_LIMIT_EXCEEDED if share.is_full or self._has_free_slot else QUEUE_FULL

    def _seconds_until(self, releases: int, now: float, permits: int | None = None) -> float:
        oldest, _ = next(iter(self._running.values()), (now, 0.0))
        permits = self._limit.permits if permits is None else min(permits, self._limit.permits)
        return self._rate.seconds_until(releases, permits, now - oldest)

    def _start(self, request: ScheduledRequest, now: float, queue_seconds: float, *, was_queued: bool) -> Started:
        self._running[request] = (now, queue_seconds)
        self._queue.share_of(request).running += 1
        return Started(request, now, queue_seconds, was_queued)

    def _start_waiting(self, now: float) -> list[SchedulingEvent]:
        events: list[SchedulingEvent] = []
        while self._has_free_slot and (request := self._queue.first()) is not None:
            since = self._queue.leave(request)
            events.append(self._start(request, now, now - since, was_queued=True))
        return events
