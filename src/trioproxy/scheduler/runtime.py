"""The trio side of the scheduler: a slot is a context manager, an eviction cancels a scope, a start sets an event.

Every change of state happens in `Core`, synchronously, and is published in the same moment: between reading the state
and having published its change there is no checkpoint at which a cancellation could tear it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

import trio

from trioproxy import errors, priority
from trioproxy.errors import Ending, ProxyError
from trioproxy.events import Ended, Progress, Publisher, Queued, ScheduledRequest, Started
from trioproxy.scheduler.core import Core, SchedulingEvent, Snapshot
from trioproxy.scheduler.limits import FixedLimit
from trioproxy.scheduler.queue import ShareLimits


class Slot:
    """What a request holds while it runs, waited for on entering the block, and given back on leaving it.

    Whoever holds it says how it went before that.
    """

    __slots__ = ("_scheduler", "ending", "progress", "queue_seconds", "request")

    def __init__(self, scheduler: Scheduler, request: ScheduledRequest) -> None:
        self.request: Final = request
        self.queue_seconds = 0.0
        self.ending: Ending | None = None
        """How the request ends if the slot's block is left without an exception; it must be set by then."""
        self.progress: Progress
        self._scheduler = scheduler

    async def __aenter__(self) -> Slot:
        self.queue_seconds = await self._scheduler._take(self.request)
        self.progress = Progress()
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.ending = _ending_of(error)
        if self._scheduler._give_back(self) and error is None:
            # Until the next one has begun the upstream has nothing to do: its turn comes with our next one, or before.
            for _ in range(2):
                await trio.lowlevel.cancel_shielded_checkpoint()


class _Waiter:
    """A queued request's task, until the scheduler's verdict wakes it; a bad one cancels its scope."""

    __slots__ = ("scope", "verdict", "woken")

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.woken = trio.Event()
        self.verdict: Started | Ended | None = None

    def wake(self, verdict: Started | Ended) -> None:
        self.verdict = verdict
        if isinstance(verdict, Started):
            self.woken.set()
        else:
            self.scope.cancel(reason=verdict.ending.code)


