"""The scheduler under trio: who is woken when and with what, and that the books balance wherever a request is cut.

The clock jumps: no test waits. It starts at 0, and times are small whole numbers, which floats add exactly. "In the
same instant" means at the same time on that clock; where it says so, without a checkpoint in between.
"""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trioproxy import errors
from trioproxy.errors import Ending, ProxyError
from trioproxy.events import CapacityChanged, Ended, Event, Listener, Publisher, Queued, ScheduledRequest, Started
from trioproxy.scheduler import FixedLimit, Scheduler, Slot

FOREVER = 10_000.0
"""Seconds after which whoever still waits will wait for ever. The clock jumps there at once."""


def make_request(name: str, priority: int = 50, timeout: float = math.inf) -> ScheduledRequest:
    """A request that arrives now and has to be over in `timeout` seconds."""
    now = trio.current_time()
    return ScheduledRequest(
        request_id=name, method="POST", path="/v1/x", arrived=now, priority=priority, deadline=now + timeout
    )


def told(event: Event) -> tuple[str, str] | None:
    """What happened to whom, in few words; None for what concerns no request."""
    match event:
        case Queued(request):
            return request.request_id, "queued"
        case Started(request):
            return request.request_id, "started"
        case Ended(request, ending=ending, started=started):
            return request.request_id, f"{ending.code}{' in its slot' if started else ''}"
    return None


@dataclass(eq=False)
class Client:
    """A task that asks for a slot and holds it until it is told to let go."""

    request: ScheduledRequest
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Cancelled when the client goes away."""
    release: trio.Event = field(default_factory=trio.Event)
    slot: Slot | None = None
    """Set once the slot's block has been entered."""
    error: ProxyError | None = None
    over_at: float | None = None

    async def run(self, scheduler: Scheduler) -> None:
        with self.scope:
            try:
                async with scheduler.slot(self.request) as slot:
                    self.slot = slot
                    await self.release.wait()
                    slot.ending = errors.COMPLETED
            except ProxyError as error:
                self.error = error
        self.over_at = trio.current_time()

    def refusal(self) -> tuple[Ending, float | None]:
        """What it was told, and when."""
        assert self.error is not None
        assert self.slot is None
        return self.error.ending, self.over_at


@dataclass(eq=False)
class Bench:
    """A scheduler, its clients and everything that it has said."""

    limit: FixedLimit
    scheduler: Scheduler
    events: list[Event]
    nursery: trio.Nursery
    listeners: list[Listener]
    """Told of every event, after `events` has got it; may be added to at any time."""

    async def client(self, name: str, priority: int = 50, timeout: float = math.inf) -> Client:
        """One more client, which has got as far as it gets without time going by."""
        client = Client(make_request(name, priority, timeout))
        self.nursery.start_soon(client.run, self.scheduler)
        await wait_all_tasks_blocked()
        return client

    def life(self, name: str) -> list[str]:
        """What happened to one request, in order."""
        return [line for who, line in filter(None, map(told, self.events)) if who == name]

    def ended(self, name: str) -> Ended:
        """The one end of a request."""
        (event,) = [event for event in self.events if isinstance(event, Ended) and event.request.request_id == name]
        return event

    def running(self) -> str:
        """The names of those with a slot, in the order of their starts."""
        return " ".join(request.request_id for request, _ in self.scheduler.snapshot().running)

    def queued(self) -> str:
        """The names of those who wait, in starting order."""
        return " ".join(request.request_id for request, _ in self.scheduler.snapshot().queued)

    def assert_settled(self) -> None:
        """All slots are free, nobody waits, and everybody who ever came has exactly one end, the last of its events."""
        snapshot = self.scheduler.snapshot()
        assert snapshot.running == snapshot.queued == ()
        assert snapshot.available_permits == self.limit.permits
        lives: dict[ScheduledRequest, list[type[Event]]] = {}
        for event in self.events:
            if isinstance(event, Queued | Started | Ended):
                lives.setdefault(event.request, []).append(type(event))
        for request, life in lives.items():
            assert life in (
                [Ended],
                [Queued, Ended],
                [Started, Ended],
                [Queued, Started, Ended],
            ), f"{request.request_id}: {life}"


