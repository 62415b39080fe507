"""The pure core in simulated time, held against the ideal pool: the same arrivals, the same starts, to the last bit.

And Retry-After where it has to prove itself: many clients that obey it, in a closed loop with the core.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import pytest
from ideal import (
    BACKGROUND,
    URGENT,
    Arrival,
    Pool,
    Step,
    Stream,
    Workload,
    busy_share,
    intervals,
    simulate,
    urgent_at_half_of_capacity,
    waits,
)

from trioproxy import errors
from trioproxy.errors import Ending, ProxyError
from trioproxy.events import Ended, Queued, ScheduledRequest, Started
from trioproxy.scheduler.core import Core, SchedulingEvent
from trioproxy.scheduler.limits import FixedLimit


class Agenda:
    """Calls to be made in simulated time: by time, then rank, then in the order in which they were planned."""

    RELEASE, LEAVE, ARRIVAL = range(3)

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def plan(self, at: float, rank: int, call: Callable[[], None]) -> None:
        """Make that call at that time; never, if that is infinitely far away."""
        if at < math.inf:
            heapq.heappush(self._calls, (at, rank, next(self._numbers), call))

    def run(self, until: float = math.inf) -> None:
        """Make all calls up to a time."""
        while self._calls and self._calls[0][0] <= until:
            self.now, _, _, call = heapq.heappop(self._calls)
            call()


@dataclass(slots=True)
class Customer:
    """An arrival on its way through the core."""

    number: int
    arrival: Arrival
    request: ScheduledRequest
    state: str = ""


class CoreInSimulatedTime:
    """What the runtime is for the core, without tasks: timers for waiting and serving."""

    def __init__(self, pool: Pool, arrivals: Sequence[Arrival]) -> None:
        self.core = Core(FixedLimit(pool.slots), pool.places)
        self.steps: list[Step] = []
        self._pool = pool
        self._agenda = Agenda()
        self._customers: dict[ScheduledRequest, Customer] = {}
        for number, arrival in enumerate(arrivals):
            request = ScheduledRequest(
                request_id=str(number),
                method="POST",
                path="/v1/x",
                arrived=arrival.at,
                priority=arrival.priority,
                deadline=arrival.at + arrival.deadline_seconds,
            )
            self._customers[request] = Customer(number, arrival, request)
            self._agenda.plan(arrival.at, Agenda.ARRIVAL, partial(self._submit, request))

    def run(self) -> list[Step]:
        """Let everything happen."""
        self._agenda.run()
        assert self.core.snapshot().running == self.core.snapshot().queued == ()
        return self.steps

    def _submit(self, request: ScheduledRequest) -> None:
        self._take_notice(self.core.submit(request, self._agenda.now))

    def _leave(self, customer: Customer, ending: Ending) -> None:
        if customer.state == "queued":
            self._take_notice(self.core.leave(customer.request, self._agenda.now, ending))

    def _finish(self, customer: Customer, ending: Ending) -> None:
        if customer.state == "started":
            self._take_notice(self.core.finish(customer.request, self._agenda.now, ending))

    def _take_notice(self, events: list[SchedulingEvent]) -> None:
        for event in events:
            assert isinstance(event, Queued | Started | Ended)
            customer = self._customers[event.request]
            arrival = customer.arrival
            match event:
                case Queued():
                    customer.state = "queued"
                    for seconds, ending in (
                        (arrival.deadline_seconds, errors.DEADLINE_EXCEEDED),
                        (self._pool.queue_timeout, errors.QUEUE_TIMEOUT),
                        (arrival.patience_seconds, errors.CANCELLED),
                    ):
                        self._agenda.plan(event.at + seconds, Agenda.LEAVE, partial(self._leave, customer, ending))
                case Started():
                    customer.state = "started"
                    assert event.queue_seconds == event.at - arrival.at
                    for end, ending in (
                        (event.at + arrival.service_seconds, errors.COMPLETED),
                        (arrival.at + arrival.deadline_seconds, errors.DEADLINE_EXCEEDED),
                        (arrival.at + arrival.patience_seconds, errors.CANCELLED),
                    ):
                        self._agenda.plan(end, Agenda.RELEASE, partial(self._finish, customer, ending))
                case Ended():
                    customer.state = event.ending.code
            self.steps.append(Step(event.at, customer.number, customer.state))


ALL_PRIORITIES = tuple(range(101))

WORKLOADS = (
    urgent_at_half_of_capacity(Pool(slots=8, places=40), service_seconds=0.1, seconds=20),
    Workload(
        name="all alike",
        pool=Pool(slots=5, places=10),
        streams=(Stream(load=1.5),),
        seconds=400,
    ),
    Workload(
        name="room for everybody",
        pool=Pool(slots=3, places=10**6),
        streams=(Stream(load=0.6, priorities=ALL_PRIORITIES), Stream(load=0.3, service_seconds=5)),
        seconds=1000,
    ),
    Workload(
        name="every priority",
        pool=Pool(slots=10, places=100),
        streams=(Stream(load=2, priorities=ALL_PRIORITIES, service="uniform"),),
        seconds=150,
    ),
    Workload(
        name="bursts",
        pool=Pool(slots=4, places=30),
        streams=(
            Stream(load=0.4, priorities=(BACKGROUND, 20, 30), burst=50),
            Stream(load=0.4, priorities=(URGENT,), burst=10, service_seconds=0.2),
        ),
        seconds=900,
    ),
    Workload(
        name="no queue",
        pool=Pool(slots=6, places=0),
        streams=(Stream(load=1, priorities=(BACKGROUND, URGENT)),),
        seconds=500,
    ),
    Workload(
        name="one slot, one place",
        pool=Pool(slots=1, places=1),
        streams=(Stream(load=2, priorities=ALL_PRIORITIES),),
        seconds=1500,
    ),
    Workload(
        name="nobody waits for ever",
        pool=Pool(slots=4, places=20, queue_timeout=3),
        streams=(
            Stream(load=0.4, priorities=(URGENT,), patience_seconds=2),
            Stream(load=1, priorities=(50,), deadline_seconds=4),
            Stream(load=1.6, priorities=(BACKGROUND,), patience_seconds=10, deadline_seconds=10),
        ),
        seconds=300,
    ),
    Workload(
        name="everything at once",
        pool=Pool(slots=5, places=8, queue_timeout=2),
        streams=(
            Stream(load=0.5, priorities=(URGENT, 91), service="constant", burst=3, patience_seconds=4),
            Stream(load=1.2, priorities=(BACKGROUND, 50, URGENT), burst=4, deadline_seconds=6, patience_seconds=8),
        ),
        seconds=400,
        grid_seconds=0.25,  # exact in binary
    ),
)

HAPPENS = {
    "urgent at half of capacity": {"evicted", "queue_full"},
    "all alike": {"queue_full"},
    "room for everybody": set[str](),
    "every priority": {"evicted", "queue_full"},
    "bursts": {"evicted", "queue_full"},
    "no queue": {"queue_full"},
    "one slot, one place": {"evicted", "queue_full"},
    "nobody waits for ever": {"evicted", "queue_full", "queue_timeout", "deadline_exceeded", "cancelled"},
    "everything at once": {"evicted", "queue_full", "queue_timeout", "deadline_exceeded", "cancelled"},
}
"""How requests end under each workload, other than well."""

SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_the_core_does_what_the_ideal_does(workload: Workload, seed: int) -> None:
    arrivals = workload.arrivals(seed)
    steps = CoreInSimulatedTime(workload.pool, arrivals).run()
    assert len(arrivals) > 1000
    ideal = simulate(workload.pool, arrivals)
    assert [step for step in steps if step.what == "started"] == [step for step in ideal if step.what == "started"]
    assert steps == ideal
    endings = Counter(step.what for step in steps) - Counter({"queued": len(steps), "started": len(steps)})
    assert sum(endings.values()) == len(arrivals), "everybody ends once"
    assert set(endings) == {"completed"} | HAPPENS[workload.name]
    assert min(endings.values()) > 10, "each of them often"


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_no_slot_is_free_while_anybody_waits(workload: Workload) -> None:
    steps = CoreInSimulatedTime(workload.pool, workload.arrivals(0)).run()
    assert busy_share(*intervals(steps), workload.pool.slots) == pytest.approx(1, abs=1e-9)


# Is the ideal ideal? Queueing theory knows the mean waits of the simplest workloads.


def erlang_c(slots: int, load: float) -> float:
    """The probability that all slots are busy: A. K. Erlang's second formula, for Poisson arrivals and departures."""
    offered = slots * load
    last = offered**slots / math.factorial(slots) / (1 - load)
    return last / (sum(offered**k / math.factorial(k) for k in range(slots)) + last)


