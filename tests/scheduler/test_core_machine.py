"""`Core` and the reference model are told the same, at random, and must do the same; the books must always balance."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import Happening, ReferencePool

from trioproxy import errors, priority
from trioproxy.errors import Ending
from trioproxy.events import CapacityChanged, Ended, Queued, ScheduledRequest, Started
from trioproxy.scheduler.core import Core, SchedulingEvent
from trioproxy.scheduler.limits import FixedLimit
from trioproxy.scheduler.queue import ShareLimits

PRIORITIES = st.one_of(st.sampled_from([0, 19, 20, 49, 50, 51, 100]), st.integers(0, 100))
SECONDS = st.integers(0, 64).map(lambda eighths: eighths / 8)
"""Eighths are exact in binary: durations can be compared for equality."""
DEADLINES = st.one_of(st.just(math.inf), st.integers(-1, 40).map(lambda eighths: eighths / 8))
KEYS = st.sampled_from([None, None, "a", "a", "b", "c"])
"""None and c never have limits."""
SHARES = st.dictionaries(
    st.sampled_from(["a", "b"]), st.tuples(st.none() | st.integers(1, 3), st.none() | st.integers(0, 3)), max_size=2
)
"""How many slots and places some keys may have."""
ENDINGS_IN_QUEUE = st.sampled_from([errors.CANCELLED, errors.QUEUE_TIMEOUT, errors.DEADLINE_EXCEEDED])
ENDINGS_OF_RUNNING = st.sampled_from([errors.COMPLETED, errors.UPSTREAM_REFUSED, errors.CANCELLED])

LIVES = {"E", "S", "SE", "Q", "QE", "QS", "QSE"}
"""What one request's events may be, so far: Queued, Started, Ended."""


def happening(event: SchedulingEvent) -> Happening:
    """An event in the reference's words."""
    match event:
        case Queued(request, at):
            return Happening("queued", request.request_id, at)
        case Started(request, at, waited, was_queued):
            return Happening("started", request.request_id, at, waited=waited, was_queued=was_queued)
        case Ended(request, at, ending, waited, started):
            return Happening("ended", request.request_id, at, ending=ending.code, waited=waited, ran=started)
        case CapacityChanged(_, at, permits, max_queue):
            return Happening("capacity", None, at, permits=permits, max_queue=max_queue)


