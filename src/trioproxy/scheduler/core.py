"""The scheduler's decisions for one pool: who starts, who waits, who is evicted, who is turned away.

Pure: no trio, no clock (`now` is an argument, never read), no I/O, no logging. Each transition changes the state
completely before it returns, and returns what happened as events, in order. A request goes

    submit ──► started ──► finish            (a slot was free)
       │          ▲
       ├──► queued┴─────► leave              (its own deadline, the queue's timeout, its client)
       │       └────────► evicted            (by a more urgent newcomer)
       └──► rejected

and calling a transition for a request that is not where it has to be is a programming error: `KeyError`.
"""

from __future__ import annotations

from dataclasses import dataclass

from trioproxy import priority
from trioproxy.errors import DEADLINE_EXCEEDED, EVICTED, QUEUE_FULL, SHUTTING_DOWN, Ending
from trioproxy.events import CapacityChanged, Ended, Progress, Queued, ScheduledRequest, Started
from trioproxy.scheduler.limits import Limit, ReleaseRate, ReturnLine
from trioproxy.scheduler.queue import WaitingLine

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
    """Who waits, with the time of its queueing, in starting order."""

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


class Core:
    """One pool: a limited number of slots and one bounded, ordered queue.

    Invariants, at every moment outside a transition: no more run than `limit.permits` says (while a lowered limit
    drains: no more are started); if a slot is free, nothing is queued.
    """

    def __init__(self, limit: Limit, max_queue: int, pool: str = "default") -> None:
        self.pool = pool
        self._limit = limit
        self._max_queue = max_queue
        self._accepting = True
        self._queue = WaitingLine()
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
        if len(self._running) < self._limit.permits:
            self._returns.dissolve()
            return [self._start(request, now, 0.0, was_queued=False)]
        events: list[SchedulingEvent] = []
        if len(self._queue) >= self._max_queue:
            self._returns.join(now, self._seconds_until(len(self._queue) + 1, now), self._seconds_until(1, now))
            if not self._max_queue or self._queue.lowest_priority() >= request.priority:
                return [Ended(request, now, QUEUE_FULL, None, started=False)]
            events += self.leave(self._queue.youngest_of_lowest(), now, EVICTED)
        self._queue.join(request, now)
        events.append(Queued(request, now))
        return events

    def leave(self, request: ScheduledRequest, now: float, ending: Ending) -> list[SchedulingEvent]:
        """A queued request ends without having started."""
        since = self._queue.leave(request)
        return [Ended(request, now, ending, now - since, started=False)]

    def finish(
        self, request: ScheduledRequest, now: float, ending: Ending, progress: Progress | None = None
    ) -> list[SchedulingEvent]:
        """A running request gives its slot back; the first in the queue has it in the same moment."""
        started_at, queue_seconds = self._running.pop(request)
        self._rate.released(now - started_at)
        self._limit.released(now - started_at, ending)
        return [Ended(request, now, ending, queue_seconds, started=True, progress=progress), *self._start_waiting(now)]

    def resize(self, now: float, max_queue: int | None = None) -> list[SchedulingEvent]:
        """Take notice of a changed limit and set the queue's places.

        More slots start waiting requests at once. Fewer slots or places drain: nobody who has one loses it.
        ValueError, and nothing changed, if `max_queue` is negative.
        """
        if max_queue is not None:
            if max_queue < 0:
                raise ValueError(f"max_queue is {max_queue}: it cannot be negative")
            self._max_queue = max_queue
        return [CapacityChanged(self.pool, now, self._limit.permits, self._max_queue), *self._start_waiting(now)]

    def close(self) -> None:
        """Turn newcomers away from now on; who runs or waits goes on."""
        self._accepting = False

    def retry_after(self, now: float) -> float:
        """In how many seconds the one who was refused last is to come back.

        At least as long as it takes until what is queued now will have been started.
        """
        return max(self._seconds_until(len(self._queue) + 1, now), self._returns.seconds(now))

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

    def _seconds_until(self, releases: int, now: float) -> float:
        oldest, _ = next(iter(self._running.values()), (now, 0.0))
        return self._rate.seconds_until(releases, self._limit.permits, now - oldest)

    def _start(self, request: ScheduledRequest, now: float, queue_seconds: float, *, was_queued: bool) -> Started:
        self._running[request] = (now, queue_seconds)
        return Started(request, now, queue_seconds, was_queued)

    def _start_waiting(self, now: float) -> list[SchedulingEvent]:
        events: list[SchedulingEvent] = []
        while self._queue and len(self._running) < self._limit.permits:
            request = self._queue.first()
            since = self._queue.leave(request)
            events.append(self._start(request, now, now - since, was_queued=True))
        return events