@asynccontextmanager
async def running_bench(permits: int = 1, max_queue: int = 10, queue_timeout: float = 300.0) -> AsyncIterator[Bench]:
    """A bench that must be settled once all of its clients have gone away at the end of the block."""
    assert isinstance(trio.lowlevel.current_clock(), MockClock), "the test does not ask for autojump_clock"
    limit = FixedLimit(permits)
    events: list[Event] = []
    listeners: list[Listener] = []

    def listen(event: Event) -> None:
        events.append(event)
        for listener in listeners:
            listener(event)

    failures: list[Exception] = []
    publisher = Publisher([listen], lambda _listener, error: failures.append(error))
    scheduler = Scheduler(limit, max_queue, queue_timeout, publisher)
    with trio.fail_after(FOREVER):
        async with trio.open_nursery() as nursery:
            bench = Bench(limit, scheduler, events, nursery, listeners)
            yield bench
            nursery.cancel_scope.cancel()
    bench.assert_settled()
    assert failures == []


async def test_a_free_slot_is_had_at_once(autojump_clock: MockClock) -> None:
    async with running_bench(permits=2) as bench:
        a = await bench.client("a")
        b = await bench.client("b")
        assert trio.current_time() == 0.0
        assert a.slot is not None
        assert a.slot.request is a.request
        assert a.slot.queue_seconds == 0.0
        assert b.slot is not None
        assert (bench.running(), bench.queued()) == ("a b", "")
        assert repr(bench.scheduler) == "<Scheduler of <Core 'default': 2 of 2 slots taken, 0 of 10 places taken>>"