@pytest.mark.parametrize(
    ("slots", "loads"), [(1, (0.7,)), (4, (0.8,)), (1, (0.3, 0.2, 0.2)), (6, (0.5, 0.3)), (8, (0.2, 0.2, 0.2, 0.2))]
)
def test_the_ideal_waits_as_long_as_theory_says(slots: int, loads: tuple[float, ...]) -> None:
    """A. Cobham's formula for priorities without preemption, the most urgent first in `loads`."""
    streams = tuple(Stream(load=load, priorities=(URGENT - rank,)) for rank, load in enumerate(loads))
    pool = Pool(slots=slots, places=10**9)
    arrivals = Workload(name="theory", pool=pool, streams=streams, seconds=80_000 / slots).arrivals(1)
    waited = waits(arrivals, simulate(pool, arrivals))
    until_a_slot_is_free = erlang_c(slots, sum(loads)) / slots
    for rank in range(len(loads)):
        mine = [seconds for number, seconds in waited.items() if arrivals[number].priority == URGENT - rank]
        expected = until_a_slot_is_free / (1 - sum(loads[:rank])) / (1 - sum(loads[: rank + 1]))
        assert sum(mine) / len(mine) == pytest.approx(expected, rel=0.08)


@cache
def arrival(
    at: float, priority: int, service: float, deadline: float = math.inf, patience: float = math.inf
) -> Arrival:
    return Arrival(
        at=at, priority=priority, service_seconds=service, deadline_seconds=deadline, patience_seconds=patience
    )