class CoreMachine(RuleBasedStateMachine):
    """One pool, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.limit = FixedLimit(1)
        self.core = Core(self.limit, 0)
        self.reference = ReferencePool(1, 0)
        self.requests: dict[str, ScheduledRequest] = {}
        self.lives: dict[ScheduledRequest, str] = {}
        self.queued_by_level = dict.fromkeys(priority.LEVELS, 0)
        self.in_use = 0
        self.permits = 1
        self.endings = Counter[str]()
        self.in_use_before = 0

    @initialize(permits=st.integers(1, 4), max_queue=st.integers(0, 5), shares=SHARES)
    def start(self, permits: int, max_queue: int, shares: dict[str, tuple[int | None, int | None]]) -> None:
        self.limit = FixedLimit(permits)
        self.core = Core(self.limit, max_queue)
        self.reference = ReferencePool(permits, max_queue)
        self.permits = permits
        self.share(shares)

    def compare(self, events: list[SchedulingEvent], expected: list[Happening]) -> None:
        """Both say the same; then the events go into the books, as a listener would keep them."""
        assert [happening(event) for event in events] == expected
        for event in events:
            match event:
                case Queued(request):
                    self.live(request, "Q")
                    self.queued_by_level[request.priority_level] += 1
                case Started(request, was_queued=was_queued):
                    self.live(request, "S")
                    self.queued_by_level[request.priority_level] -= was_queued
                    self.in_use += 1
                case Ended(request, ending=ending, queue_seconds=queue_seconds, started=started):
                    self.live(request, "E")
                    self.endings[ending.code] += 1
                    self.in_use -= started
                    self.queued_by_level[request.priority_level] -= not started and queue_seconds is not None
                case CapacityChanged(permits=permits):
                    self.permits = permits

    def live(self, request: ScheduledRequest, letter: str) -> None:
        life = self.lives.get(request, "") + letter
        assert life in LIVES, f"{request.request_id}: {life}"
        self.lives[request] = life

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(urgency=PRIORITIES, seconds_left=DEADLINES, key=KEYS)
    def submit(self, urgency: int, seconds_left: float, key: str | None) -> None:
        self.submit_one(urgency, self.now + seconds_left, key)

    @precondition(lambda self: self.reference.queued())
    @rule(difference=st.integers(-1, 1), key=KEYS)
    def submit_one_about_as_urgent_as_the_least(self, difference: int, key: str | None) -> None:
        self.submit_one(min(max(self.reference.queued()[-1]["priority"] + difference, 0), 100), math.inf, key)

    @rule(urgency=PRIORITIES, key=KEYS)
    def submit_until_the_queue_is_full(self, urgency: int, key: str | None) -> None:
        for _ in range(self.limit.permits + self.core.max_queue):
            self.submit_one(urgency, math.inf, key)

    def submit_one(self, urgency: int, deadline: float, key: str | None) -> None:
        name = f"r{len(self.requests)}"
        request = ScheduledRequest(
            request_id=name,
            method="POST",
            path="/v1/x",
            arrived=self.now,
            priority=urgency,
            deadline=deadline,
            key=key,
        )
        self.requests[name] = request
        events = self.core.submit(request, self.now)
        last = events[-1]
        assert not isinstance(last, CapacityChanged)
        assert last.request is request, "the last event is the newcomer's own"
        self.compare(events, self.reference.submit(name, urgency, deadline, self.now, key))

    @precondition(lambda self: self.reference.running())
    @rule(data=st.data(), ending=ENDINGS_OF_RUNNING)
    def finish(self, data: st.DataObject, ending: Ending) -> None:
        name = data.draw(st.sampled_from([entry["name"] for entry in self.reference.running()]), "who")
        events = self.core.finish(self.requests[name], self.now, ending)
        self.compare(events, self.reference.finish(name, ending.code, self.now))

    @precondition(lambda self: self.reference.queued())
    @rule(data=st.data(), ending=ENDINGS_IN_QUEUE)
    def leave(self, data: st.DataObject, ending: Ending) -> None:
        name = data.draw(st.sampled_from([entry["name"] for entry in self.reference.queued()]), "who")
        events = self.core.leave(self.requests[name], self.now, ending)
        self.compare(events, self.reference.leave(name, ending.code, self.now))

    @precondition(lambda self: any(request.deadline < math.inf for request, _ in self.core.snapshot().queued))
    @rule()
    def the_next_deadline_passes(self) -> None:
        due = min((request for request, _ in self.core.snapshot().queued), key=lambda request: request.deadline)
        self.now = max(self.now, due.deadline)
        events = self.core.leave(due, self.now, errors.DEADLINE_EXCEEDED)
        self.compare(events, self.reference.leave(due.request_id, "deadline_exceeded", self.now))

    @rule(permits=st.none() | st.integers(1, 6), max_queue=st.none() | st.integers(0, 6))
    def resize(self, permits: int | None, max_queue: int | None) -> None:
        if permits is not None:
            self.limit.permits = permits
        self.compare(self.core.resize(self.now, max_queue), self.reference.resize(permits, max_queue, self.now))

    @rule(shares=SHARES)
    def share(self, shares: dict[str, tuple[int | None, int | None]]) -> None:
        limits = {key: ShareLimits(max_concurrency=slots, max_queue=places) for key, (slots, places) in shares.items()}
        self.compare(
            self.core.set_shares(self.now, limits),
            self.reference.share(dict(shares.items()), self.now),
        )

    @rule(max_queue=st.integers(-3, -1))
    def resize_to_the_impossible(self, max_queue: int) -> None:
        with pytest.raises(ValueError):
            self.core.resize(self.now, max_queue)

    @precondition(lambda self: len(self.requests) > 8)
    @rule()
    def close(self) -> None:
        self.core.close()
        self.reference.close()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def call_what_is_not_allowed(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)), "who")
        if name not in {entry["name"] for entry in self.reference.running()}:
            with pytest.raises(KeyError):
                self.core.finish(self.requests[name], self.now, errors.COMPLETED)
        if name not in {entry["name"] for entry in self.reference.queued()}:
            with pytest.raises(KeyError):
                self.core.leave(self.requests[name], self.now, errors.CANCELLED)
        if name not in {entry["name"] for entry in self.reference.ended()}:
            with pytest.raises(KeyError):
                self.core.submit(self.requests[name], self.now)

    @invariant()
    def both_know_the_same(self) -> None:
        snapshot = self.core.snapshot()
        assert [(request.request_id, at) for request, at in snapshot.running] == [
            (entry["name"], entry["started_at"]) for entry in self.reference.running()
        ]
        assert [(request.request_id, at) for request, at in snapshot.queued] == [
            (entry["name"], entry["asked_at"]) for entry in self.reference.queued()
        ]
        assert (snapshot.accepting, snapshot.permits, snapshot.max_queue) == (
            self.reference.accepting,
            self.reference.permits,
            self.reference.max_queue,
        )

    @invariant()
    def permits_are_never_exceeded_but_while_draining(self) -> None:
        in_use = len(self.core.snapshot().running)
        assert in_use <= max(self.limit.permits, self.in_use_before)
        self.in_use_before = in_use

    @invariant()
    def with_a_free_slot_nobody_waits_whose_key_has_one_left(self) -> None:
        assert self.core.startable == bool(self.reference.startable())
        assert not (self.core.snapshot().available_permits and self.core.startable)

    @invariant()
    def the_shares_are_counted(self) -> None:
        for request in self.requests.values():
            state = self.core.share(request)
            if request.key in self.reference.shares:
                assert state.running == sum(entry["key"] == request.key for entry in self.reference.running())
                assert state.waiting == sum(entry["key"] == request.key for entry in self.reference.queued())

    @invariant()
    def gauges_kept_from_events_agree(self) -> None:
        snapshot = self.core.snapshot()
        assert self.queued_by_level == snapshot.queued_by_level
        assert sum(self.queued_by_level.values()) == self.core.queued == len(snapshot.queued)
        assert self.in_use == len(snapshot.running)
        assert self.permits == snapshot.permits
        assert max(self.permits - self.in_use, 0) == snapshot.available_permits

    @invariant()
    def every_request_is_in_exactly_one_place(self) -> None:
        snapshot = self.core.snapshot()
        running = {request for request, _ in snapshot.running}
        queued = {request for request, _ in snapshot.queued}
        for request in self.requests.values():
            ends_so_far = self.lives[request].count("E")
            assert (request in running) + (request in queued) + ends_so_far == 1
        assert len(self.requests) == self.endings.total() + len(snapshot.queued) + len(snapshot.running)
        assert self.endings.total() == len(self.reference.ended())

    def teardown(self) -> None:
        """Whatever was done: in the end everybody comes to the end, and the pool is as new."""
        while running := self.reference.running():
            name = running[0]["name"]
            events = self.core.finish(self.requests[name], self.now, errors.COMPLETED)
            self.compare(events, self.reference.finish(name, "completed", self.now))
        snapshot = self.core.snapshot()
        assert snapshot.running == snapshot.queued == ()
        assert snapshot.available_permits == self.limit.permits
        assert all(life.endswith("E") for life in self.lives.values())
        assert self.endings.total() == len(self.requests)


TestCoreAgainstReference = CoreMachine.TestCase
TestCoreAgainstReference.settings = settings(
    max_examples=250,
    stateful_step_count=30,
    deadline=None,
    report_multiple_bugs=False,
    phases=[phase for phase in Phase if phase is not Phase.explain],  # it takes minutes
)