async def test_work_conserving_the_next_starts_without_the_clock_moving(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        clients = [await bench.client(name, priority) for name, priority in (("a", 50), ("b", 10), ("c", 90))]
        await trio.sleep(5)
        clients[0].release.set()
        await wait_all_tasks_blocked()
        assert clients[2].slot is not None
        assert clients[2].slot.queue_seconds == 5.0
        clients[2].release.set()
        await wait_all_tasks_blocked()
        assert clients[1].slot is not None
        assert trio.current_time() == 5.0
        assert [event.at for event in bench.events if isinstance(event, Started)] == [0.0, 5.0, 5.0]


async def test_the_next_has_the_slot_before_the_block_is_left(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        async with bench.scheduler.slot(make_request("holder")) as slot:
            await bench.client("next")
            slot.ending = errors.COMPLETED
        assert bench.running() == "next", "no other task has run since"


async def test_a_chain_of_a_thousand_takes_no_time(autojump_clock: MockClock) -> None:
    async with running_bench(max_queue=1000) as bench:
        first = await bench.client("first")
        served = []

        async def hurry(request: ScheduledRequest) -> None:
            async with bench.scheduler.slot(request) as slot:
                served.append(request)
                slot.ending = errors.COMPLETED

        requests = [make_request(str(number), priority=number % 101) for number in range(1000)]
        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(hurry, request)
            await wait_all_tasks_blocked()
            first.release.set()
        assert trio.current_time() == 0.0
        assert [request.priority for request in served] == sorted((r.priority for r in requests), reverse=True)


# How the end is counted, by how the block is left.


@pytest.mark.parametrize("ending", [errors.COMPLETED, errors.UPSTREAM_REFUSED, errors.UPSTREAM_BROKE_OFF])
async def test_a_normal_exit_ends_as_the_slot_says(autojump_clock: MockClock, ending: Ending) -> None:
    async with running_bench() as bench:
        async with bench.scheduler.slot(make_request("a")) as slot:
            await trio.sleep(3)
            slot.progress.bytes_out = 77
            slot.ending = ending
        ended = bench.ended("a")
        assert (ended.ending, ended.at, ended.queue_seconds, ended.total_seconds) == (ending, 3.0, 0.0, 3.0)
        assert ended.progress is slot.progress
        assert ended.started


async def test_a_normal_exit_that_says_nothing_is_a_bug_of_ours(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        async with bench.scheduler.slot(make_request("a")):
            pass
        assert bench.ended("a").ending is errors.INTERNAL_ERROR


async def test_a_proxy_error_ends_as_it_says(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        error = ProxyError(errors.UPSTREAM_TIMEOUT, limit=600, setting="upstream.idle_timeout")

        async def serve() -> None:
            async with bench.scheduler.slot(make_request("a")) as slot:
                slot.ending = errors.COMPLETED
                raise error

        with pytest.raises(ProxyError) as caught:
            await serve()
        assert caught.value is error
        assert bench.ended("a").ending is errors.UPSTREAM_TIMEOUT


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, OSError, StopAsyncIteration, trio.BrokenResourceError])
async def test_any_other_exception_is_a_bug_of_ours(autojump_clock: MockClock, kind: type[Exception]) -> None:
    async with running_bench() as bench:

        async def serve() -> None:
            async with bench.scheduler.slot(make_request("a")) as slot:
                await bench.client("next")
                slot.ending = errors.COMPLETED
                raise kind("boom")

        with pytest.raises(kind, match="boom"):
            await serve()
        assert bench.ended("a").ending is errors.INTERNAL_ERROR
        assert bench.running() == "next", "the slot goes on all the same"


async def test_cancelled_in_its_slot(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        a = await bench.client("a")
        b = await bench.client("b")
        await trio.sleep(2)
        a.scope.cancel()
        await wait_all_tasks_blocked()
        assert bench.life("a") == ["started", "cancelled in its slot"]
        assert bench.ended("a").at == 2.0
        assert b.slot is not None
        assert a.scope.cancelled_caught, "the cancellation is passed on, not swallowed"


async def test_cancelled_in_a_nursery_in_its_slot(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        with trio.move_on_after(2):
            async with bench.scheduler.slot(make_request("a")), trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
        assert bench.life("a") == ["started", "cancelled in its slot"]


async def test_a_bug_on_the_occasion_of_a_cancellation_is_a_bug(autojump_clock: MockClock) -> None:
    async def clumsy() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError("boom")

    async def serve(scheduler: Scheduler) -> None:
        with trio.move_on_after(2):
            async with scheduler.slot(make_request("a")), trio.open_nursery() as nursery:
                nursery.start_soon(clumsy)
                nursery.start_soon(trio.sleep_forever)

    async with running_bench() as bench:
        with pytest.raises(BaseExceptionGroup):
            await serve(bench.scheduler)
        assert bench.life("a") == ["started", "internal_error in its slot"]


# Timeouts in the queue.


async def test_the_queue_timeout_comes_at_exactly_the_right_time(autojump_clock: MockClock) -> None:
    async with running_bench(queue_timeout=300) as bench:
        await bench.client("holder")
        await trio.sleep(7)
        b = await bench.client("b", priority=30)
        await trio.sleep(299)
        assert bench.queued() == "b"
        await trio.sleep(2)
        assert b.refusal() == (errors.QUEUE_TIMEOUT, 307.0)
        assert bench.life("b") == ["queued", "queue_timeout"]
        assert (bench.ended("b").at, bench.ended("b").queue_seconds) == (307.0, 300.0)
        assert (bench.running(), bench.queued()) == ("holder", "")
        assert b.error is not None
        assert b.error.queue_seconds == 300.0
        assert "within 300 s (scheduler.queue_timeout)" in str(b.error)
        assert "priority 30" in str(b.error)


@pytest.mark.parametrize(
    ("timeout", "ending", "ends_at"),
    [
        (1.0, errors.DEADLINE_EXCEEDED, 1.0),
        (9.0, errors.DEADLINE_EXCEEDED, 9.0),
        (10.0, errors.DEADLINE_EXCEEDED, 10.0),
        (11.0, errors.QUEUE_TIMEOUT, 10.0),
        (math.inf, errors.QUEUE_TIMEOUT, 10.0),
    ],
)
async def test_its_own_deadline_or_the_queues_timeout_whichever_is_first(
    autojump_clock: MockClock, timeout: float, ending: Ending, ends_at: float
) -> None:
    async with running_bench(queue_timeout=10) as bench:
        await bench.client("holder")
        b = await bench.client("b", timeout=timeout)
        await trio.sleep(60)
        assert b.refusal() == (ending, ends_at)
        assert bench.ended("b").ending is ending


async def test_a_deadline_counts_from_arrival_the_queues_timeout_from_asking(autojump_clock: MockClock) -> None:
    async with running_bench(queue_timeout=10) as bench:
        await bench.client("holder")
        slow_sender, patient = make_request("slow", timeout=8), make_request("patient")
        await trio.sleep(5)
        for request in (slow_sender, patient):
            bench.nursery.start_soon(Client(request).run, bench.scheduler)
        await trio.sleep(60)
        assert (bench.ended("slow").at, bench.ended("slow").queue_seconds) == (8.0, 3.0)
        assert (bench.ended("patient").at, bench.ended("patient").queue_seconds) == (15.0, 10.0)


async def test_a_deadline_that_has_passed_on_asking(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        request = make_request("late", timeout=2.5)
        await trio.sleep(3)
        with pytest.raises(ProxyError, match=r"deadline \(X-Request-Timeout\) of 2\.5 s") as caught:
            async with bench.scheduler.slot(request):
                pytest.fail("the block must not be entered")
        assert caught.value.ending is errors.DEADLINE_EXCEEDED
        assert bench.life("late") == ["deadline_exceeded"]


async def test_a_timeout_waits_for_nobody_and_hurts_nobody(autojump_clock: MockClock) -> None:
    async with running_bench(queue_timeout=10) as bench:
        holder = await bench.client("holder")
        await bench.client("impatient", priority=90, timeout=2)
        await trio.sleep(5)
        late = await bench.client("late")
        await trio.sleep(6)
        assert bench.queued() == "late"
        holder.release.set()
        await wait_all_tasks_blocked()
        assert late.slot is not None
        await trio.sleep(100)
        assert bench.running() == "late", "the queue's timeout is over once it runs"


@pytest.mark.parametrize("attempt", range(10))
async def test_a_timeout_and_a_release_in_the_same_instant(autojump_clock: MockClock, attempt: int) -> None:
    """trio runs what is due in any order: both ends are right, having both or none is not."""
    async with running_bench(queue_timeout=10) as bench:

        async def hold() -> None:
            async with bench.scheduler.slot(make_request("holder")) as slot:
                await trio.sleep(10)
                slot.ending = errors.COMPLETED

        bench.nursery.start_soon(hold)
        await wait_all_tasks_blocked()
        waiter = await bench.client("waiter")
        await trio.sleep(20)
        if waiter.slot is None:
            assert bench.life("waiter") == ["queued", "queue_timeout"]
            assert bench.running() == ""
        else:
            assert bench.life("waiter") == ["queued", "started"]
            assert bench.running() == "waiter"


# Refusals and evictions.


async def test_a_full_queue_refuses_with_its_numbers(autojump_clock: MockClock) -> None:
    async with running_bench(permits=2, max_queue=3) as bench:
        for name in "abcde":
            await bench.client(name, priority=60)
        refused = await bench.client("refused", priority=60)
        assert refused.refusal() == (errors.QUEUE_FULL, 0.0)
        assert bench.life("refused") == ["queue_full"]
        assert bench.ended("refused").queue_seconds is None
        assert refused.error is not None
        for part in ("All 2 slots", "3 of 3 places", "lower priority than 60", "about 2 s"):
            assert part in str(refused.error)


@pytest.mark.parametrize(
    ("max_queue", "priority", "advised"),
    [(1, 99, True), pytest.param(1, 100, False, id="there is no higher"), pytest.param(0, 50, False, id="no place")],
)
async def test_a_higher_priority_is_advised_where_it_would_help(
    autojump_clock: MockClock, max_queue: int, priority: int, advised: bool
) -> None:
    async with running_bench(max_queue=max_queue) as bench:
        await bench.client("holder")
        await bench.client("waits", priority=100)
        refused = await bench.client("refused", priority=priority)
        assert refused.refusal() == (errors.QUEUE_FULL, 0.0)
        assert ("or with a higher priority" in str(refused.error)) is advised


async def test_without_a_queue_a_slot_or_a_refusal(autojump_clock: MockClock) -> None:
    async with running_bench(max_queue=0) as bench:
        holder = await bench.client("holder", priority=0)
        refused = await bench.client("refused", priority=100)
        assert refused.refusal() == (errors.QUEUE_FULL, 0.0)
        holder.release.set()
        await wait_all_tasks_blocked()
        assert (await bench.client("next", priority=0)).slot is not None


async def test_an_eviction_wakes_its_victim_at_once(autojump_clock: MockClock) -> None:
    async with running_bench(max_queue=2) as bench:
        await bench.client("holder")
        await bench.client("elder", priority=20)
        await trio.sleep(1)
        victim = await bench.client("victim", priority=20)
        await trio.sleep(4)
        await bench.client("urgent", priority=21)
        assert victim.refusal() == (errors.EVICTED, 5.0)
        assert bench.life("victim") == ["queued", "evicted"]
        assert bench.ended("victim").queue_seconds == 4.0
        assert bench.queued() == "urgent elder"
        assert victim.error is not None
        assert victim.error.queue_seconds == 4.0
        for part in ("(2 places)", "4.000 s", "priority 20", "about 15 s, or with a higher priority"):
            assert part in str(victim.error)


async def test_the_victim_is_told_before_the_newcomer_waits(autojump_clock: MockClock) -> None:
    async with running_bench(max_queue=1) as bench:
        for name, priority in (("holder", 50), ("victim", 10), ("urgent", 90)):
            await bench.client(name, priority)
        assert [told(event) for event in bench.events] == [
            ("holder", "started"),
            ("victim", "queued"),
            ("victim", "evicted"),
            ("urgent", "queued"),
        ]


async def test_closed_newcomers_are_refused_the_others_go_on(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        a = await bench.client("a")
        b = await bench.client("b")
        closed = [bench.scheduler.closed]
        bench.scheduler.close()
        assert [*closed, bench.scheduler.closed] == [False, True]
        c = await bench.client("c", priority=100)
        assert c.refusal() == (errors.SHUTTING_DOWN, 0.0)
        assert bench.life("c") == ["shutting_down"]
        assert "shutting down" in str(c.error)
        a.release.set()
        await wait_all_tasks_blocked()
        assert b.slot is not None


async def test_retry_after_is_the_measured_wait(autojump_clock: MockClock) -> None:
    async with running_bench(permits=2, max_queue=2) as bench:
        a = await bench.client("a")
        await bench.client("b")
        await trio.sleep(10)
        a.release.set()
        for name in "cde":
            await bench.client(name)
        assert bench.scheduler.retry_after() == 3 * 10.0 / 2
        refused = await bench.client("refused")
        assert refused.error is not None
        assert refused.error.retry_after == 15.0
        assert "about 15 s" in str(refused.error)


# Going away, also in the very instant of a verdict. A release, an eviction and a cancellation follow each other without
# a checkpoint, in both orders.


async def test_cancelled_while_queued_nothing_is_ever_started(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        holder = await bench.client("holder")
        waiter = await bench.client("waiter")
        await trio.sleep(3)
        waiter.scope.cancel()
        await wait_all_tasks_blocked()
        assert waiter.scope.cancelled_caught
        assert bench.life("waiter") == ["queued", "cancelled"]
        assert bench.ended("waiter").queue_seconds == 3.0
        holder.release.set()
        await wait_all_tasks_blocked()
        assert waiter.slot is None
        assert bench.running() == ""


@pytest.mark.parametrize("cancelled_first", [False, True])
@pytest.mark.parametrize("another_waits", [False, True])
async def test_started_and_cancelled_in_the_same_instant(
    autojump_clock: MockClock, cancelled_first: bool, another_waits: bool
) -> None:
    async with running_bench() as bench:
        async with bench.scheduler.slot(make_request("holder")) as slot:
            waiter = await bench.client("waiter", priority=90)
            if another_waits:
                await bench.client("another", priority=10)
            started: list[str] = []

            def cancel(event: Event) -> None:
                if isinstance(event, Started) and event.request is waiter.request:
                    started.append(bench.running())  # its task has not run yet
                    waiter.scope.cancel()

            if cancelled_first:
                waiter.scope.cancel()
            bench.listeners.append(cancel)
            slot.ending = errors.COMPLETED
        assert started == ["waiter"]
        await wait_all_tasks_blocked()
        assert bench.life("waiter") == ["queued", "started", "cancelled in its slot"]
        assert waiter.scope.cancelled_caught
        assert bench.running() == ("another" if another_waits else "")
        assert bench.queued() == ""


@pytest.mark.parametrize("cancelled_first", [False, True])
async def test_started_by_a_resize_and_cancelled_in_the_same_instant(
    autojump_clock: MockClock, cancelled_first: bool
) -> None:
    async with running_bench() as bench:
        await bench.client("holder")
        waiter = await bench.client("waiter")
        steps: list[Callable[[], object]] = [lambda: bench.scheduler.resize(concurrency=2), waiter.scope.cancel]
        for step in reversed(steps) if cancelled_first else steps:
            step()
        await wait_all_tasks_blocked()
        assert bench.life("waiter") == ["queued", "started", "cancelled in its slot"]
        assert bench.running() == "holder"


@pytest.mark.parametrize("cancelled_first", [False, True])
async def test_evicted_and_cancelled_in_the_same_instant(autojump_clock: MockClock, cancelled_first: bool) -> None:
    async with running_bench(max_queue=1) as bench:
        await bench.client("holder")
        victim = await bench.client("victim", priority=10)

        def cancel_the_evicted(event: Event) -> None:
            if told(event) == ("victim", "evicted"):
                victim.scope.cancel()

        async def evict() -> None:
            if cancelled_first:
                victim.scope.cancel()
            else:
                bench.listeners.append(cancel_the_evicted)
            async with bench.scheduler.slot(make_request("urgent", priority=90)):
                pytest.fail("the holder does not let go")

        bench.nursery.start_soon(evict)
        await wait_all_tasks_blocked()
        assert bench.life("victim") == ["queued", "evicted"]
        assert victim.scope.cancelled_caught
        assert (bench.running(), bench.queued()) == ("holder", "urgent")


@pytest.mark.parametrize("attempt", range(10))
async def test_evicted_and_timed_out_in_the_same_instant(autojump_clock: MockClock, attempt: int) -> None:
    """trio runs what is due in any order: either end is right, both is not."""
    async with running_bench(max_queue=1) as bench:
        await bench.client("holder")
        victim = await bench.client("victim", priority=10, timeout=5)
        await trio.sleep(5)
        await bench.client("urgent", priority=90)
        assert bench.life("victim") in (["queued", "evicted"], ["queued", "deadline_exceeded"])
        assert victim.refusal() == (bench.ended("victim").ending, 5.0)
        assert (bench.running(), bench.queued()) == ("holder", "urgent")


@pytest.mark.parametrize("attempt", range(10))
async def test_a_timeout_and_a_cancellation_in_the_same_instant(autojump_clock: MockClock, attempt: int) -> None:
    async with running_bench(queue_timeout=10) as bench:
        await bench.client("holder")
        waiter = await bench.client("waiter")
        waiter.scope.deadline = trio.current_time() + 10
        await trio.sleep(20)
        assert bench.life("waiter") in (["queued", "queue_timeout"], ["queued", "cancelled"])
        assert waiter.slot is None
        assert bench.running() == "holder"


async def test_already_cancelled_when_it_asks(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        await bench.client("holder")
        with trio.CancelScope() as scope:
            scope.cancel()
            async with bench.scheduler.slot(make_request("a")):
                pytest.fail("the holder does not let go")
        assert bench.life("a") == ["queued", "cancelled"]


async def test_everybody_goes_away_at_once(autojump_clock: MockClock) -> None:
    async with running_bench(permits=3, max_queue=5) as bench:
        for name in "abcdefgh":
            await bench.client(name)
        assert (bench.running(), bench.queued()) == ("a b c", "d e f g h")
        bench.nursery.cancel_scope.cancel()
    assert {bench.ended(name).ending for name in "abcdefgh"} == {errors.CANCELLED}


# Resizing.


async def test_more_slots_start_the_waiting_at_once(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        await bench.client("holder")
        low, high, middle = [await bench.client(str(priority), priority) for priority in (10, 90, 50)]
        await trio.sleep(2)
        bench.scheduler.resize(concurrency=3)
        assert bench.running() == "holder 90 50"
        await wait_all_tasks_blocked()
        assert high.slot is not None
        assert middle.slot is not None
        assert low.slot is None
        assert trio.current_time() == 2.0
        assert CapacityChanged("default", 2.0, 3, 10) in bench.events


async def test_fewer_slots_drain(autojump_clock: MockClock) -> None:
    async with running_bench(permits=3) as bench:
        clients = [await bench.client(name) for name in "abcde"]
        bench.scheduler.resize(concurrency=1)
        await wait_all_tasks_blocked()
        assert bench.running() == "a b c"
        for client, running in zip(clients, ("b c", "c", "d", "e", ""), strict=True):
            client.release.set()
            await wait_all_tasks_blocked()
            assert bench.running() == running


async def test_places_can_be_set_alone_and_drain(autojump_clock: MockClock) -> None:
    async with running_bench(max_queue=3) as bench:
        for name in "abcd":
            await bench.client(name)
        bench.scheduler.resize(max_queue=1)
        assert (bench.running(), bench.queued()) == ("a", "b c d")
        assert bench.events[-1] == CapacityChanged("default", 0.0, 1, 1)
        refused = await bench.client("e")
        assert "3 of 1 places" in str(refused.error)


@pytest.mark.parametrize("concurrency", [0, -1])
async def test_there_is_at_least_one_slot(autojump_clock: MockClock, concurrency: int) -> None:
    async with running_bench(permits=2) as bench:
        with pytest.raises(ValueError, match="at least 1"):
            bench.scheduler.resize(concurrency=concurrency, max_queue=5)
        assert (bench.scheduler.snapshot().permits, bench.scheduler.snapshot().max_queue) == (2, 10)
        assert bench.events == []


async def test_a_refused_resize_changes_nothing(autojump_clock: MockClock) -> None:
    async with running_bench() as bench:
        await bench.client("holder")
        await bench.client("waiter")
        with pytest.raises(ValueError, match="cannot be negative"):
            bench.scheduler.resize(concurrency=2, max_queue=-1)
        snapshot = bench.scheduler.snapshot()
        assert not (snapshot.available_permits and snapshot.queued), "a slot is free and somebody waits"
        assert snapshot.permits == 1


# Listeners, and what is left behind.


async def test_a_listener_that_raises_hurts_nobody(autojump_clock: MockClock) -> None:
    failures: list[tuple[Listener, Exception]] = []
    heard: list[Event] = []
    broken_heard: list[Event] = []

    def broken(event: Event) -> None:
        broken_heard.append(event)
        raise RuntimeError(f"failure {len(broken_heard)}")

    publisher = Publisher([broken, heard.append], lambda listener, error: failures.append((listener, error)))
    scheduler = Scheduler(FixedLimit(1), 1, 300, publisher)
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = FOREVER
        clients = [Client(make_request(name, priority)) for name, priority in (("a", 50), ("b", 10), ("c", 90))]
        for client in clients:
            nursery.start_soon(client.run, scheduler)
            await wait_all_tasks_blocked()
        for client in clients:
            client.release.set()
    assert clients[1].refusal() == (errors.EVICTED, 0.0)
    assert [told(event) for event in heard] == [
        ("a", "started"),
        ("b", "queued"),
        ("b", "evicted"),
        ("c", "queued"),
        ("a", "completed in its slot"),
        ("c", "started"),
        ("c", "completed in its slot"),
    ]
    assert broken_heard == heard, "it is given later events as before"
    assert [str(error) for _, error in failures] == [f"failure {number}" for number in range(1, 8)]
    assert {listener for listener, _ in failures} == {broken}


async def test_a_failing_listener_need_not_be_reported(autojump_clock: MockClock) -> None:
    heard: list[Event] = []

    def broken(_event: Event) -> None:
        raise RuntimeError

    scheduler = Scheduler(FixedLimit(1), 1, 300, Publisher([broken, heard.append]))
    async with scheduler.slot(make_request("a")) as slot:
        slot.ending = errors.COMPLETED
    assert [told(event) for event in heard] == [("a", "started"), ("a", "completed in its slot")]


class WeaklyReferable(ScheduledRequest):
    """A request whose disappearance can be watched."""

    __slots__ = ("__weakref__",)


async def test_nothing_is_kept_of_those_that_are_over(autojump_clock: MockClock) -> None:
    scheduler = Scheduler(FixedLimit(1), 2, 10, Publisher())
    references: list[weakref.ref[ScheduledRequest]] = []

    async def client(priority: int, held_seconds: float, stays_seconds: float = math.inf) -> None:
        now = trio.current_time()
        request = WeaklyReferable(request_id="x", method="POST", path="/v1/x", arrived=now, priority=priority)
        references.append(weakref.ref(request))
        with trio.move_on_after(stays_seconds):
            try:
                async with scheduler.slot(request) as slot:
                    await trio.sleep(held_seconds)
                    slot.ending = errors.COMPLETED
            except ProxyError:
                pass

    async with trio.open_nursery() as nursery:
        for priority, held, stays in (
            (50, 5.0, math.inf),  # runs
            (20, 1.0, math.inf),  # evicted
            (30, 20.0, math.inf),  # waits, then runs
            (40, 1.0, 3.0),  # gone while it waits
            (10, 1.0, math.inf),  # refused
            (90, 100.0, 50.0),  # waits, then gone while it runs
        ):
            nursery.start_soon(client, priority, held, stays)
            await wait_all_tasks_blocked()
        await trio.sleep(8)
        nursery.start_soon(client, 0, 1.0)  # times out
    gc.collect()
    assert len(references) == 7
    assert [reference() for reference in references] == [None] * 7


# Everything at once.


@dataclass(eq=False)
class Crowd:
    """Many clients with random manners, at whole seconds, so that as much as possible happens in the same instant."""

    bench: Bench
    dice: random.Random
    inside: int = 0
    entered: set[ScheduledRequest] = field(default_factory=set)

    async def client(self, number: int) -> None:
        dice = self.dice
        await trio.sleep(dice.randrange(60))
        timeout = float(dice.choice([1, 2, 5, 1000]))
        request = make_request(str(number), dice.choice([10, 50, 50, 90]), timeout)
        goes_away_after = dice.choice([0, 1, 2, 3, 8, math.inf, math.inf, math.inf])
        with trio.move_on_after(goes_away_after):
            try:
                async with self.bench.scheduler.slot(request) as slot:
                    assert request not in self.entered
                    self.entered.add(request)
                    self.inside += 1
                    try:
                        await self.serve(slot)
                    finally:
                        self.inside -= 1
            except (ProxyError, RuntimeError):
                pass

    async def serve(self, slot: Slot) -> None:
        await trio.sleep(self.dice.randrange(5))
        slot.ending = errors.COMPLETED
        match self.dice.randrange(8):
            case 0:
                raise ProxyError(errors.UPSTREAM_TIMEOUT, limit=1, setting="x")
            case 1:
                raise RuntimeError("a bug")

    async def operator(self) -> None:
        """Changes the capacity now and then."""
        while True:
            await trio.sleep(self.dice.randrange(1, 10))
            self.bench.scheduler.resize(concurrency=self.dice.randrange(1, 5), max_queue=self.dice.randrange(1, 8))

    async def auditor(self) -> None:
        """Looks between the seconds, when everything that could happen has happened."""
        await trio.sleep(0.5)
        while True:
            snapshot = self.bench.scheduler.snapshot()
            assert not (snapshot.available_permits and snapshot.queued), "a slot is free and somebody waits"
            assert self.inside == len(snapshot.running)
            assert list(self.bench.scheduler.violations()) == []
            events = self.bench.events
            asked = {event.request for event in events if isinstance(event, Queued | Started | Ended)}
            ended = [event.request for event in events if isinstance(event, Ended)]
            assert len(ended) == len(set(ended))
            assert len(asked) == len(ended) + len(snapshot.running) + len(snapshot.queued)
            await trio.sleep(1)


def assert_never_more_than_permitted(events: list[Event], permits: int) -> None:
    in_use = 0
    for event in events:
        match event:
            case Started():
                in_use += 1
                assert in_use <= permits
            case Ended(started=True):
                in_use -= 1
            case CapacityChanged():
                permits = event.permits
    assert in_use == 0


@pytest.mark.parametrize("seed", range(25))
async def test_the_books_balance_whatever_happens_when(autojump_clock: MockClock, seed: int) -> None:
    async with running_bench(permits=3, max_queue=5, queue_timeout=4) as bench:
        crowd = Crowd(bench, random.Random(seed))
        bench.nursery.start_soon(crowd.operator)
        bench.nursery.start_soon(crowd.auditor)
        async with trio.open_nursery() as clients:
            for number in range(120):
                clients.start_soon(crowd.client, number)
        bench.assert_settled()
        ended = [event for event in bench.events if isinstance(event, Ended)]
        assert len(ended) == 120
        started = {event.request for event in bench.events if isinstance(event, Started)}
        assert {event.request for event in ended if event.started} == started
        assert crowd.entered <= started, "nobody is served without a slot"
        for event in ended:
            if event.request in started - crowd.entered:
                assert event.ending is errors.CANCELLED, "a slot that was never used came with a cancellation"
            if event.queue_seconds is not None:
                assert 0 <= event.queue_seconds <= 4
        assert_never_more_than_permitted(bench.events, permits=3)