BY_HAND: dict[str, tuple[Pool, list[Arrival], str]] = {
    "first come first served": (
        Pool(slots=2, places=5),
        [arrival(0, 50, 4), arrival(1, 50, 1), arrival(1, 50, 3), arrival(1, 50, 1)],
        "0 started 0, 1 started 1, 1 queued 2, 1 queued 3, 2 completed 1, 2 started 2, 4 completed 0, 4 started 3, "
        "5 completed 2, 5 completed 3",
    ),
    "the most urgent first": (
        Pool(slots=1, places=5),
        [arrival(0, 50, 2), arrival(1, 10, 1), arrival(1, 90, 1)],
        "0 started 0, 1 queued 1, 1 queued 2, 2 completed 0, 2 started 2, 3 completed 2, 3 started 1, 4 completed 1",
    ),
    "eviction and rejection": (
        Pool(slots=1, places=2),
        [arrival(0, 0, 9), *(arrival(at, priority, 1) for at, priority in ((1, 10), (2, 10), (3, 50), (4, 10)))],
        "0 started 0, 1 queued 1, 2 queued 2, 3 evicted 2, 3 queued 3, 4 queue_full 4, 9 completed 0, 9 started 3, "
        "10 completed 3, 10 started 1, 11 completed 1",
    ),
    "waiting is limited": (
        Pool(slots=1, places=9, queue_timeout=3),
        [arrival(0, 50, 9), arrival(1, 50, 1), arrival(1, 50, 1, 2), arrival(1, 50, 1, 9, 1)],
        "0 started 0, 1 queued 1, 1 queued 2, 1 queued 3, 2 cancelled 3, 3 deadline_exceeded 2, 4 queue_timeout 1, "
        "9 completed 0",
    ),
    "so is being served": (
        Pool(slots=1, places=9),
        [arrival(0, 50, 9, 3), arrival(1, 50, 9, 99, 4), arrival(2, 50, 1)],
        "0 started 0, 1 queued 1, 2 queued 2, 3 deadline_exceeded 0, 3 started 1, 5 cancelled 1, 5 started 2, "
        "6 completed 2",
    ),
    "a slot that comes free is given away before anybody leaves or comes": (
        Pool(slots=1, places=1, queue_timeout=2),
        [arrival(0, 50, 2), arrival(0, 50, 1), arrival(2, 50, 1)],
        "0 started 0, 0 queued 1, 2 completed 0, 2 started 1, 2 queued 2, 3 completed 1, 3 started 2, 4 completed 2",
    ),
}


