"""At twice the load that the upstream can take, on real sockets: the urgent wait hardly longer than ideally.

Order is checked exactly, times with bounds that are wide, and wider if the machine's own timers are late:
`bench/urgent.py` says how near to the ideal it really is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import pytest
import trio
from ideal import URGENT, Arrival, Pool, simulate, urgent_at_half_of_capacity

from openloop import Clients, Figures, TimedUpstream, Visit, figures
from support import running_proxy
from trioproxy.events import Ended, Event, Queued, ScheduledRequest, Started

POOL = Pool(slots=4, places=24)
SERVICE_SECONDS = 0.1
SECONDS = 3.0


class Run:
    """One run of the load, and everything that was written down."""

    def __init__(self, visits: list[Visit], events: Sequence[Event], at_once_max: int, found: Figures) -> None:
        self.urgent = [visit for visit in visits if visit.arrival.priority == URGENT]
        self.others = [visit for visit in visits if visit.arrival.priority != URGENT]
        self.events = events
        self.at_once_max = at_once_max
        self.figures = found


@pytest.fixture(scope="module")
def run() -> Run:
    """The load once, for all tests."""
    return trio.run(_run)


async def _run() -> Run:
    upstream = TimedUpstream()
    arrivals = urgent_at_half_of_capacity(POOL, SERVICE_SECONDS, SECONDS).arrivals(seed=1)
    limits = {"concurrency": POOL.slots, "max_queue": POOL.places}
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(upstream.serve)
            async with running_proxy(upstream.url, scheduler=limits) as proxy:
                clients = Clients(proxy.port, upstream)
                await clients.open(POOL.slots)
                transit_seconds = await clients.transit_seconds(samples=15)
                before = len(proxy.recorder.events)
                visits = await clients.come(arrivals)
                await proxy.settled()
                clients.close()
            nursery.cancel_scope.cancel()
    found = figures(POOL, visits, URGENT, transit_seconds)
    return Run(visits, proxy.recorder.events[before:], upstream.at_once_max, found)


def test_all_urgent_requests_are_served(run: Run) -> None:
    assert len(run.urgent) > 40
    assert {visit.status for visit in run.urgent} == {200}


def test_they_wait_about_as_long_as_in_the_ideal_pool(run: Run) -> None:
    """Without priorities it would be more than ten times as long."""
    lateness = statistics.fmean(visit.lateness_seconds for visit in run.urgent + run.others if visit.served)
    assert run.figures.wait_seconds_mean < 3 * run.figures.ideal_wait_seconds_mean + 0.05 + 20 * lateness


def test_the_others_wait_longer_or_are_refused(run: Run) -> None:
    assert {visit.status for visit in run.others} == {200, 503}
    assert statistics.median(_waits(run.others)) > statistics.median(_waits(run.urgent))


def _waits(visits: Iterable[Visit]) -> list[float]:
    return [visit.queue_seconds for visit in visits if visit.status == 200]


def test_the_rest_of_the_capacity_is_theirs(run: Run) -> None:
    assert run.figures.others_served > 0.5 * run.figures.ideal_others_served
    assert run.figures.busy_share > 0.5


def test_the_slots_are_used_and_never_exceeded(run: Run) -> None:
    assert run.at_once_max == POOL.slots


def test_the_starts_are_the_ideal_pools(run: Run) -> None:
    """With the arrivals that the proxy saw, and the slots held for as long as it held them: the same, one by one."""
    arrived: dict[ScheduledRequest, float] = {}
    started: dict[ScheduledRequest, float] = {}
    held: dict[ScheduledRequest, float] = {}
    for event in run.events:
        assert isinstance(event, Queued | Started | Ended)
        arrived.setdefault(event.request, event.at)
        if isinstance(event, Started):
            started[event.request] = event.at
        elif isinstance(event, Ended) and event.started:
            held[event.request] = event.at - started[event.request]
    requests = sorted(arrived, key=lambda request: arrived[request])
    arrivals = [
        Arrival(at=arrived[request], priority=request.priority, service_seconds=held.get(request, SERVICE_SECONDS))
        for request in requests
    ]
    ideal = {requests[step.customer]: step.at for step in simulate(POOL, arrivals) if step.what == "started"}
    assert list(started) == list(ideal)
    assert list(started.values()) == pytest.approx(list(ideal.values()), abs=1e-6)


def test_every_start_is_the_right_one_at_once(run: Run) -> None:
    """Whoever starts is the first in order, and a slot that comes free is given away before anything else happens."""
    waiting: list[ScheduledRequest] = []
    running: set[ScheduledRequest] = set()
    given_back = False
    for event in run.events:
        assert isinstance(event, Queued | Started | Ended)
        request = event.request
        if given_back and waiting:
            assert isinstance(event, Started)
        given_back = isinstance(event, Ended) and event.started
        match event:
            case Queued():
                assert len(running) == POOL.slots
                waiting.append(request)
                assert len(waiting) <= POOL.places
            case Started(was_queued=was_queued):
                assert was_queued == bool(waiting)
                if was_queued:
                    assert request is max(waiting, key=lambda other: other.priority), "of equals the first is found"
                    waiting.remove(request)
                running.add(request)
                assert len(running) <= POOL.slots
            case Ended(started=True):
                running.remove(request)
            case Ended():
                assert len(waiting) >= POOL.places, "only a full queue refuses"
                if request in waiting:
                    waiting.remove(request)
    assert not waiting
    assert not running
