"""The queue by itself: its order, joining, leaving from anywhere, both of its ends, the shares of client keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioproxy.events import ScheduledRequest
from trioproxy.scheduler.queue import Queue, ShareLimits


def make_request(name: str, priority: int, key: str | None = None) -> ScheduledRequest:
    return ScheduledRequest(request_id=name, method="POST", path="/v1/x", arrived=0.0, priority=priority, key=key)


def line_of(*priorities: int) -> tuple[Queue, list[ScheduledRequest]]:
    """A line that requests with these priorities have joined at 0, 1, 2, … seconds; they are named by that time."""
    line = Queue()
    requests = [make_request(str(index), priority) for index, priority in enumerate(priorities)]
    for index, request in enumerate(requests):
        line.join(request, float(index))
    return line, requests


def names(line: Queue) -> str:
    return " ".join(request.request_id for request, _ in line)


@pytest.mark.parametrize(
    ("priorities", "order"),
    [
        ((), ""),
        ((50,), "0"),
        ((50, 50, 50), "0 1 2"),
        ((10, 50, 90), "2 1 0"),
        ((90, 50, 10), "0 1 2"),
        ((50, 51, 50, 51), "1 3 0 2"),
        ((0, 100, 0, 100), "1 3 0 2"),
        ((59, 60, 58, 61), "3 1 0 2"),
    ],
)
def test_the_most_urgent_come_first_and_equals_in_order_of_arrival(priorities: tuple[int, ...], order: str) -> None:
    line, _ = line_of(*priorities)
    assert names(line) == order
    assert len(line) == len(priorities)


def test_it_tells_when_each_one_joined() -> None:
    line, (early, urgent) = line_of(10, 90)
    assert list(line) == [(urgent, 1.0), (early, 0.0)]
    assert line.leave(urgent) == 1.0
    assert line.leave(early) == 0.0


@pytest.mark.parametrize(
    ("priorities", "first", "youngest_of_lowest", "lowest_priority"),
    [
        ((50,), 0, 0, 50),
        ((50, 50, 50), 0, 2, 50),
        ((10, 50, 90), 2, 0, 10),
        ((10, 90, 10, 90), 1, 2, 10),
        ((0, 0, 100), 2, 1, 0),
        ((100, 100), 0, 1, 100),
        ((31, 30, 31, 30, 32), 4, 3, 30),
    ],
)
def test_both_ends(priorities: tuple[int, ...], first: int, youngest_of_lowest: int, lowest_priority: int) -> None:
    line, requests = line_of(*priorities)
    assert line.first() is requests[first]
    assert line.youngest_of_lowest() is requests[youngest_of_lowest]
    assert line.lowest_priority() == lowest_priority
    assert len(line) == len(priorities), "looking takes nobody out"


@pytest.mark.parametrize(
    ("leaver", "order"), [(0, "1 3 2 4"), (1, "3 0 2 4"), (2, "1 3 0 4"), (3, "1 0 2 4"), (4, "1 3 0 2")]
)
def test_anyone_may_leave_and_the_others_keep_their_order(leaver: int, order: str) -> None:
    line, requests = line_of(50, 90, 50, 90, 10)
    line.leave(requests[leaver])
    assert names(line) == order
    assert requests[leaver] not in line
    assert all(request in line for request in requests if request is not requests[leaver])


def test_an_emptied_priority_is_no_end_of_the_line_any_more() -> None:
    line, (high, low, middle) = line_of(90, 10, 50)
    line.leave(high)
    line.leave(low)
    assert line.first() is middle
    assert line.youngest_of_lowest() is middle
    assert line.lowest_priority() == 50
    line.join(low, 7.0)
    assert line.lowest_priority() == 10


def test_coming_back_is_coming_last() -> None:
    line, (first, _) = line_of(50, 50)
    line.leave(first)
    line.join(first, 9.0)
    assert names(line) == "1 0"


def test_who_does_not_wait_cannot_leave() -> None:
    line, (waiting, gone) = line_of(50, 50)
    line.leave(gone)
    for stranger in (gone, make_request("stranger", 50), make_request(waiting.request_id, 50), make_request("x", 7)):
        assert stranger not in line
        with pytest.raises(KeyError):
            line.leave(stranger)
        assert list(line) == [(waiting, 0.0)]
        assert line.first() is line.youngest_of_lowest() is waiting


def test_requests_with_the_same_id_are_two() -> None:
    line = Queue()
    one, two = make_request("same", 50), make_request("same", 50)
    line.join(one, 1.0)
    line.join(two, 2.0)
    assert len(line) == 2
    assert line.leave(two) == 2.0
    assert list(line) == [(one, 1.0)]


@given(st.lists(st.one_of(st.integers(0, 100), st.floats(0, 1, exclude_max=True)), max_size=60))
def test_it_agrees_with_a_sorted_list(steps: list[int | float]) -> None:
    """An integer is the priority of a newcomer; a share of 1 points at the one in the list who leaves."""
    line = Queue()
    waiting: list[tuple[ScheduledRequest, float]] = []
    for number, step in enumerate(steps):
        if isinstance(step, int):
            request = make_request(str(number), step)
            line.join(request, float(number))
            waiting.append((request, float(number)))
        elif waiting:
            leaver, since = waiting.pop(int(step * len(waiting)))
            assert line.leave(leaver) == since
        expected = sorted(waiting, key=lambda entry: (-entry[0].priority, entry[1]))
        assert list(line) == expected
        assert len(line) == len(expected)
        if expected:
            least = expected[-1][0].priority
            assert line.first() is expected[0][0]
            assert line.lowest_priority() == least
            assert line.youngest_of_lowest() is expected[-1][0]


ONE_AT_A_TIME = {"a": ShareLimits(max_concurrency=1), "b": ShareLimits(max_concurrency=1)}


def shared(*requests: tuple[str | None, int]) -> tuple[Queue, list[ScheduledRequest]]:
    """A queue in which the keys a and b have one slot each, and the requests that joined it, by key and priority."""
    queue = Queue()
    queue.set_limits(ONE_AT_A_TIME)
    joined = [make_request(str(index), priority, key) for index, (key, priority) in enumerate(requests)]
    for index, request in enumerate(joined):
        queue.join(request, float(index))
    return queue, joined


@pytest.mark.parametrize(
    ("requests", "busy", "first", "youngest_of_lowest"),
    [
        ([("a", 50), (None, 50), ("b", 50)], "", 0, 2),
        ([("a", 50), (None, 50), ("b", 50)], "a", 1, 2),
        ([(None, 50), ("a", 90), ("b", 70)], "", 1, 0),
        ([(None, 50), ("a", 90), ("b", 70)], "a", 2, 0),
        ([(None, 50), ("a", 90), ("b", 70)], "ab", 0, 0),
        ([("a", 90), ("a", 10), ("b", 10), (None, 20)], "ab", 3, 2),
        ([("a", 90), ("b", 10)], "ab", None, 1),
        ([("unknown", 90), ("a", 95)], "a", 0, 0),
    ],
)
def test_whose_key_has_no_slot_left_is_passed_over_but_not_spared(
    requests: list[tuple[str | None, int]], busy: str, first: int | None, youngest_of_lowest: int
) -> None:
    queue, joined = shared(*requests)
    for key in busy:
        queue.share_of(make_request("runs", 50, key)).running += 1
    assert queue.first() is (None if first is None else joined[first])
    assert queue.youngest_of_lowest() is joined[youngest_of_lowest]
    assert queue.lowest_priority() == joined[youngest_of_lowest].priority
    assert len(queue) == len(joined)
    assert all(request in queue for request in joined)


def test_other_limits_leave_everybody_in_place() -> None:
    queue, joined = shared(("a", 50), (None, 50), ("b", 50), ("a", 70), (None, 70))
    before = list(queue)
    for limits in ({}, {"b": ShareLimits(max_queue=0)}, ONE_AT_A_TIME):
        queue.set_limits(limits)
        assert list(queue) == before
        assert queue.first() is joined[3]
        assert queue.youngest_of_lowest() is joined[2]
    assert [queue.leave(request) for request in joined] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert not queue
    assert queue.first() is None
