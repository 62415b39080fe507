"""How many may run, how the rate at which slots come free is learnt, and how the refused are told to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioproxy import errors
from trioproxy.errors import RETRY_SECONDS_MAX
from trioproxy.scheduler.limits import FixedLimit, Limit, ReleaseRate, ReturnLine

UNMEASURED = ReleaseRate.UNMEASURED_SECONDS


def rate_of(*held_seconds: float) -> ReleaseRate:
    """A rate that has seen slots being held for so long, one after the other."""
    rate = ReleaseRate()
    for seconds in held_seconds:
        rate.released(seconds)
    return rate


def mean_of(rate: ReleaseRate) -> float:
    """The holding time that a rate supposes: what one slot takes for one release."""
    return rate.seconds_until(1, 1, 0.0)


@pytest.mark.parametrize("permits", [1, 2, 10_000])
def test_a_fixed_limit_is_what_was_said(permits: int) -> None:
    limit: Limit = FixedLimit(permits)
    assert limit.permits == permits
    assert repr(limit) == f"<FixedLimit {permits}>"


@pytest.mark.parametrize("permits", [0, -1, -100])
def test_a_fixed_limit_is_at_least_one(permits: int) -> None:
    with pytest.raises(ValueError, match=f"{permits} permits.*at least 1"):
        FixedLimit(permits)
    limit = FixedLimit(3)
    with pytest.raises(ValueError, match=f"{permits} permits.*at least 1"):
        limit.permits = permits
    assert limit.permits == 3, "a refused value changes nothing"


def test_a_fixed_limit_can_be_set_again() -> None:
    limit = FixedLimit(3)
    limit.permits = 1
    assert limit.permits == 1


@pytest.mark.parametrize("ending", [errors.COMPLETED, errors.UPSTREAM_REFUSED, errors.CANCELLED])
def test_a_fixed_limit_learns_nothing(ending: errors.Ending) -> None:
    limit = FixedLimit(3)
    for _ in range(100):
        limit.released(1e6, ending)
    assert limit.permits == 3


@pytest.mark.parametrize(
    ("releases", "permits", "seconds"),
    [(1, 1, 8.0), (1, 4, 2.0), (5, 1, 40.0), (5, 4, 10.0), (100, 8, 100.0), (0, 4, 0.0)],
)
def test_littles_law(releases: int, permits: int, seconds: float) -> None:
    """P slots, each held for S seconds, come free P / S times a second."""
    assert rate_of(8.0).seconds_until(releases, permits, 0.0) == seconds


def test_unmeasured_it_supposes_its_start_value() -> None:
    assert rate_of().seconds_until(6, 2, 0.0) == 6 * UNMEASURED / 2


@pytest.mark.parametrize(
    ("oldest_held_seconds", "supposed"), [(0.0, UNMEASURED), (UNMEASURED / 2, UNMEASURED), (25.0, 25.0), (600.0, 600.0)]
)
def test_unmeasured_the_longest_holder_is_the_best_evidence(oldest_held_seconds: float, supposed: float) -> None:
    assert rate_of().seconds_until(3, 2, oldest_held_seconds) == 3 * supposed / 2


@pytest.mark.parametrize("oldest_held_seconds", [0.0, 4.0, 10_000.0])
def test_once_measured_the_longest_holder_says_nothing_any_more(oldest_held_seconds: float) -> None:
    assert rate_of(4.0).seconds_until(3, 2, oldest_held_seconds) == 6.0


def test_the_first_measurement_replaces_the_start_value() -> None:
    assert mean_of(rate_of(30.0)) == 30.0
    assert mean_of(rate_of(0.001)) == pytest.approx(0.001)


@pytest.mark.parametrize("held", [(2.0, 4.0), (2.0, 4.0, 9.0), (1.0,) * 5 + (11.0,) * 5])
def test_the_first_few_count_alike(held: tuple[float, ...]) -> None:
    assert mean_of(rate_of(*held)) == pytest.approx(sum(held) / len(held))


def test_later_ones_have_a_fixed_weight() -> None:
    rate = rate_of(*[10.0] * 1000)
    rate.released(26.0)
    assert mean_of(rate) == pytest.approx(10.0 + 16.0 * ReleaseRate.WEIGHT)


@pytest.mark.parametrize(("before", "after"), [(1.0, 60.0), (60.0, 1.0)])
def test_it_follows_the_upstreams_mood_within_some_dozen_requests(before: float, after: float) -> None:
    rate = rate_of(*[before] * 500)
    distances = []
    for _ in range(48):
        rate.released(after)
        distances.append(abs(mean_of(rate) - after))
    assert distances == sorted(distances, reverse=True), "every measurement brings it nearer"
    assert distances[-1] < 0.05 * abs(before - after)


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=60))
def test_it_stays_between_the_shortest_and_the_longest(held: list[float]) -> None:
    assert min(held) * (1 - 1e-9) <= mean_of(rate_of(*held)) <= max(held) * (1 + 1e-9)


@given(st.floats(0.001, 1000), st.integers(1, 500))
def test_a_steady_upstream_is_known_exactly(held: float, count: int) -> None:
    assert mean_of(rate_of(*[held] * count)) == pytest.approx(held)


def told(line: ReturnLine, *refusals_at: float, wait_seconds: float = 5.0, release_seconds: float = 0.5) -> list[float]:
    """What those who are refused at these times are told."""
    seconds = []
    for now in refusals_at:
        line.join(now, wait_seconds, release_seconds)
        seconds.append(line.seconds(now))
    return seconds


def test_the_refused_return_one_for_each_release() -> None:
    assert told(ReturnLine(), 100.0, 100.0, 100.0, 100.25, 101.0) == [5.0, 5.5, 6.0, 6.25, 6.0]


def test_nobody_returns_before_the_queue_is_through() -> None:
    assert told(ReturnLine(), 100.0, 102.0, 3600.0) == [5.0, 5.0, 5.0]


def test_nobody_is_told_more_than_can_be_told() -> None:
    line = ReturnLine()
    assert max(told(line, *[100.0] * 1000)) == RETRY_SECONDS_MAX
    assert told(line, 130.0) == [30.5], "those who could not be told more have not made the line longer"
    assert told(ReturnLine(), 0.0, wait_seconds=1e6) == [RETRY_SECONDS_MAX]


def test_a_dissolved_line_begins_anew() -> None:
    line = ReturnLine()
    told(line, *[100.0] * 20)
    line.dissolve()
    assert line.seconds(100.0) < 0
    assert told(line, 100.0, 100.0) == [5.0, 5.5]


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 90), st.floats(0.001, 2)), min_size=2, max_size=60))
def test_no_two_return_within_one_release_unless_it_is_a_minute_away(
    refusals: list[tuple[float, float, float]],
) -> None:
    line = ReturnLine()
    now, before = 0.0, float("-inf")
    for passed, wait_seconds, release_seconds in refusals:
        now += passed
        (seconds,) = told(line, now, wait_seconds=wait_seconds, release_seconds=release_seconds)
        assert seconds >= min(wait_seconds, RETRY_SECONDS_MAX) - 1e-9
        assert seconds >= min(before + release_seconds - now, RETRY_SECONDS_MAX) - 1e-9
        before = now + seconds