class Scheduler:
    """Hands out the slots of one pool.

    All methods must be called from the trio thread. Nothing here needs a task of its own: whoever gives a slot back
    starts the next one.
    """

    def __init__(
        self,
        limit: FixedLimit,
        max_queue: int,
        queue_timeout: float,
        publisher: Publisher,
        shares: Mapping[str, ShareLimits] = MappingProxyType({}),
    ) -> None:
        self._limit = limit
        self._core = Core(limit, max_queue, shares)
        self.queue_timeout = queue_timeout
        """Seconds that newcomers may wait; who waits already does so for as long as it was told."""
        self._publisher = publisher
        self._waiters: dict[ScheduledRequest, _Waiter] = {}
        self._present = 0

    def slot(self, request: ScheduledRequest) -> Slot:
        """Hold a slot for the block, waiting for it first if need be: `async with scheduler.slot(request) as slot`.

        Publishes exactly one `Ended`, whatever happens. On leaving the block the request's ending is what an
        exception says (`ProxyError`: its own; a cancellation: CANCELLED; any other: INTERNAL_ERROR), else
        `slot.ending`; the slot is free, and the next request has it and has begun, before that is over.

        Entering raises `ProxyError` when there is no slot to be had: QUEUE_FULL, SHUTTING_DOWN, EVICTED, QUEUE_TIMEOUT,
        DEADLINE_EXCEEDED, RATE_LIMIT_EXCEEDED.
        """
        return Slot(self, request)

    def resize(
        self,
        *,
        concurrency: int | None = None,
        max_queue: int | None = None,
        shares: Mapping[str, ShareLimits] | None = None,
    ) -> None:
        """Change the pool's capacity, and with it what client keys may have, if `shares` says so (see `set_shares`).

        Raising starts waiting requests at once, lowering drains.

        ValueError, and nothing changed, if there would be no slot or fewer than no places.
        """
        permits_before = self._limit.permits
        if concurrency is not None:
            self._limit.permits = concurrency
        try:
            events = self._core.resize(trio.current_time(), max_queue, shares)
        except ValueError:
            self._limit.permits = permits_before
            raise
        self._carry_out(events)

    def set_shares(self, limits: Mapping[str, ShareLimits]) -> None:
        """Limit what the client keys named may have at once, and no others. Lower limits drain."""
        self._carry_out(self._core.set_shares(trio.current_time(), limits))

    def close(self) -> None:
        """Turn newcomers away with SHUTTING_DOWN from now on; who runs or waits goes on."""
        self._core.close()

    @property
    def closed(self) -> bool:
        """Whether newcomers are turned away."""
        return not self._core.accepting

    def retry_after(self) -> float:
        """In how many seconds a refused request has a chance, by the measured rate at which slots come free."""
        return self._core.retry_after(trio.current_time())

    @property
    def running(self) -> int:
        """How many hold a slot."""
        return self._core.running

    @property
    def queued(self) -> int:
        """How many wait."""
        return self._core.queued

    def snapshot(self) -> Snapshot:
        """All of the pool's state, frozen. Takes time in proportion to the number of requests."""
        return self._core.snapshot()

    def violations(self) -> Iterator[str]:
        """What does not hold although it always must, in words; nothing if all is well. Takes constant time."""
        held, waiting = self._core.running, self._core.queued
        if held + waiting > self._present:
            yield f"{held} slots and {waiting} places are taken, but only {self._present} requests are there"
        if self._core.startable and held < self._limit.permits:
            yield f"{waiting} requests wait although only {held} of {self._limit.permits} slots are taken"
        if waiting != len(self._waiters):
            yield f"{waiting} requests are queued, but {len(self._waiters)} tasks wait"

    def __repr__(self) -> str:
        return f"<Scheduler of {self._core!r}>"

    async def _take(self, request: ScheduledRequest) -> float:
        """Returns, once a slot is held, the seconds that it took."""
        self._present += 1
        try:
            return await self._admit(request)
        except BaseException:
            self._present -= 1
            raise

    def _give_back(self, slot: Slot) -> bool:
        """Returns whether somebody who waited has started."""
        ending = slot.ending or errors.INTERNAL_ERROR
        try:
            events = self._carry_out(self._core.finish(slot.request, trio.current_time(), ending, slot.progress))
            return len(events) > 1
        finally:
            self._present -= 1

    async def _admit(self, request: ScheduledRequest) -> float:
        asked = trio.current_time()
        *_, verdict = self._carry_out(self._core.submit(request, asked))
        if isinstance(verdict, Ended):
            raise self._refusal(verdict, self.queue_timeout)
        if isinstance(verdict, Started):
            return verdict.queue_seconds
        waiter = self._waiters[request]
        queue_timeout = self.queue_timeout
        times_out = asked + queue_timeout
        waiter.scope.deadline = min(times_out, request.deadline)
        try:
            with waiter.scope:
                await waiter.woken.wait()
        except BaseException:
            self._abandon(request, waiter)
            raise
        if isinstance(waiter.verdict, Started):
            return waiter.verdict.queue_seconds
        if waiter.verdict is None:
            self._leave(request, errors.DEADLINE_EXCEEDED if request.deadline <= times_out else errors.QUEUE_TIMEOUT)
        assert isinstance(waiter.verdict, Ended)
        raise self._refusal(waiter.verdict, queue_timeout)

    def _abandon(self, request: ScheduledRequest, waiter: _Waiter) -> None:
        """The waiting task was cancelled: it may have been given a slot, or evicted, a moment before."""
        if isinstance(waiter.verdict, Started):
            self._carry_out(self._core.finish(request, trio.current_time(), errors.CANCELLED, Progress()))
        elif waiter.verdict is None:
            self._leave(request, errors.CANCELLED)

    def _leave(self, request: ScheduledRequest, ending: Ending) -> None:
        self._carry_out(self._core.leave(request, trio.current_time(), ending))

    def _carry_out(self, events: list[SchedulingEvent]) -> list[SchedulingEvent]:
        """Wake whom the events concern and tell the listeners; returns the events."""
        for event in events:
            match event:
                case Queued(request):
                    self._waiters[request] = _Waiter()
                case Started(request) | Ended(request) if (waiter := self._waiters.pop(request, None)) is not None:
                    waiter.wake(event)
            self._publisher.publish(event)
        return events

    def _refusal(self, ended: Ended, queue_timeout: float) -> ProxyError:
        request = ended.request
        waited = ended.queue_seconds or 0.0
        key = self._core.share(request)
        own_queue_full = key.limits.max_queue is not None and key.waiting >= key.limits.max_queue
        by_key = own_queue_full or ended.ending is errors.RATE_LIMIT_EXCEEDED
        key_places = self._core.max_queue if key.limits.max_queue is None else key.limits.max_queue
        places = key_places if own_queue_full else self._core.max_queue
        return ProxyError(
            ended.ending,
            queue_seconds=waited,
            retry_after=self._core.retry_after(trio.current_time(), request if by_key else None),
            priority=request.priority,
            permits=self._limit.permits,
            queued=self._core.queued,
            queue=f"The key {request.key!r}'s part of the queue" if own_queue_full else "The queue",
            max_queue=places,
            waited=waited,
            or_with_a_higher_priority=", or with a higher priority"
            if places and request.priority < priority.HIGHEST
            else "",
            limit=queue_timeout if ended.ending is errors.QUEUE_TIMEOUT else request.deadline - request.arrived,
            key=request.key,
            running=key.running,
            waiting=key.waiting,
            key_permits=self._limit.permits if key.limits.max_concurrency is None else key.limits.max_concurrency,
            key_places=key_places,
        )


def _ending_of(error: BaseException) -> Ending:
    if isinstance(error, ProxyError):
        return error.ending
    if isinstance(error, BaseExceptionGroup):  # out of a nursery
        _, error_beside = error.split(trio.Cancelled)
        return errors.CANCELLED if error_beside is None else errors.INTERNAL_ERROR
    return errors.CANCELLED if isinstance(error, trio.Cancelled) else errors.INTERNAL_ERROR
