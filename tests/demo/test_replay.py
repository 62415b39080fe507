"""First come, first served, on paper: small cases by hand, and rules that hold for all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioproxy.demo.replay import Arrival, Fate, Replayed, Rules, first_come_first_served

ONE_SLOT = Rules(slots=1, places=2)


def served(wait: float) -> Replayed:
    return Replayed(Fate.SERVED, wait)


def test_nobody_comes() -> None:
    assert first_come_first_served([], ONE_SLOT) == []


def test_they_are_served_in_order_of_arrival() -> None:
    arrivals = [Arrival(0, 3), Arrival(1, 1), Arrival(2, 5), Arrival(20, 1)]
    assert first_come_first_served(arrivals, ONE_SLOT) == [served(0), served(2), served(2), served(0)]


def test_each_slot_serves_one_at_a_time() -> None:
    arrivals = [Arrival(0, 4), Arrival(0, 2), Arrival(0, 2), Arrival(0, 1)]
    assert first_come_first_served(arrivals, Rules(slots=2, places=9)) == [served(0), served(0), served(2), served(4)]


def test_whoever_finds_the_queue_full_is_rejected_and_nobody_is_evicted() -> None:
    arrivals = [Arrival(0, 3), Arrival(1, 1), Arrival(1, 1), Arrival(2, 1)]
    assert first_come_first_served(arrivals, ONE_SLOT) == [served(0), served(2), served(3), Replayed(Fate.REJECTED, 0)]


def test_what_ends_in_the_moment_of_an_arrival_ends_before_it() -> None:
    assert first_come_first_served([Arrival(0, 1), Arrival(1, 1)], Rules(slots=1, places=0)) == [served(0), served(0)]


def test_whoever_has_waited_too_long_leaves_and_makes_room() -> None:
    rules = Rules(slots=1, places=1, queue_timeout=2)
    arrivals = [Arrival(0, 10), Arrival(1, 1), Arrival(3, 1), Arrival(9, 1)]
    timed_out = Replayed(Fate.TIMED_OUT, 2)
    assert first_come_first_served(arrivals, rules) == [served(0), timed_out, timed_out, served(1)]


def test_nobody_starts_after_the_record_ends() -> None:
    rules = Rules(slots=1, places=9, until=5)
    arrivals = [Arrival(0, 4), Arrival(1, 4), Arrival(2, 4)]
    assert first_come_first_served(arrivals, rules) == [served(0), served(3), Replayed(Fate.WAITING, 3)]


@given(
    gaps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=40),
    slots=st.integers(1, 4),
    places=st.integers(0, 5),
    queue_timeout=st.sampled_from([1.0, 7.0, math.inf]),
)
def test_rules_that_hold_for_all(gaps: list[tuple[int, int]], slots: int, places: int, queue_timeout: float) -> None:
    at = 0
    arrivals = []
    for gap, hold in gaps:
        at += gap
        arrivals.append(Arrival(at, hold))
    fates = first_come_first_served(arrivals, Rules(slots=slots, places=places, queue_timeout=queue_timeout))
    starts = [a.at + f.wait_seconds for a, f in zip(arrivals, fates, strict=True) if f.fate is Fate.SERVED]
    assert starts == sorted(starts)
    assert all(fate.wait_seconds <= queue_timeout for fate in fates)
    assert not [fate for fate in fates if fate.fate is Fate.WAITING]
    for arrival in arrivals:
        held = waiting = 0
        for other, fate in zip(arrivals, fates, strict=True):
            begin = other.at + fate.wait_seconds
            held += fate.fate is Fate.SERVED and begin <= arrival.at < begin + other.hold_seconds
            waiting += fate.fate is not Fate.REJECTED and other.at <= arrival.at < begin
        assert held <= slots
        assert waiting <= places


@pytest.mark.parametrize("places", [0, 3])
def test_without_load_nobody_waits(places: int) -> None:
    arrivals = [Arrival(2.0 * index, 1.9) for index in range(20)]
    assert set(first_come_first_served(arrivals, Rules(slots=1, places=places))) == {served(0)}
