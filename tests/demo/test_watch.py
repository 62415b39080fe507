"""What the demo counts and notes, from made-up events."""

from __future__ import annotations

import math

import pytest

from happened import by_hand, ended, queued, request, started
from trioproxy import errors
from trioproxy.demo import watch as watching
from trioproxy.demo.lines import notes, status_line
from trioproxy.demo.watch import Happening, Level, Waits, Watch, told_together
from trioproxy.errors import Status
from trioproxy.events import PassedThrough, Progress, RequestFacts


@pytest.fixture
def watch() -> Watch:
    return Watch(slots=4, places=12)


def level(watch: Watch, name: str, now: float = 10.0) -> Level:
    (found,) = (level for level in watch.view(now).levels if level.name == name)
    return found


def noted(watch: Watch) -> list[list[str]]:
    return [line.split() for line in notes(watch.view(10.0).happenings)]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0], 0.5, 3.0),
        ([3.0], 0.99, 3.0),
        ([2.0, 1.0], 0.5, 1.0),
        ([2.0, 1.0], 0.51, 2.0),
        ([2.0, 1.0], 0, 1.0),
        (list(map(float, range(1, 101))), 0.99, 99.0),
        (list(map(float, range(1, 102))), 0.99, 100.0),
        (list(map(float, range(1, 101))), 1, 100.0),
    ],
)
def test_a_percentile_is_the_smallest_value_that_enough_values_do_not_exceed(
    values: list[float], share: float, expected: float
) -> None:
    waits = Waits()
    for value in values:
        waits.add(value)
    assert waits.percentile(share) == expected
    assert len(waits) == len(values)


def test_there_is_no_percentile_of_nothing() -> None:
    assert math.isnan(Waits().percentile(0.5))


def test_it_counts_by_level_whatever_becomes_of_them(watch: Watch) -> None:
    waiting, running = queued(watch, request("low")), started(watch, request("low"), at=1.0)
    assert level(watch, "low") == Level("low", 1, 1, {}, 0, 0, 0)
    ended(watch, waiting, errors.EVICTED, waited=3.0)
    ended(watch, running, errors.COMPLETED, ran=True)
    ended(watch, request("low"), errors.QUEUE_FULL)
    seen = level(watch, "low")
    assert (seen.queued, seen.running, seen.sent, seen.refused) == (0, 0, 3, 2)
    assert seen.ended == {Status.EVICTED: 1, Status.COMPLETED: 1, Status.REJECTED: 1}
    # The evicted one's time in the queue counts, as in the proxy's own histogram; the rejected one had none.
    assert (seen.wait_p50, seen.wait_max) == (0.0, 3.0)
    assert level(watch, "high").sent == 0
    assert math.isnan(level(watch, "high").wait_p99)


def test_slots_keep_their_places(watch: Watch) -> None:
    first = started(watch, request("high", "chat.1"), at=1.0)
    started(watch, request("low", "reports.7"), at=2.0)
    ended(watch, first, errors.COMPLETED, at=3.0, ran=True)
    one, two, *others = watch.view(4.0).slots
    assert one is None
    assert two == watching.Holder("low", "reports.7", 2.0)
    assert others == [None, None]
    started(watch, by_hand("normal"), at=4.0)
    assert watch.view(4.5).slots[0] == watching.Holder("normal", "you", 0.5)


def test_an_eviction_names_both_sides_and_equal_happenings_share_a_line(watch: Watch) -> None:
    for _ in range(2):
        victim = queued(watch, request("very_low"))
        ended(watch, victim, errors.EVICTED)
        queued(watch, request("high"))
    ended(watch, request("low"), errors.QUEUE_FULL)
    assert noted(watch) == [["evicted", "2", "very_low", "by", "high"], ["rejected", "1", "low"]]


def test_it_is_noted_whom_a_critical_request_overtook(watch: Watch) -> None:
    for _ in range(3):
        queued(watch, request("normal"))
    urgent = queued(watch, request("critical"), 1.0)
    assert "queue 4/12 (1 critical, 3 normal)" in status_line(watch.view(1.0))
    started(watch, urgent, 1.25, 0.25)
    assert noted(watch) == [["overtook", "1", "critical", "past", "3", "others", "in", "0.25", "s"]]
    assert "slots 1/4  queue 3/12 (3 normal)" in status_line(watch.view(1.25))


def test_one_other_is_no_others(watch: Watch) -> None:
    queued(watch, request("normal"))
    started(watch, queued(watch, request("critical"), 1.0), 1.25, 0.25)
    assert noted(watch) == [["overtook", "1", "critical", "past", "1", "other", "in", "0.25", "s"]]


