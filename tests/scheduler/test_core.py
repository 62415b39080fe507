"""Every rule of the contract's section 3, told to `Core` as a conversation: what is done -> what happens, in order.

Lines of a conversation:

    submit NAME PRIORITY [by TIME]      a newcomer, perhaps with a deadline of its own
    finish NAME [ENDING]                gives its slot back (ENDING: completed)
    leave NAME ENDING                   leaves the queue
    resize [permits=N] [max_queue=N]
    close
    wait SECONDS                        time passes; it starts at 0
    state                               who runs / who waits, each in order

Which of them is wrong is told by the line itself when a test fails.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from types import FrameType

import pytest

from trioproxy import errors, priority
from trioproxy.errors import Ending
from trioproxy.events import CapacityChanged, Ended, Progress, Queued, ScheduledRequest, Started
from trioproxy.scheduler.core import Core, SchedulingEvent, Snapshot
from trioproxy.scheduler.limits import FixedLimit

ENDING_BY_CODE = {ending.code: ending for ending in errors.ENDINGS}


def make_request(name: str, priority: int = 50, deadline: float = math.inf) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=name, method="POST", path="/v1/chat/completions", arrived=0.0, priority=priority, deadline=deadline
    )


def told(event: SchedulingEvent) -> str:
    """An event as conversations write it."""
    match event:
        case Queued(request):
            return f"{request.request_id} queued"
        case Started(request, was_queued=False, queue_seconds=0.0):
            return f"{request.request_id} started"
        case Started(request, was_queued=True, queue_seconds=waited):
            return f"{request.request_id} started after {waited:g}"
        case Ended(request, ending=ending, started=True, queue_seconds=float(waited)):
            return f"{request.request_id} {ending.code}, waited {waited:g}"
        case Ended(request, ending=ending, started=False, queue_seconds=None):
            return f"{request.request_id} refused {ending.code}"
        case Ended(request, ending=ending, started=False, queue_seconds=float(waited)):
            return f"{request.request_id} left {ending.code} after {waited:g}"
        case CapacityChanged(pool="default", permits=permits, max_queue=max_queue):
            return f"capacity {permits}/{max_queue}"
    raise AssertionError(f"{event} contradicts itself")


class Conversation:
    """A pool, its clock and its requests, driven by lines of text."""

    def __init__(self, permits: int, max_queue: int) -> None:
        self.limit = FixedLimit(permits)
        self.core = Core(self.limit, max_queue)
        self.now = 0.0
        self.requests: dict[str, ScheduledRequest] = {}

    def hold(self, script: str) -> None:
        """Do what each line says and compare what happens."""
        for line in filter(None, map(str.strip, script.splitlines())):
            command, _, expected = line.partition("->")
            assert f"{command.strip()} -> {self.answer(command)}" == f"{command.strip()} -> {expected.strip()}"

    def answer(self, command: str) -> str:
        """What happens upon one command, as text."""
        word, *arguments = command.split()
        if word == "state":
            snapshot = self.core.snapshot()
            sides = (snapshot.running, snapshot.queued)
            return " / ".join(" ".join(request.request_id for request, _ in side) for side in sides).strip()
        if word == "wait":
            self.now += float(arguments[0])
            return ""
        try:
            events = self.events(word, arguments)
        except KeyError:
            return "KeyError"
        assert all(event.at == self.now for event in events)
        return "; ".join(map(told, events))

    def events(self, word: str, arguments: list[str]) -> list[SchedulingEvent]:
        """Do it."""
        match word, arguments:
            case "submit", [name, urgency]:
                self.requests[name] = make_request(name, int(urgency))
                return self.core.submit(self.requests[name], self.now)
            case "submit", [name, urgency, "by", deadline]:
                self.requests[name] = make_request(name, int(urgency), float(deadline))
                return self.core.submit(self.requests[name], self.now)
            case "finish", [name]:
                return self.core.finish(self.requests[name], self.now, errors.COMPLETED)
            case "finish", [name, code]:
                return self.core.finish(self.requests[name], self.now, ENDING_BY_CODE[code])
            case "leave", [name, code]:
                return self.core.leave(self.requests[name], self.now, ENDING_BY_CODE[code])
            case "close", []:
                self.core.close()
                return []
            case "resize", _:
                numbers = {key: int(value) for key, _, value in (argument.partition("=") for argument in arguments)}
                self.limit.permits = numbers.get("permits", self.limit.permits)
                return self.core.resize(self.now, numbers.get("max_queue"))
        raise AssertionError(f"nobody understands {word} {arguments}")


CONVERSATIONS: dict[str, tuple[int, int, str]] = {
    "a free slot and nothing queued: start at once": (
        2,
        5,
        """
        submit a 50     -> a started
        submit b 0      -> b started
        submit c 100    -> c queued
        state           -> a b / c
        """,
    ),
    "the queue's order is priority": (
        1,
        5,
        """
        submit a 50     -> a started
        submit low 30   -> low queued
        submit top 100  -> top queued
        submit mid 50   -> mid queued
        submit zero 0   -> zero queued
        state           -> a / top mid low zero
        wait 1          ->
        finish a        -> a completed, waited 0; top started after 1
        finish top      -> top completed, waited 1; mid started after 1
        wait 2          ->
        finish mid      -> mid completed, waited 1; low started after 3
        finish low      -> low completed, waited 3; zero started after 3
        finish zero     -> zero completed, waited 3
        state           -> /
        """,
    ),
    "within a priority first in, first out": (
        1,
        5,
        """
        submit a 50     -> a started
        submit b 50     -> b queued
        submit c 50     -> c queued
        submit d 50     -> d queued
        finish a        -> a completed, waited 0; b started after 0
        submit e 50     -> e queued
        state           -> b / c d e
        """,
    ),
    "priorities of one level are not alike": (
        1,
        5,
        """
        submit a 50     -> a started
        submit b 40     -> b queued
        submit c 59     -> c queued
        submit d 41     -> d queued
        state           -> a / c d b
        """,
    ),
    "what runs is never displaced": (
        1,
        1,
        """
        submit a 0      -> a started
        submit b 100    -> b queued
        submit c 100    -> c refused queue_full
        state           -> a / b
        """,
    ),
    "a queue with room evicts nobody": (
        1,
        2,
        """
        submit a 50     -> a started
        submit b 0      -> b queued
        submit c 100    -> c queued
        state           -> a / c b
        """,
    ),
    "eviction by a strictly higher priority": (
        1,
        2,
        """
        submit a 50     -> a started
        submit b 30     -> b queued
        submit c 60     -> c queued
        wait 4          ->
        submit d 31     -> b left evicted after 4; d queued
        state           -> a / c d
        """,
    ),
    "an equal is rejected": (
        1,
        2,
        """
        submit a 50     -> a started
        submit b 30     -> b queued
        submit c 60     -> c queued
        submit d 30     -> d refused queue_full
        submit e 29     -> e refused queue_full
        state           -> a / c b
        """,
    ),
    "the youngest of the lowest is evicted": (
        1,
        4,
        """
        submit a 50     -> a started
        submit b 20     -> b queued
        submit c 10     -> c queued
        submit d 10     -> d queued
        submit e 30     -> e queued
        wait 1          ->
        submit f 11     -> d left evicted after 1; f queued
        submit g 90     -> c left evicted after 1; g queued
        submit h 90     -> f left evicted after 0; h queued
        submit i 90     -> b left evicted after 1; i queued
        submit j 90     -> e left evicted after 1; j queued
        submit k 90     -> k refused queue_full
        state           -> a / g h i j
        """,
    ),
    "an evicted place is taken in order, not inherited": (
        1,
        2,
        """
        submit a 50     -> a started
        submit b 60     -> b queued
        submit c 10     -> c queued
        submit d 90     -> c left evicted after 0; d queued
        finish a        -> a completed, waited 0; d started after 0
        """,
    ),
    "max_queue 0: a slot or a rejection": (
        1,
        0,
        """
        submit a 0      -> a started
        submit b 100    -> b refused queue_full
        finish a        -> a completed, waited 0
        submit c 0      -> c started
        submit d 0      -> d refused queue_full
        """,
    ),
    "a release starts the first in order, whatever the ending": (
        2,
        5,
        """
        submit a 50                 -> a started
        submit b 50                 -> b started
        submit c 50                 -> c queued
        submit d 50                 -> d queued
        wait 3                      ->
        finish b upstream_refused   -> b upstream_refused, waited 0; c started after 3
        state                       -> a c / d
        finish a cancelled          -> a cancelled, waited 0; d started after 3
        finish d internal_error     -> d internal_error, waited 3
        finish c upstream_timeout   -> c upstream_timeout, waited 3
        state                       -> /
        """,
    ),
    "a release with nobody waiting frees the slot for the next newcomer": (
        1,
        5,
        """
        submit a 50     -> a started
        finish a        -> a completed, waited 0
        submit b 50     -> b started
        """,
    ),
    "leaving from the middle, the front and the end": (
        1,
        5,
        """
        submit a 50                 -> a started
        submit b 50                 -> b queued
        submit c 50                 -> c queued
        submit d 50                 -> d queued
        submit e 50                 -> e queued
        wait 2                      ->
        leave c queue_timeout       -> c left queue_timeout after 2
        state                       -> a / b d e
        leave b cancelled           -> b left cancelled after 2
        leave e deadline_exceeded   -> e left deadline_exceeded after 2
        state                       -> a / d
        finish a                    -> a completed, waited 0; d started after 2
        """,
    ),
    "who left makes room": (
        1,
        1,
        """
        submit a 50         -> a started
        submit b 50         -> b queued
        leave b cancelled   -> b left cancelled after 0
        submit c 10         -> c queued
        """,
    ),
    "a deadline that has passed is no request any more": (
        1,
        1,
        """
        wait 5              ->
        submit a 50 by 5    -> a refused deadline_exceeded
        submit b 50 by 4    -> b refused deadline_exceeded
        submit c 50 by 6    -> c started
        submit d 50 by 6    -> d queued
        submit e 90 by 5    -> e refused deadline_exceeded
        state               -> c / d
        """,
    ),
    "closed: newcomers are turned away, who runs or waits goes on": (
        1,
        2,
        """
        submit a 50         -> a started
        submit b 50         -> b queued
        close               ->
        submit c 100        -> c refused shutting_down
        state               -> a / b
        finish a            -> a completed, waited 0; b started after 0
        finish b            -> b completed, waited 0
        submit d 100        -> d refused shutting_down
        submit e 100 by -1  -> e refused shutting_down
        close               ->
        state               -> /
        """,
    ),
    "more slots start the waiting, in order": (
        1,
        5,
        """
        submit a 50         -> a started
        submit b 10         -> b queued
        submit c 50         -> c queued
        submit d 50         -> d queued
        wait 2              ->
        resize permits=3    -> capacity 3/5; c started after 2; d started after 2
        state               -> a c d / b
        resize permits=9    -> capacity 9/5; b started after 2
        submit e 0          -> e started
        """,
    ),
    "fewer slots drain: nobody loses one, nobody starts until below": (
        3,
        5,
        """
        submit a 50         -> a started
        submit b 50         -> b started
        submit c 50         -> c started
        submit d 50         -> d queued
        resize permits=1    -> capacity 1/5
        state               -> a b c / d
        submit e 90         -> e queued
        finish b            -> b completed, waited 0
        finish a            -> a completed, waited 0
        state               -> c / e d
        finish c            -> c completed, waited 0; e started after 0
        state               -> e / d
        """,
    ),
    "raised again while it drains": (
        3,
        5,
        """
        submit a 50         -> a started
        submit b 50         -> b started
        submit c 50         -> c started
        submit d 50         -> d queued
        submit e 50         -> e queued
        resize permits=1    -> capacity 1/5
        resize permits=3    -> capacity 3/5
        resize permits=4    -> capacity 4/5; d started after 0
        """,
    ),
    "fewer places drain: nobody loses one, nobody joins until below": (
        1,
        4,
        """
        submit a 50         -> a started
        submit b 50         -> b queued
        submit c 40         -> c queued
        submit d 50         -> d queued
        submit e 50         -> e queued
        resize max_queue=2  -> capacity 1/2
        state               -> a / b d e c
        submit f 40         -> f refused queue_full
        submit g 41         -> c left evicted after 0; g queued
        finish a            -> a completed, waited 0; b started after 0
        finish b            -> b completed, waited 0; d started after 0
        state               -> d / e g
        submit h 41         -> h refused queue_full
        finish d            -> d completed, waited 0; e started after 0
        submit i 0          -> i queued
        """,
    ),
    "more places take newcomers": (
        1,
        0,
        """
        submit a 50         -> a started
        submit b 50         -> b refused queue_full
        resize max_queue=1  -> capacity 1/1
        submit c 50         -> c queued
        submit d 50         -> d refused queue_full
        """,
    ),
    "a resize to the same is told and starts nobody": (
        1,
        1,
        """
        submit a 50     -> a started
        submit b 50     -> b queued
        resize          -> capacity 1/1
        state           -> a / b
        """,
    ),
    "only what runs can finish": (
        1,
        2,
        """
        submit a 50         -> a started
        submit b 50         -> b queued
        finish b            -> KeyError
        leave b cancelled   -> b left cancelled after 0
        finish b            -> KeyError
        submit c 50 by 0    -> c refused deadline_exceeded
        finish c            -> KeyError
        finish a            -> a completed, waited 0
        finish a            -> KeyError
        state               -> /
        """,
    ),
    "only what waits can leave": (
        1,
        1,
        """
        submit a 50         -> a started
        leave a cancelled   -> KeyError
        submit b 50         -> b queued
        submit c 50         -> c refused queue_full
        leave c cancelled   -> KeyError
        submit d 90         -> b left evicted after 0; d queued
        leave b evicted     -> KeyError
        leave d cancelled   -> d left cancelled after 0
        leave d cancelled   -> KeyError
        state               -> a /
        """,
    ),
}


@pytest.mark.parametrize("rule", CONVERSATIONS)
def test_rule(rule: str) -> None:
    permits, max_queue, script = CONVERSATIONS[rule]
    Conversation(permits, max_queue).hold(script)


def test_a_queue_lowered_to_nothing_takes_nobody_even_while_it_drains() -> None:
    Conversation(1, 1).hold(
        """
        submit a 50         -> a started
        submit b 10         -> b queued
        resize max_queue=0  -> capacity 1/0
        submit c 90         -> c refused queue_full
        state               -> a / b
        """
    )


@pytest.mark.parametrize("place", [0, 1], ids=["running", "queued"])
def test_what_is_there_already_cannot_be_submitted(place: int) -> None:
    core = Core(FixedLimit(2 - place), max_queue=5)
    if place:
        core.submit(make_request("holder"), 0.0)
    request = make_request("twice")
    core.submit(request, 0.0)
    with pytest.raises(KeyError):
        core.submit(request, 1.0)


def test_requests_with_the_same_id_are_two() -> None:
    core = Core(FixedLimit(1), max_queue=5)
    one, two = make_request("same"), make_request("same")
    core.submit(one, 0.0)
    core.submit(two, 0.0)
    with pytest.raises(KeyError):
        core.finish(two, 1.0, errors.COMPLETED)
    assert core.finish(one, 1.0, errors.COMPLETED)[1:] == [Started(two, 1.0, 1.0, was_queued=True)]


def test_what_serving_came_to_goes_with_the_end() -> None:
    core = Core(FixedLimit(1), max_queue=0)
    request = make_request("a")
    progress = Progress(http_status=200, bytes_out=7)
    core.submit(request, 2.0)
    (ended,) = core.finish(request, 5.0, errors.COMPLETED, progress)
    assert ended == Ended(request, 5.0, errors.COMPLETED, 0.0, started=True, progress=progress)
    assert isinstance(ended, Ended)
    assert ended.progress is progress
    assert ended.total_seconds == 5.0


@pytest.mark.parametrize("max_queue", [-1, -100])
def test_there_is_no_negative_queue(max_queue: int) -> None:
    limit = FixedLimit(1)
    core = Core(limit, max_queue=3)
    with pytest.raises(ValueError, match=f"max_queue is {max_queue}"):
        core.resize(0.0, max_queue)
    assert core.max_queue == 3


def test_snapshot_says_all() -> None:
    core = Core(FixedLimit(2), max_queue=9, pool="gpu")
    priorities = {"a": 50, "b": 50, "c": 0, "d": 19, "e": 20, "f": 59, "g": 60, "h": 100, "i": 80}
    requests = {name: make_request(name, urgency) for name, urgency in priorities.items()}
    for number, request in enumerate(requests.values()):
        core.submit(request, float(number))
    expected = Snapshot(
        pool="gpu",
        accepting=True,
        permits=2,
        max_queue=9,
        running=((requests["a"], 0.0), (requests["b"], 1.0)),
        queued=tuple((requests[name], float("abcdefghi".index(name))) for name in "higfedc"),
    )
    assert core.snapshot() == expected
    assert expected.queued_by_level == {"very_low": 2, "low": 1, "normal": 1, "high": 1, "critical": 2}
    assert expected.available_permits == 0
    assert (core.queued, core.max_queue, core.accepting) == (7, 9, True)
    core.finish(requests["a"], 20.0, errors.COMPLETED)
    core.close()
    assert core.snapshot().running == ((requests["b"], 1.0), (requests["h"], 20.0))
    assert not core.snapshot().accepting
    assert not core.accepting
    assert len(expected.running) + len(expected.queued) == 9, "a snapshot stays as it was"


def test_an_empty_pools_snapshot() -> None:
    snapshot = Core(FixedLimit(3), max_queue=4).snapshot()
    assert snapshot == Snapshot(pool="default", accepting=True, permits=3, max_queue=4, running=(), queued=())
    assert snapshot.available_permits == 3
    assert snapshot.queued_by_level == dict.fromkeys(priority.LEVELS, 0)


def test_available_permits_are_never_negative() -> None:
    limit = FixedLimit(3)
    core = Core(limit, max_queue=0)
    requests = [make_request(str(number)) for number in range(3)]
    available = [core.snapshot().available_permits]
    for request in requests:
        core.submit(request, 0.0)
        available.append(core.snapshot().available_permits)
    limit.permits = 1
    core.resize(0.0)
    available.append(core.snapshot().available_permits)
    for request in requests:
        core.finish(request, 0.0, errors.COMPLETED)
        available.append(core.snapshot().available_permits)
    assert available == [3, 2, 1, 0, 0, 0, 0, 1]


def test_repr_tells_the_state() -> None:
    core = Core(FixedLimit(2), max_queue=9, pool="gpu")
    assert repr(core) == "<Core 'gpu': 0 of 2 slots taken, 0 of 9 places taken>"
    for number in range(5):
        core.submit(make_request(str(number)), 0.0)
    core.close()
    assert repr(core) == "<Core 'gpu': 2 of 2 slots taken, 3 of 9 places taken, closed>"


class GrowingLimit:
    """Allows one more after each slot that comes back, and keeps what it was told."""

    def __init__(self) -> None:
        self.permits = 1
        self.told: list[tuple[float, Ending]] = []

    def released(self, held_seconds: float, ending: Ending) -> None:
        self.told.append((held_seconds, ending))
        self.permits += 1


def test_the_limit_learns_of_each_slot_before_the_next_starts() -> None:
    limit = GrowingLimit()
    core = Core(limit, max_queue=9)
    a, b, c, d = (make_request(name) for name in "abcd")
    for request in (a, b, c, d):
        core.submit(request, 1.0)
    core.leave(b, 2.0, errors.CANCELLED)
    assert limit.told == [], "only slots count"
    assert [told(event) for event in core.finish(a, 4.0, errors.UPSTREAM_REFUSED)] == [
        "a upstream_refused, waited 0",
        "c started after 3",
        "d started after 3",
    ]
    core.finish(c, 4.5, errors.COMPLETED)
    assert limit.told == [(3.0, errors.UPSTREAM_REFUSED), (0.5, errors.COMPLETED)]


def test_retry_after_is_how_long_the_queue_and_the_newcomer_take() -> None:
    core = Core(FixedLimit(2), max_queue=9)
    assert core.retry_after(1000.0) == 0.5, "unmeasured and idle: one second a slot, two slots"
    a, b, c, d = (make_request(name) for name in "abcd")
    for request, now in ((a, 100.0), (b, 105.0), (c, 106.0), (d, 107.0)):
        core.submit(request, now)
    assert core.retry_after(112.0) == 3 * 12.0 / 2, "the longest holder has had its slot for 12 s"
    core.finish(b, 113.0, errors.COMPLETED)
    assert core.retry_after(113.0) == core.retry_after(999.0) == 2 * 8.0 / 2, "a slot was held for 8 s"
    core.finish(a, 113.0, errors.COMPLETED)
    core.finish(c, 113.0, errors.COMPLETED)
    core.finish(d, 113.0, errors.COMPLETED)
    assert core.retry_after(113.0) == core.retry_after(10_000.0), "an idle night changes nothing"


def test_those_refused_at_once_are_told_one_after_the_other() -> None:
    core = Core(FixedLimit(2), max_queue=1)
    a, b, c, low, high, last = (make_request(*facts) for facts in zip("abcdef", (50, 50, 50, 20, 90, 50), strict=True))
    core.submit(a, 0.0)
    core.submit(b, 0.0)
    core.finish(a, 4.0, errors.COMPLETED)
    for request in (a, c):
        core.submit(request, 4.0)
    told = []
    for request in (low, high, last):  # rejected, in c's place, rejected
        core.submit(request, 5.0)
        told.append(core.retry_after(5.0))
    assert told == [4.0, 6.0, 8.0], "two slots, held for 4 s: a release every 2 s, and one request in the queue"
    assert core.retry_after(8.0) == 5.0
    assert core.retry_after(10.0) == 4.0, "three seconds are left, and the queue takes four"
    core.leave(high, 8.0, errors.CANCELLED)
    core.finish(b, 8.0, errors.COMPLETED)
    assert core.retry_after(8.0) == 5.0
    core.submit(last, 8.0)
    assert core.retry_after(8.0) == 3.0, "a slot was free, so nobody is waited for any more; they are held for 6 s now"


def test_a_refusal_for_other_reasons_makes_nobody_wait_longer() -> None:
    core = Core(FixedLimit(1), max_queue=1)
    core.submit(make_request("a"), 0.0)
    core.submit(make_request("b"), 0.0)
    before = core.retry_after(1.0)
    core.submit(make_request("late", deadline=0.5), 1.0)
    core.close()
    core.submit(make_request("closed"), 1.0)
    assert core.retry_after(1.0) == before


class WatchedRequest(ScheduledRequest):
    """A request at which nobody can look without being counted: each attribute, hash and comparison is a call."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> object:
        return object.__getattribute__(self, name)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def calls(action: Callable[[], object]) -> int:
    """How many functions, of Python's and of C's, are called."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.disable()  # its callbacks would be counted
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def calls_of_every_operation(queued: int, priorities: range) -> dict[str, int]:
    """What each operation costs with so many waiting."""

    def watched(priority: int) -> WatchedRequest:
        return WatchedRequest(request_id="x", method="POST", path="/v1/x", arrived=0.0, priority=priority)

    limit = FixedLimit(1)
    core = Core(limit, max_queue=queued)
    holder, lowest, middle, highest, urgent = (watched(number) for number in (50, priorities[0], 50, 99, 100))
    core.submit(holder, 0.0)
    line = [watched(priorities[index % len(priorities)]) for index in range(queued)]
    line[0], line[queued // 2], line[-1] = lowest, middle, highest
    for request in line:
        core.submit(request, 0.0)
    assert core.queued == queued

    def resize() -> None:
        limit.permits = 2
        core.resize(1.0)

    cost = {
        "submit, rejected": calls(lambda: core.submit(watched(0), 1.0)),
        "submit, evicting": calls(lambda: core.submit(urgent, 1.0)),
        "leave, first": calls(lambda: core.leave(urgent, 1.0, errors.CANCELLED)),
        "submit, queued": calls(lambda: core.submit(watched(50), 1.0)),
        "leave, middle": calls(lambda: core.leave(middle, 1.0, errors.CANCELLED)),
        "finish, starting another": calls(lambda: core.finish(holder, 1.0, errors.COMPLETED)),
        "resize, starting another": calls(resize),
        "retry_after": calls(lambda: core.retry_after(1.0)),
    }
    assert len(core.snapshot().running) == 2
    assert core.queued == queued - 3
    return cost


@pytest.mark.parametrize("priorities", [range(50, 51), range(1, 100)], ids=["all alike", "of all priorities"])
def test_nothing_takes_longer_with_50_000_waiting(priorities: range) -> None:
    few = calls_of_every_operation(10, priorities)
    many = calls_of_every_operation(50_000, priorities)
    tolerated = 2 * math.ceil(math.log2(50_000 / 10))
    assert {name: cost for name, cost in many.items() if cost > few[name] + tolerated} == {}
