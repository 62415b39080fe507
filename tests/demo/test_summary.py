"""What the demo says at its end, from made-up events."""

from __future__ import annotations

import pytest

from happened import ended, queued, request, started
from trioproxy import errors
from trioproxy.demo import summary as summing
from trioproxy.demo.replay import Arrival
from trioproxy.demo.scenarios import SCENARIOS
from trioproxy.demo.summary import arrivals, summary
from trioproxy.demo.watch import Record, Watch
from trioproxy.priority import LEVELS

RUSH = SCENARIOS["rush"]


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_it_has_every_level_and_says_what_it_means() -> None:
    watch = Watch(RUSH.slots, RUSH.places)
    for wait in (0.1, 0.2):
        ended(watch, started(watch, request("critical"), waited=wait), errors.COMPLETED, waited=wait, ran=True)
    ended(watch, request("very_low"), errors.QUEUE_FULL)
    queued(watch, request("very_low"))
    watch.close(9.0)
    text = summary(watch, RUSH)
    assert words(text)[:6] == [
        ["level", "sent", "served", "evicted", "rejected", "cancelled", "open"],
        ["critical", "2", "2", "0", "0", "0", "0"],
        ["high", "0", "0", "0", "0", "0", "0"],
        ["normal", "0", "0", "0", "0", "0", "0"],
        ["low", "0", "0", "0", "0", "0", "0"],
        ["very_low", "2", "0", "0", "1", "0", "1"],
    ]
    assert "critical: 2 of 2 served, waiting p99 0.20 s; very_low: 0 of 2 served." in text
    refused = "Evicted or rejected: none of the 2 critical, high ones; 1 of the 2 normal, low, very_low ones."
    assert refused in " ".join(text.split())


def test_it_fits_an_ordinary_terminal() -> None:
    watch = Watch(RUSH.slots, RUSH.places)
    for level in LEVELS:
        for ending in (errors.COMPLETED, errors.UPSTREAM_BROKE_OFF, errors.CANCELLED):
            running = queued(watch, request(level))
            ended(watch, started(watch, running, waited=79.9), ending, waited=79.9, ran=True)
        for ending in (errors.EVICTED, errors.QUEUE_TIMEOUT):
            ended(watch, queued(watch, request(level)), ending, waited=80.0)
        for _ in range(12_345):
            ended(watch, request(level), errors.QUEUE_FULL)
    watch.close(600.0)
    lines = summary(watch, RUSH).splitlines()
    assert {"timeout", "failed", "cancelled"} <= set(lines[0].split())
    assert [line for line in lines if len(line) >= 80] == []


def test_rare_ends_have_a_column_only_if_there_were_any() -> None:
    watch = Watch(RUSH.slots, RUSH.places)
    ended(watch, request("low"), errors.QUEUE_TIMEOUT)
    watch.close(9.0)
    head = summary(watch, RUSH).splitlines()[0]
    assert "timeout" in head
    assert "failed" not in head


def test_it_says_so_if_nothing_was_sent() -> None:
    watch = Watch(RUSH.slots, RUSH.places)
    watch.close(0.1)
    assert summary(watch, RUSH).endswith("Nothing was sent: it ended too early.")


def four_in_front_of_a_critical_one() -> Watch:
    """All slots are taken for a second, a low request waits, then comes a critical one, which is served before it."""
    watch = Watch(RUSH.slots, RUSH.places)
    first = [started(watch, request("very_low")) for _ in range(RUSH.slots)]
    low = queued(watch, request("low"), at=0.1)
    critical = queued(watch, request("critical"), at=0.2)
    ended(watch, first[0], errors.COMPLETED, at=1.0, ran=True)
    started(watch, critical, at=1.0, waited=0.8)
    for other in first[1:]:
        ended(watch, other, errors.COMPLETED, at=2.0, ran=True)
    started(watch, low, at=2.0, waited=1.9)
    ended(watch, critical, errors.COMPLETED, at=2.5, waited=0.8, ran=True)
    ended(watch, low, errors.COMPLETED, at=2.5, waited=1.9, ran=True)
    ended(watch, request("very_low"), errors.QUEUE_FULL, at=3.0)
    watch.close(4.0)
    return watch


def test_it_compares_with_first_come_first_served_on_the_same_arrivals() -> None:
    text = summary(four_in_front_of_a_critical_one(), RUSH)
    compared = {row[0]: row[1:] for row in words(text.partition("The same arrivals")[2]) if row}
    # By arrival the low one would have had the slot that came free at 1.0, the critical one the same, at 1.5.
    assert compared["critical"] == ["1", "800", "800", "800", "0", "1300", "1300", "1300", "0"]
    assert compared["low"] == ["1", "1900", "1900", "1900", "0", "900", "900", "900", "0"]
    assert compared["very_low"] == ["5", "0", "0", "0", "1", "0", "0", "0", "0"]
    assert compared["high"] == ["0", "-", "-", "-", "0", "-", "-", "-", "0"]
    said = "critical ones waited up to 0.80 s (p99 0.80 s); first come, first served it would have been 1.30 s"
    assert said in " ".join(text.split())


def test_it_says_how_many_urgent_ones_would_have_been_rejected() -> None:
    watch = Watch(RUSH.slots, RUSH.places)
    running = [started(watch, request(level)) for level in ("critical", "low", "low", "low")]
    waiting = [queued(watch, request("low")) for _ in range(RUSH.places)]
    for victim in waiting[:2]:
        ended(watch, victim, errors.EVICTED, at=1.0, waited=1.0)
        queued(watch, request("critical"), at=1.0)
    ended(watch, running[0], errors.COMPLETED, at=2.0, ran=True)
    watch.close(3.0)
    assert "(p99 0.00 s), and 2 of them would have been rejected." in " ".join(summary(watch, RUSH).split())


def test_it_says_if_there_is_nothing_to_compare() -> None:
    watch = Watch(RUSH.slots, RUSH.places)
    started(watch, request("low"))
    watch.close(3.0)
    assert "Too few critical ones came to compare anything." in summary(watch, RUSH)


def test_it_says_if_there_was_too_much_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Only the first" not in summary(four_in_front_of_a_critical_one(), RUSH)
    monkeypatch.setattr(summing, "RECORDS_MAX", 7)
    text = summary(four_in_front_of_a_critical_one(), RUSH)
    assert "Only the first 7 arrivals are compared." in " ".join(text.split())


def test_who_never_had_a_slot_would_hold_it_as_long_as_its_level_does() -> None:
    records = [
        Record("low", 0.0, 0.0, 0.0, 1.0),
        Record("low", 1.0, 0.0, 1.0, 4.0),
        Record("high", 2.0, 0.0, 2.0, 10.0),
        Record("low", 3.0),
        Record("high", 4.0, 0.0, 4.0),
        Record("normal", 5.0),
    ]
    assert arrivals(records) == [
        Arrival(0.0, 1.0),
        Arrival(1.0, 3.0),
        Arrival(2.0, 8.0),
        Arrival(3.0, 2.0),
        Arrival(4.0, 8.0),
        Arrival(5.0, 4.0),
    ]
    assert arrivals([Record("low", 1.0)]) == [Arrival(1.0, 0.0)]