@pytest.mark.parametrize(("pool", "arrivals", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_the_ideal_by_hand(pool: Pool, arrivals: list[Arrival], expected: str) -> None:
    assert ", ".join(f"{at:g} {what} {customer}" for at, customer, what in simulate(pool, arrivals)) == expected


def test_the_busy_share_by_hand() -> None:
    served, waited = [(0.0, 4.0), (0.0, 2.0), (3.0, 9.0)], [(1.0, 3.0), (5.0, 6.0)]
    # Two waiting seconds with 2 and 1 of 2 slots busy, one with 1.
    assert busy_share(served, waited, slots=2) == (2 + 1 + 1) / (2 * 3)
    assert busy_share(served, [], slots=2) == 1


# Retry-After: a closed loop of the core and clients that come back when they are told to.

HERD_SECONDS = 0.05

ReturnPolicy = Callable[[Core, float, random.Random], float]
"""In how many seconds a client that was refused just now comes back."""


def obedient(core: Core, now: float, dice: random.Random) -> float:
    """Exactly when the answer says, as an official SDK does."""
    refusal = ProxyError(
        errors.QUEUE_FULL,
        retry_after=core.retry_after(now),
        permits=1,
        queued=0,
        max_queue=0,
        priority=50,
        or_with_a_higher_priority="",
    )
    headers = dict(errors.retry_headers(refusal, dice.random()))
    assert headers[b"x-should-retry"] == b"true"
    assert 1 <= int(headers[b"retry-after"]) <= 60
    return int(headers[b"retry-after-ms"]) / 1000


def every_half_second(_core: Core, _now: float, _dice: random.Random) -> float:
    """As an official SDK does the first time, when the answer says nothing."""
    return 0.5


@dataclass(kw_only=True)
class ClosedLoop:
    """Clients who each want one thing after the other, and come back for it until they have it."""

    returns_in: ReturnPolicy
    clients: int = 50
    slots: int = 4
    places: int = 8
    service_seconds: float = 1.0
    pause_seconds: float = 0.5
    """Between an answer and the next request."""
    seconds: float = 150.0
    seed: int = 0
    idle_before: float = 0.0
    """Serve one request, do nothing for so long, and only then begin."""
    served: int = 0
    refused: int = 0
    returned_at: list[float] = field(default_factory=list)
    told: list[float] = field(default_factory=list)
    """How long each of the refused stayed away."""
    busy_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.core = Core(FixedLimit(self.slots), self.places)
        self._agenda = Agenda()
        self._dice = random.Random(self.seed)

    def run(self) -> ClosedLoop:
        """All clients begin in the same moment: a herd to start with."""
        if self.idle_before:
            request = self._request()
            self.core.submit(request, 0.0)
            self.core.finish(request, self.service_seconds, errors.COMPLETED)
        for _ in range(self.clients):
            self._agenda.plan(self.idle_before, Agenda.ARRIVAL, self._ask)
        self._agenda.run(until=self.idle_before + self.seconds)
        return self

    @property
    def refusals_per_served(self) -> float:
        """How often somebody is sent away for each that is served."""
        return self.refused / self.served

    @property
    def largest_herd(self) -> int:
        """The most who came back within 50 ms."""
        at = self.returned_at
        return max(bisect.bisect_left(at, first + HERD_SECONDS) - index for index, first in enumerate(at))

    @property
    def busy_share(self) -> float:
        """How much of the slots was used."""
        return self.busy_seconds / (self.slots * self.seconds)

    def _request(self) -> ScheduledRequest:
        return ScheduledRequest(request_id="x", method="POST", path="/v1/x", arrived=self._agenda.now, priority=50)

    def _ask(self, *, again: bool = False) -> None:
        now = self._agenda.now
        if again:
            self.returned_at.append(now)
        *_, event = events = self.core.submit(self._request(), now)
        if isinstance(event, Ended):
            self.refused += 1
            self.told.append(self.returns_in(self.core, now, self._dice))
            self._agenda.plan(now + self.told[-1], Agenda.ARRIVAL, partial(self._ask, again=True))
        self._serve(events)

    def _serve(self, events: list[SchedulingEvent]) -> None:
        for event in events:
            if isinstance(event, Started):
                seconds = self._dice.expovariate(1 / self.service_seconds)
                self.busy_seconds += min(seconds, self.idle_before + self.seconds - event.at)
                self._agenda.plan(event.at + seconds, Agenda.RELEASE, partial(self._finish, event.request))

    def _finish(self, request: ScheduledRequest) -> None:
        self._serve(self.core.finish(request, self._agenda.now, errors.COMPLETED))
        self.served += 1
        pause = self._dice.expovariate(1 / self.pause_seconds)
        self._agenda.plan(self._agenda.now + pause, Agenda.ARRIVAL, self._ask)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("slots", "places", "service_seconds", "pause_seconds"),
    [(4, 8, 1.0, 0.5), (4, 8, 1.0, 5.0), (10, 10, 2.0, 1.0), (2, 20, 0.5, 0.5), (1, 5, 0.5, 0.1), (4, 4, 1.0, 0.5)],
)
def test_fifty_obedient_clients_are_seldom_refused_and_form_no_herd(
    slots: int, places: int, service_seconds: float, pause_seconds: float, seed: int
) -> None:
    run = partial(
        ClosedLoop,
        slots=slots,
        places=places,
        service_seconds=service_seconds,
        pause_seconds=pause_seconds,
        seed=seed,
    )
    obeying = run(returns_in=obedient).run()
    baseline = run(returns_in=every_half_second).run()
    assert obeying.refusals_per_served < 1.5
    assert obeying.refusals_per_served < baseline.refusals_per_served / 3
    assert obeying.busy_share > 0.99
    assert obeying.largest_herd <= 7
    assert baseline.largest_herd > 25


def test_more_clients_do_not_mean_more_refusals() -> None:
    hundred = ClosedLoop(returns_in=obedient, clients=100, seconds=300).run()
    two_hundred = ClosedLoop(returns_in=obedient, clients=200, seconds=300).run()
    assert hundred.refusals_per_served == pytest.approx(1, rel=0.2)
    assert two_hundred.refusals_per_served == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("places", [0, 1, 2])
def test_with_hardly_a_queue_slots_are_not_left_idle_for_the_sake_of_few_refusals(places: int) -> None:
    obeying = ClosedLoop(returns_in=obedient, slots=10, places=places).run()
    baseline = ClosedLoop(returns_in=every_half_second, slots=10, places=places).run()
    assert obeying.busy_share > 0.96 * baseline.busy_share
    assert obeying.refusals_per_served < baseline.refusals_per_served / 2


@pytest.mark.parametrize("clients", [6, 50, 5000])
def test_before_anything_has_been_measured_the_time_is_sane(clients: int) -> None:
    """All ask at once and nothing has been finished yet; `obedient` checks that 1 to 60 s are told."""
    run = ClosedLoop(returns_in=obedient, clients=clients, slots=2, places=3, service_seconds=30, seconds=0.1).run()
    assert run.refused == clients - 5
    assert 0.75 <= min(run.told) <= 3
    assert max(run.told) <= 60


def test_a_first_request_that_takes_long_is_believed_before_it_is_over() -> None:
    run = ClosedLoop(returns_in=obedient, clients=1, slots=1, places=0, service_seconds=10**6, seconds=40).run()
    assert run.core.retry_after(40.0) == 40.0


def test_an_idle_hour_has_no_influence() -> None:
    fresh, rested = (ClosedLoop(returns_in=obedient, idle_before=idle, seconds=20).run() for idle in (2.0, 3600.0))
    assert rested.told == pytest.approx(fresh.told)
    assert rested.served == fresh.served


def test_the_refused_of_before_an_idle_hour_are_forgotten() -> None:
    core = Core(FixedLimit(1), 0)
    holder, late = (
        ScheduledRequest(request_id=name, method="POST", path="/v1/x", arrived=0.0, priority=50) for name in "ab"
    )
    core.submit(holder, 0.0)
    for _ in range(1000):
        core.submit(late, 0.0)
    assert core.retry_after(0.0) == 60.0
    core.finish(holder, 2.0, errors.COMPLETED)
    core.submit(holder, 3600.0)
    core.submit(late, 3600.0)
    assert core.retry_after(3600.0) == 2.0, "one slot, held for 2 s"