def test_other_ends_are_noted_with_their_reason(watch: Watch) -> None:
    ended(watch, request("high"), errors.QUEUE_TIMEOUT, waited=8.0)
    for ending in (
        errors.UPSTREAM_TIMEOUT,
        errors.DEADLINE_EXCEEDED,
        errors.CANCELLED,
        errors.UPSTREAM_BROKE_OFF,
        errors.UPSTREAM_REFUSED,
        errors.UPSTREAM_UNREACHABLE,
        errors.COMPLETED,
    ):
        ended(watch, request("high", "chat.12"), ending, ran=True)
    ended(watch, request("low", "reports.2"), errors.CANCELLED)
    facts = RequestFacts(request_id="r", method="GET", path="/v1/models", arrived=0.0)
    watch(PassedThrough(facts, 1.0, errors.COMPLETED, Progress()))
    assert [happening.text for happening in watch.view(9.0).happenings] == [
        "high waited 8.0 s",
        "high: the upstream hung",
        "high after 8.0 s",
        "high chat, running",
        "high: the upstream broke off",
        "high: the upstream's error",
        "high: upstream_unreachable",
        "low reports, waiting",
    ]
    assert {happening.kind for happening in watch.view(9.0).happenings} == {"timed out", "cancelled", "failed"}
    assert status_line(watch.view(9.0)).endswith("served 1  passed through 1")


def test_what_somebody_sends_by_hand_is_told_apart(watch: Watch) -> None:
    for _ in range(5):
        queued(watch, request("low"))
    mine = queued(watch, by_hand("critical"))
    started(watch, mine, 0.5, 0.5)
    ended(watch, mine, errors.COMPLETED, 1.5, waited=0.5, ran=True)
    started(watch, by_hand("low"))
    assert [(happening.kind, happening.text) for happening in watch.view(2.0).happenings] == [
        ("yours", "critical got a slot after 0.50 s, past 5 others"),
        ("yours", "critical completed after 1.50 s"),
        ("yours", "low got a slot after 0.00 s"),
    ]


def test_how_it_is_cleared_away_is_not_counted(watch: Watch) -> None:
    running = started(watch, request("low"))
    watch.close(5.0)
    ended(watch, running, errors.CANCELLED, ran=True)
    assert level(watch, "low").running == 1
    assert watch.view(5.0).happenings == ()


def test_arrivals_are_recorded_with_what_became_of_them(watch: Watch) -> None:
    first = started(watch, request("low"), at=1.0)
    second = queued(watch, request("high"), at=2.0)
    ended(watch, request("low"), errors.QUEUE_FULL, at=2.5)
    ended(watch, first, errors.COMPLETED, at=3.0, ran=True)
    started(watch, second, at=3.0, waited=1.0)
    third = queued(watch, request("normal"), at=3.5)
    ended(watch, third, errors.EVICTED, at=4.0, waited=0.5)
    queued(watch, request("low"), at=4.0)
    assert watch.records == [
        watching.Record("low", 1.0, 0.0, 1.0, 3.0, Status.COMPLETED),
        watching.Record("high", 2.0, 1.0, 3.0),
        watching.Record("low", 2.5, ended=2.5, status=Status.REJECTED),
        watching.Record("normal", 3.5, 0.5, ended=4.0, status=Status.EVICTED),
        watching.Record("low", 4.0),
    ]


def test_records_and_happenings_are_bounded(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RECORDS_MAX", 3)
    for _ in range(watching.HAPPENINGS_MAX + 5):
        ended(watch, request("low"), errors.QUEUE_FULL)
    view = watch.view(9.0)
    assert len(watch.records) == 3
    assert (len(view.happenings), view.happened) == (watching.HAPPENINGS_MAX, watching.HAPPENINGS_MAX + 5)
    assert level(watch, "low").sent == watching.HAPPENINGS_MAX + 5


def test_a_view_tells_what_is_new(watch: Watch) -> None:
    ended(watch, request("low"), errors.QUEUE_FULL)
    before = watch.view(1.0)
    assert len(before.since(0)) == 1
    ended(watch, request("high"), errors.QUEUE_FULL)
    (new,) = watch.view(2.0).since(before.happened)
    assert new.level == "high"
    assert list(before.since(before.happened)) == []


def test_equal_happenings_close_to_each_other_are_told_as_one() -> None:
    def happening(at: float, text: str) -> Happening:
        return Happening(at, "rejected", "low", text)

    told = told_together([happening(0, "a"), happening(0.1, "b"), happening(0.4, "a"), happening(0.6, "a")], 0.5)
    assert told == [(happening(0, "a"), 2), (happening(0.1, "b"), 1), (happening(0.6, "a"), 1)]
